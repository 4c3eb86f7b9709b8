"""How far to go with what was learned: weights between the initial ones and an average of what training led to."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .gate import Comparison, compare
from .judge import Score, Weights

# How far new weights may go, of the whole way. A draft that knew nothing of the traffic goes all the way, a good one
# gains most near its beginning, and mixed traffic lies in between.
MIXING = (1 / 3, 2 / 3, 1.0)
# The least that an update counts for in the average.
_LATEST = 0.25
# Requests that tell how far to go.
_TESTED = 128


class LearnedPath:
    """
    The straight way from the initial weights to an average of the training copy.

    Weights on it lose less of what the initial ones knew than they gain of the new (https://arxiv.org/abs/2109.01903),
    so the step size matters less: where it destroys a good draft, the first third of the way still improves it. The
    average (https://arxiv.org/abs/1803.05407) is without the noise of the last few steps. How far to go follows from
    all requests of late: each of them tests all places of the way before it is learned from.

    Args:
        initial (`Mapping[str, torch.Tensor]`): The draft's weights before it learned anything.
    """

    def __init__(self, initial: Weights) -> None:
        self.initial = initial
        self.average: dict[str, torch.Tensor] = {}
        self.count = 0
        self._tested: deque[tuple[Score, ...]] = deque(maxlen=_TESTED)  # the initial weights first

    @torch.no_grad()
    def follow(self, weights: Weights) -> None:
        """Count what an update has led to: alone for the first one, a quarter after some more."""
        self.count += 1
        if self.count == 1:
            self.average = {name: weight.detach().float().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            average = self.average[name].to(weight.device)  # a saved one comes from the disk
            self.average[name] = average.lerp_(weight.float(), max(_LATEST, 2.0 / (self.count + 1)))

    def restart(self) -> None:
        """Forget the average: training goes on from somewhere else, or towards something else."""
        self.average, self.count = {}, 0
        self._tested.clear()

    @torch.no_grad()
    def at(self, mixing: float) -> dict[str, torch.Tensor]:
        """
        Return the weights at a place of the way.

        Args:
            mixing (`float`): 0 is its beginning, 1 the average.

        Returns:
            `dict[str, torch.Tensor]`: Float32, on the training copy's device.
        """
        return {name: self.initial[name].to(end).lerp(end, mixing) for name, end in self.average.items()}

    def test(self, score: Callable[[Weights], Sequence[Score]], initial: Sequence[Score]) -> None:
        """
        Test what was learned by requests that it was not learned from.

        Args:
            score (`Callable[[Weights], Sequence[Score]]`): Scores weights on the requests.
            initial (`Sequence[Score]`): Scores of the initial weights on them.
        """
        if self.count:
            self._tested.extend(zip(initial, *(score(self.at(mixing)) for mixing in MIXING), strict=True))

    def best(self) -> tuple[float, Comparison]:
        """
        Return how far to go, and what that gained over the initial weights.

        Not further than what pays certainly, by one standard error: the less the weights change, the less they lose on
        requests that are unlike the others.
        """
        initial, *others = ([scores[place] for scores in self._tested] for place in range(len(MIXING) + 1))
        mixing, best = MIXING[0], others[0]
        for further, scores in zip(MIXING[1:], others[1:], strict=True):
            if compare(scores, best).is_better(1.0):
                mixing, best = further, scores
        return mixing, compare(best, initial)

    def on_cpu(self) -> dict[str, torch.Tensor]:
        """Return a copy of the average."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.average.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return numbers for JSON, all that `load_state` needs besides the average."""
        tested = [[(score.acceptance, score.accepted, score.positions) for score in scores] for scores in self._tested]
        return {"count": self.count, "tested": tested}

    def load_state(self, average: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.average = {name: tensor.clone() for name, tensor in average.items()}
        self.count = numbers["count"]
        self._tested.clear()
        self._tested.extend(tuple(Score(*score) for score in scores) for scores in numbers["tested"])
