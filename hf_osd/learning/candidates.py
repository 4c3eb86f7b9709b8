"""The weights that could be live: the static draft, what is learned, in part or whole, and a few former leaders."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .scoring import Weights
from .selector import STATIC

HALF, WHOLE = "half", "whole"  # names of the candidates that are learned
ALPHAS = {HALF: 0.5, WHOLE: 1.0}  # their weight interpolation (alpha): 0 is the static draft, 1 all that is learned
SHARE_OF_LATEST = 0.25  # least weight of the latest update in the running average, which is what is learned


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """
    Weights of a draft, and the state of the training copy that goes with them.

    Attributes:
        weights (`dict[str, torch.Tensor]`): What to publish, by the draft's names.
        state (`dict[str, torch.Tensor]`): What training goes on from, by the training copy's names. It is `weights`
            itself unless an adapter is trained.
    """

    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, weights: Weights, state: Weights) -> "Checkpoint":
        """Copy weights and, where it has other names, the state of the training copy."""
        copied = _copied(weights)
        return cls(copied, copied if weights.keys() == state.keys() else _copied(state))

    def groups(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors, in groups, for `from_groups`."""
        same = self.weights is self.state
        return {name: self.weights} if same else {name: self.weights, f"{name}-state": self.state}

    @classmethod
    def from_groups(cls, groups: Mapping[str, Weights], name: str) -> "Checkpoint":
        """Undo `groups`; raise `KeyError` if there is no such checkpoint."""
        weights = dict(groups[name])
        return cls(weights, dict(groups[f"{name}-state"]) if f"{name}-state" in groups else weights)

    def on_cpu(self) -> "Checkpoint":
        """Return the checkpoint in the CPU's memory; tensors that are there already are not copied."""
        moved = {name: weight.cpu() for name, weight in self.weights.items()}
        same = self.weights is self.state
        return Checkpoint(moved, moved if same else {name: tensor.cpu() for name, tensor in self.state.items()})


def _copied(tensors: Weights) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


class Candidates:
    """
    All weights that could be live.

    What is learned is a running average of the weights after each update (https://arxiv.org/abs/1803.05407), without
    the noise of their last steps. It is a candidate as a whole and by half: weights half of the way from the static
    draft lose less of what that knew than they gain (https://arxiv.org/abs/2109.01903).

    Args:
        static (`Checkpoint`): The draft before it learned anything.
        size (`int`): Former leaders to keep; the one that has led least recently leaves first.
        averages (`bool`, defaults to `True`): Whether to average; without, the latest update is what is learned.

    Attributes:
        static (`Checkpoint`): A candidate for ever.
        frozen (`dict[str, Checkpoint]`): Former leaders by name, the most recent one last.
        learned (`dict[str, torch.Tensor]`): The average; empty before the first update, and after `restart({})`.
    """

    def __init__(self, static: Checkpoint, size: int, averages: bool = True) -> None:
        self.static = static
        self.frozen: dict[str, Checkpoint] = {}
        self.learned: dict[str, torch.Tensor] = {}
        self._cast: dict[str, Weights] = {}  # of what is learned
        self._size, self._averages = size, averages
        self._updates = self._numbered = 0

    def names(self) -> Iterator[str]:
        """Return the names of all candidates, the static one first."""
        yield STATIC
        if self.learned:
            yield from ALPHAS if self._averages else [WHOLE]
        yield from self.frozen

    @torch.no_grad()
    def weights(self, name: str) -> Weights:
        """Return the weights of a candidate, float32."""
        if name not in ALPHAS:
            return self._kept(name).weights
        start = self.static.weights
        return {one: start[one].to(end).lerp(end, ALPHAS[name]) for one, end in self.learned.items()}

    def to_score(self, dtype: torch.dtype) -> dict[str, Weights]:
        """Return the weights of all candidates; learned ones cast to `dtype`, always the same, once an update."""
        for name in [name for name in self.names() if name in ALPHAS and name not in self._cast]:
            weights = self.learned if name == WHOLE else self.weights(name)
            self._cast[name] = {one: weight.to(dtype) for one, weight in weights.items()}
        return {name: self._cast[name] if name in ALPHAS else self._kept(name).weights for name in self.names()}

    def origin(self, name: str, latest: Weights) -> Weights:
        """Return what training goes on from where a candidate leads: of what is learned, the `latest` state."""
        return self._kept(name).state if name not in ALPHAS else latest

    def _kept(self, name: str) -> Checkpoint:
        return self.static if name == STATIC else self.frozen[name]

    @torch.no_grad()
    def follow(self, weights: Weights) -> None:
        """Take the weights after an update into the average."""
        self._updates += 1
        self._cast.clear()
        share = max(SHARE_OF_LATEST, 2.0 / (self._updates + 1)) if self._averages else 1.0
        if not self.learned:
            self.learned = {name: weight.detach().float().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            average = self.learned[name].to(weight.device)  # a saved one comes from the disk
            self.learned[name] = average.lerp_(weight.float(), share)

    def restart(self, weights: Weights) -> None:
        """Begin the average anew, with the weights that training goes on from; with none, at the next update."""
        self.learned = {name: weight.float().clone() for name, weight in weights.items()}
        self._updates = min(len(weights), 1)
        self._cast.clear()

    def freeze(self, leader: Checkpoint) -> str | None:
        """Keep a leader that gives way, for when its traffic comes back; return its name, `None` if none is kept."""
        if not self._size:
            return None
        self._numbered += 1
        name = f"frozen-{self._numbered}"
        self.frozen[name] = leader.on_cpu()
        return name

    def surplus(self) -> list[str]:
        """Return the former leaders that are too many."""
        return list(self.frozen)[: max(len(self.frozen) - self._size, 0)]

    def use(self, name: str) -> None:
        """Note that a former leader leads again."""
        self.frozen[name] = self.frozen.pop(name)

    def state(self) -> tuple[dict[str, Weights], dict[str, Any]]:
        """Return what `load_state` needs: groups of tensors, which are not written to any more, and numbers."""
        groups: dict[str, Weights] = dict(self.static.groups(STATIC))
        groups["learned"] = {name: tensor.to("cpu", copy=True) for name, tensor in self.learned.items()}
        for name, checkpoint in self.frozen.items():
            groups |= checkpoint.groups(name)
        return groups, {"updates": self._updates, "numbered": self._numbered, "frozen": list(self.frozen)}

    def load_state(self, groups: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        """Go on from a saved state; raise `KeyError` if something is missing."""
        self.static = Checkpoint.from_groups(groups, STATIC)
        self.frozen = {name: Checkpoint.from_groups(groups, name) for name in numbers["frozen"]}
        self.learned = {name: tensor.clone() for name, tensor in groups["learned"].items()}
        self._updates, self._numbered = numbers["updates"], numbers["numbered"]
        self._cast.clear()
