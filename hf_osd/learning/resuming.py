"""Saving a learner and going on from what was saved, in a folder of its own or in a `state_dir`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import LearningError
from ..records import Observation
from .collation import teaches
from .storage import Snapshot, StateDirectory, read_state, write_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .loop import TrainingLoop


def save(loop: "TrainingLoop", directory: Path) -> None:
    """
    Write everything that `load` needs. Waits for an update in progress; requests go on being recorded meanwhile, and
    those that learning has not looked at yet are left out.

    Args:
        loop (`TrainingLoop`): Whose state it is.
        directory (`Path`): Made if it does not exist.

    Raises:
        StateError: The directory cannot be written to.
    """
    with loop.at_rest():
        snapshot = loop.snapshot() or Snapshot()
        replay, observations = loop.replay.state_dict(), loop.replay.observations()
    redact = loop.config.redact
    if redact is not None:
        observations = [kept for kept in map(redact, observations) if kept is not None]
    write_state(directory, Snapshot(snapshot.tensors, {**snapshot.numbers, "replay": replay}), observations)


def load(loop: "TrainingLoop", draft: "PreTrainedModel", directory: Path) -> None:
    """
    Go on from what `save` wrote: the same requests then give the same weights as without the restart, unless requests
    had come since the last update, an alarm was about to be raised or was not sure yet, or the weights before the last
    update come back.

    Raises:
        LearningError: The state is missing, damaged or of another draft, or requests have been seen already.
        StateError: The directory cannot be read.
    """
    snapshot, observations = read_state(directory)
    if snapshot is None:
        raise LearningError(f"{directory} does not hold the state of a learner")
    resume(loop, draft, snapshot, observations)


def keep_on_disk(loop: "TrainingLoop", draft: "PreTrainedModel") -> None:
    """
    Go on from what `config.state_dir` holds, if anything, and keep it up to date from now on.

    Raises:
        LearningError: It is the state of another draft.
        StateError: The directory cannot be used.
    """
    config = loop.config
    assert config.state_dir is not None
    disk = StateDirectory(
        config.state_dir,
        collect=loop.collect,
        flush_seconds=config.flush_seconds,
        max_bytes=config.max_disk_bytes,
        time_to_live=config.time_to_live,
        redact=config.redact,
    )
    try:
        resume(loop, draft, *disk.load(config.replay_size))
    except BaseException:
        disk.close()
        raise
    loop.disk = disk


def resume(
    loop: "TrainingLoop", draft: "PreTrainedModel", snapshot: Snapshot | None, observations: list[Observation]
) -> None:
    """
    Go on from a state.

    Raises:
        LearningError: It is not that of a learner of this draft, or requests have been seen already.
    """
    if loop.has_begun:
        raise LearningError("a state has to be loaded before the first request")
    numbers = snapshot.numbers if snapshot is not None else {}
    try:
        if snapshot is not None and "counters" in numbers:
            _check_draft(draft, snapshot.tensors["live"])
            _check_complete(snapshot)
            loop.resume(snapshot)
        _refill(loop, numbers.get("replay"), observations)
    except (KeyError, TypeError, ValueError) as error:
        raise LearningError(f"this is not the state of a learner: {error!r}") from error


def _refill(loop: "TrainingLoop", saved: Mapping[str, Any] | None, observations: Sequence[Observation]) -> None:
    if saved is not None and sum(saved["parts"]) == len(observations):
        loop.replay.load_state_dict(observations, saved)
        return
    # Redacted, or from a directory, which knows only their order: some have been learned from, so none is a test.
    useful = [observation for observation in observations if teaches(observation, loop.config.positions)]
    loop.replay.load_state_dict(useful, {**loop.replay.state_dict(), "parts": [0, len(useful), 0]})


def _check_complete(snapshot: Snapshot) -> None:
    """Raise `KeyError` now rather than in the thread."""
    for name in ("student", "average", "archive-0", "optimizer"):
        snapshot.tensors[name]
    for name in ("live", "rate", "path", "watch", "acceptance", "archived", "remembered"):
        snapshot.numbers["supervisor"][name]
    snapshot.numbers["optimizer"]


def _check_draft(draft: "PreTrainedModel", live: Mapping[str, torch.Tensor]) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in draft.named_parameters()}
    for name, weight in live.items():
        if shapes.get(name) != tuple(weight.shape):
            raise LearningError(f"{name} has shape {tuple(weight.shape)}, the draft has {shapes.get(name)}")
