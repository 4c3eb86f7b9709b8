"""Saving a learner and going on from what was saved, in a folder of its own or in a `state_dir`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from ..config import OnlineConfig
from ..errors import LearningError
from ..journal import Counters
from ..records import Observation
from ..storage import Snapshot, StateDirectory, read_groups, read_state, write_state
from ..storage.identity import INITIAL, LIVE, check_draft, identity_groups
from .reading import teaches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .learner import Learner

logger = logging.get_logger(__name__)


def save(learner: "Learner", directory: Path, redact: Callable[[Observation], Observation | None] | None) -> None:
    """
    Write the state of a learner at rest, each of its requests as `redact` returns it, if that is given.

    Raises:
        StateError: The directory cannot be written to.
    """
    snapshot, observations = snapshot_of(learner), learner.replay.observations()
    if redact is not None:
        observations = [kept for kept in map(redact, observations) if kept is not None]
    numbers = {**snapshot.numbers, "replay": learner.replay.state_dict()}
    write_state(directory, Snapshot(snapshot.tensors, numbers), observations)


def snapshot_of(learner: "Learner") -> Snapshot:
    """Return the state of a learner at rest, without its replay buffer."""
    groups, numbers = learner.state()
    moments, plain = flat_moments(learner.optimizer_state())
    tensors = {**groups, "optimizer": moments, **identity_groups(learner.initial, groups["live"])}
    return Snapshot(tensors, {"counters": asdict(learner.counters), "learner": numbers, "optimizer": plain})


def load(learner: "Learner", draft: "PreTrainedModel", directory: Path) -> None:
    """
    Go on from what `save` wrote: the same requests then give the same weights as without the restart.

    Raises:
        LearningError: The state is missing, damaged or of another draft, or requests have been seen already.
        StateError: The directory cannot be read.
    """
    snapshot, observations = read_state(directory)
    if snapshot is None:
        raise LearningError(f"{directory} does not hold the state of a learner")
    check_draft(draft, snapshot.tensors, directory)
    resume(learner, snapshot, observations)


def keep_on_disk(
    learner: "Learner", draft: "PreTrainedModel", config: OnlineConfig, collect: Callable[[], Snapshot | None]
) -> StateDirectory:
    """
    Go on from what `config.state_dir` holds, if anything, and keep it up to date from now on.

    Args:
        learner (`Learner`): The learner, before its first request.
        draft ([`~transformers.PreTrainedModel`]): The live draft.
        config (`OnlineConfig`): Settings.
        collect (`Callable[[], Snapshot | None]`): A bound method that returns the state to write.

    Raises:
        LearningError: It is the state of another draft.
        StateError: The directory cannot be used.
    """
    assert config.state_dir is not None
    directory = Path(config.state_dir)
    check_draft(draft, read_groups(directory, (INITIAL, LIVE)), directory)  # first: what follows drops old requests
    disk = StateDirectory(
        directory,
        collect=collect,
        flush_seconds=config.flush_seconds,
        max_bytes=config.max_disk_bytes,
        time_to_live=config.time_to_live,
        redact=config.redact,
    )
    try:
        snapshot, observations = disk.load(config.replay_size)
        check_draft(draft, None if snapshot is None else snapshot.tensors, directory)
        resume(learner, snapshot, observations)
        if snapshot is None:  # so that requests before the first update are known to be of this draft
            disk.save(Snapshot(identity_groups(learner.initial, dict(draft.named_parameters()))))
    except BaseException:
        disk.close()
        raise
    return disk


def resume(learner: "Learner", snapshot: Snapshot | None, observations: Sequence[Observation]) -> None:
    """
    Go on from a state of this draft.

    Raises:
        LearningError: It is not that of a learner, or requests have been seen already.
    """
    if learner.requests:
        raise LearningError("a state has to be loaded before the first request")
    numbers = snapshot.numbers if snapshot is not None else {}
    try:
        if snapshot is not None and "counters" in numbers:
            _resume(learner, snapshot)
        _refill(learner, numbers.get("replay"), observations)
        if snapshot is not None:
            learner.initial = dict(snapshot.tensors[INITIAL])
    except (KeyError, TypeError, ValueError) as error:
        raise LearningError(f"this is not the state of a learner: {error!r}") from error


def _resume(learner: "Learner", snapshot: Snapshot) -> None:
    trained = sorted(snapshot.tensors["live"].keys() & set(learner.frozen))
    if trained:
        raise LearningError(f"the state has another {trained[0]} than the target, with which the draft shares it")
    moments = by_parameter(snapshot.tensors["optimizer"], snapshot.numbers["optimizer"])
    counters = Counters(**{one.name: snapshot.numbers["counters"][one.name] for one in fields(Counters)})
    try:
        learner.load_state(snapshot.tensors, snapshot.numbers["learner"], moments)
    except LearningError as error:
        logger.warning("Training starts anew from the saved live weights, since settings have changed: %s.", error)
        learner.start_from(snapshot.tensors["live"])
    learner.counters = counters


def _refill(learner: "Learner", saved: Mapping[str, Any] | None, observations: Sequence[Observation]) -> None:
    useful = [observation for observation in observations if teaches(observation, learner.config.positions)]
    learner.replay.load_state_dict(useful, saved or learner.replay.state_dict())


def flat_moments(state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the tensors, copied to the CPU, and the numbers of an optimiser's state, named `"PARAMETER.KEY"`."""
    flat = {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in flat.items()
        if isinstance(value, torch.Tensor)
    }
    return tensors, {name: value for name, value in flat.items() if isinstance(value, int | float)}


def by_parameter(tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]) -> dict[int, dict[str, Any]]:
    """Undo `flat_moments`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **numbers}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return state
