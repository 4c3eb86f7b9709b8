"""Weights of the draft that were good once: what it began with, and what it had learned of earlier traffic."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..records import Observation
from .judge import Score


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """
    A draft, and the training copy that led to it.

    Attributes:
        weights (`dict[str, torch.Tensor]`): What to publish, by the draft's names.
        state (`dict[str, torch.Tensor]`): What training goes on from, by the training copy's names: the same tensors
            where the names are.
    """

    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> "Checkpoint":
        """Copy weights, and the state of an adapter that led to them."""
        copied = _copied(weights)
        return cls(copied, copied if weights.keys() == state.keys() else _copied(state))

    def groups(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors under names that `from_groups` knows; once, where they are the same."""
        return (
            {name: self.weights} if self.weights is self.state else {name: self.weights, f"{name}-state": self.state}
        )

    @classmethod
    def from_groups(cls, groups: Mapping[str, Mapping[str, torch.Tensor]], name: str) -> "Checkpoint":
        """
        Undo `groups`.

        Raises:
            KeyError: There is no such checkpoint.
        """
        weights = dict(groups[name])
        return cls(weights, dict(groups[f"{name}-state"]) if f"{name}-state" in groups else weights)

    def on_cpu(self) -> "Checkpoint":
        """Return a checkpoint that takes no memory of an accelerator: itself, if it does not."""
        if all(tensor.device.type == "cpu" for tensor in (*self.weights.values(), *self.state.values())):
            return self
        moved = {name: weight.cpu() for name, weight in self.weights.items()}
        same = self.weights is self.state
        return Checkpoint(moved, moved if same else {name: tensor.cpu() for name, tensor in self.state.items()})


class Archive:
    """
    The checkpoints to fall back on: the initial one for ever, and a few of earlier traffic.

    Drafts are small, so keeping some is cheaper than teaching one draft everything, or the same twice.

    Args:
        initial (`Checkpoint`): The draft before it learned anything.
        size (`int`): Others to keep; the one that has not been live for the longest time leaves first.
    """

    def __init__(self, initial: Checkpoint, size: int) -> None:
        self.initial = initial
        self._size = size
        self.others: list[Checkpoint] = []

    def add(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint that was live until now."""
        self.others = [*self.others, checkpoint][-self._size :] if self._size else []

    def use(self, checkpoint: Checkpoint) -> None:
        """Note that a checkpoint goes live again."""
        if any(other is checkpoint for other in self.others):
            self.others = [other for other in self.others if other is not checkpoint] + [checkpoint]

    def all(self) -> list[Checkpoint]:
        """Return all checkpoints, the initial one first."""
        return [self.initial, *self.others]


class ScoreBook:
    """
    Scores of checkpoints, each found once: requests are held out for long, and checkpoints do not change.

    Args:
        score (`Callable[[Checkpoint, Sequence[Observation]], list[Score]]`): Finds scores.
    """

    def __init__(self, score: Callable[[Checkpoint, Sequence[Observation]], list[Score]]) -> None:
        self._score = score
        # With the request, so that no other has its identity meanwhile.
        self._known: dict[Checkpoint, dict[int, tuple[Observation, Score]]] = {}

    def of(self, checkpoint: Checkpoint, observations: Sequence[Observation]) -> list[Score]:
        """Return the scores of a checkpoint on requests."""
        known = self._known.setdefault(checkpoint, {})
        unknown = [observation for observation in observations if id(observation) not in known]
        self.note(checkpoint, unknown, self._score(checkpoint, unknown) if unknown else [])
        return [known[id(observation)][1] for observation in observations]

    def note(self, checkpoint: Checkpoint, observations: Sequence[Observation], scores: Sequence[Score]) -> None:
        """Take scores that are known already."""
        known = self._known.setdefault(checkpoint, {})
        for observation, score in zip(observations, scores, strict=True):
            known[id(observation)] = observation, score

    def keep(self, checkpoints: Iterable[Checkpoint], observations: Sequence[Observation]) -> None:
        """Forget all others."""
        places = {id(observation) for observation in observations}
        self._known = {
            checkpoint: {place: found for place, found in self._known[checkpoint].items() if place in places}
            for checkpoint in set(checkpoints) & self._known.keys()
        }


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
