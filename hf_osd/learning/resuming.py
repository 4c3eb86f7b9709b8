"""Saving a learner and going on from what was saved, in a folder of its own or in a `state_dir`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LearningError, StateError
from ..records import Observation
from .collation import teaches
from .identity import INITIAL, LIVE, Sample, difference, sample
from .storage import Snapshot, StateDirectory, read_groups, read_state, write_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .loop import TrainingLoop

STATE_FOLDER = "hf_osd"  # inside a saved draft; other tools load the draft and ignore it


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
        snapshot = loop.snapshot() or loop.blank()
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
    check_draft(draft, snapshot.tensors, directory)
    resume(loop, snapshot, observations)


def keep_on_disk(loop: "TrainingLoop", draft: "PreTrainedModel") -> None:
    """
    Go on from what `config.state_dir` holds, if anything, and keep it up to date from now on.

    Raises:
        LearningError: It is the state of another draft.
        StateError: The directory cannot be used.
    """
    config = loop.config
    assert config.state_dir is not None
    directory = Path(config.state_dir)
    check_draft(draft, read_groups(directory, (INITIAL, LIVE)), directory)  # before anything of it may leave
    disk = StateDirectory(
        directory,
        collect=loop.collect,
        flush_seconds=config.flush_seconds,
        max_bytes=config.max_disk_bytes,
        time_to_live=config.time_to_live,
        redact=config.redact,
    )
    try:
        snapshot, observations = disk.load(config.replay_size)
        check_draft(draft, None if snapshot is None else snapshot.tensors, directory)
        resume(loop, snapshot, observations)
        if snapshot is None:  # requests that come before the first update are of this draft too
            disk.save(loop.blank())
    except BaseException:
        disk.close()
        raise
    loop.disk = disk


def check_draft(draft: "PreTrainedModel", state: Mapping[str, Sample] | None, directory: Path) -> None:
    """
    Refuse the state of another draft.

    A draft is that of a state if its weights are those that the state's draft began with, or those that were live
    there. So is a draft that was saved at another moment, if the state beside it began with the same weights.

    Args:
        draft ([`~transformers.PreTrainedModel`]): As it was loaded.
        state (`Mapping[str, Mapping[str, torch.Tensor]]`, *optional*): Groups of a snapshot, if there is one.
        directory (`Path`): Where it lies, for the message.

    Raises:
        LearningError: It is the state of another draft, or says nothing of its draft.
    """
    if state is None:
        return
    if not state.keys() >= {INITIAL, LIVE}:
        raise LearningError(f"{directory} does not hold the state of a learner: it does not say of which draft it is")
    own = sample(draft.named_parameters())
    if _is_of(own, state):
        return
    saved = _saved_with(draft)
    if saved is None or not _is_of(own, saved) or difference(saved[INITIAL], state[INITIAL]) is not None:
        raise LearningError(
            f"{directory} holds the state of another draft: {difference(own, state[INITIAL])} is not as it was there, "
            "neither at the beginning nor at the end. Load that draft, use another state directory, or delete this one"
        )


def _is_of(own: Sample, state: Mapping[str, Sample]) -> bool:
    return any(difference(own, state[group]) is None for group in (INITIAL, LIVE))


def _saved_with(draft: "PreTrainedModel") -> Mapping[str, Sample] | None:
    """What the state beside a draft says of it, if `save_pretrained` has put one there."""
    if not draft.name_or_path:
        return None
    try:
        state = read_groups(Path(draft.name_or_path) / STATE_FOLDER, (INITIAL, LIVE))
    except StateError:
        return None
    return state if state is not None and state.keys() >= {INITIAL, LIVE} else None


def resume(loop: "TrainingLoop", snapshot: Snapshot | None, observations: list[Observation]) -> None:
    """
    Go on from a state of this draft.

    Raises:
        LearningError: It is not that of a learner, or requests have been seen already.
    """
    if loop.has_begun:
        raise LearningError("a state has to be loaded before the first request")
    numbers = snapshot.numbers if snapshot is not None else {}
    try:
        if snapshot is not None and "counters" in numbers:
            _check_complete(snapshot)
            loop.resume(snapshot)
        _refill(loop, numbers.get("replay"), observations)
        if snapshot is not None:
            loop.initial = snapshot.tensors[INITIAL]
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
    for name in ("live", "student", "average", "archive-0", "optimizer"):
        snapshot.tensors[name]
    for name in ("live", "rate", "path", "watch", "acceptance", "archived", "remembered"):
        snapshot.numbers["supervisor"][name]
    snapshot.numbers["optimizer"]
