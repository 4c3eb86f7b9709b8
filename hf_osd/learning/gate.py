"""May these weights be published? A comparison of two sets of scores, with its uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from statistics import fmean

from .judge import Score

# Spread of a difference between two drafts on one request, in target passes a token.
_PRIOR_SPREAD = 0.05
_PRIOR_VALUES = 2
# Standard errors of a certain gain, over many requests, and how many more they are over one.
_CERTAIN, _UNKNOWN = 2.0, 4.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """
    Accepted tokens a round of one set of weights over those of another, on the same requests.

    Attributes:
        gain (`float`): The difference, over all rounds of these requests.
        uncertainty (`float`): Its standard error.
        requests (`int`): Requests compared.
    """

    gain: float
    uncertainty: float
    requests: int

    def is_better(self, errors: float) -> bool:
        """Whether the gain is more than so many standard errors above zero."""
        return self.requests > 0 and self.gain > errors * self.uncertainty

    def is_certain(self) -> bool:
        """Whether there is a gain for certain: more standard errors while the spread of few requests is unknown."""
        return self.is_better(_CERTAIN + _UNKNOWN / max(self.requests, 1))

    def is_worse(self, errors: float) -> bool:
        """Whether it is as far below zero."""
        return self.requests > 0 and self.gain < -errors * self.uncertainty


def compare(candidate: Sequence[Score], live: Sequence[Score]) -> Comparison:
    """
    Compare two sets of weights by their scores on the same requests.

    A mean over rounds, not over requests: a long request takes more rounds, and so does one that the draft is bad at.
    So what is averaged over the requests is their number of rounds, and the uncertainty is propagated from there
    (delta method). Requests differ far more than drafts do, so it is the differences whose spread counts. A weak prior
    stands for it while there are few.

    Args:
        candidate (`Sequence[Score]`): Scores of the weights in question.
        live (`Sequence[Score]`): Scores of the live ones, in the same order.

    Returns:
        `Comparison`: Without requests, one that is neither better nor worse.
    """
    count, tokens = len(live), sum(score.positions for score in live)
    if not tokens:
        return Comparison(0.0, math.inf, 0)
    lengths = [score.positions * count / tokens for score in live]  # in means
    before = fmean(map(mul, lengths, (score.passes for score in live)))
    after = fmean(map(mul, lengths, (score.passes for score in candidate)))
    saved = [length * (old.passes - new.passes) for length, new, old in zip(lengths, candidate, live, strict=True)]
    error = math.sqrt(variance(saved, _PRIOR_SPREAD) / count) / (before * after)
    return Comparison(1.0 / after - 1.0 / before, error, count)


def variance(values: Sequence[float], prior: float) -> float:
    """
    Return the variance of a sample, which alone says little where it is small.

    Args:
        values (`Sequence[float]`): The sample; not empty.
        prior (`float`): Spread that is expected of it, which counts as much as two values.
    """
    mean = fmean(values)
    spread = sum((value - mean) ** 2 for value in values)
    return (_PRIOR_VALUES * prior**2 + spread) / (_PRIOR_VALUES + len(values) - 1)
