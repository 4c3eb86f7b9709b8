"""Weights of the draft that were good once: what it began with, and what it had learned of earlier traffic."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """
    A draft, and the training copy that led to it.

    Attributes:
        weights (`dict[str, torch.Tensor]`): What to publish, by the draft's names.
        state (`dict[str, torch.Tensor]`): Trained parameters, by the training copy's names; the same tensors where
            the names are.
    """

    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> "Checkpoint":
        """Copy weights and state; once, where they are the same memory."""
        if weights.keys() == state.keys() and all(_same(weights[name], state[name]) for name in weights):
            copied = {name: weight.detach().clone() for name, weight in weights.items()}
            return cls(copied, copied)
        return cls(*({name: tensor.detach().clone() for name, tensor in group.items()} for group in (weights, state)))

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
        """Return a checkpoint that takes no memory of an accelerator."""
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


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.dtype == other.dtype and one.shape == other.shape
