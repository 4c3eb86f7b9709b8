"""May these weights be published? A comparison of two sets of scores, with its uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .judge import Score

# Spread of a difference between two drafts on one request, in accepted tokens, and how many requests it counts for:
# two held-out requests alone say little about their spread.
_PRIOR_SPREAD, _PRIOR_REQUESTS = 0.1, 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """
    Accepted tokens a proposal of one set of weights over those of another, on the same requests.

    Attributes:
        gain (`float`): Mean of the differences.
        uncertainty (`float`): Its standard error.
        requests (`int`): Requests compared.
    """

    gain: float
    uncertainty: float
    requests: int

    def is_better(self, errors: float) -> bool:
        """Whether the gain is more than so many standard errors above zero."""
        return self.requests > 0 and self.gain > errors * self.uncertainty

    def is_worse(self, errors: float) -> bool:
        """Whether it is as far below zero."""
        return self.requests > 0 and self.gain < -errors * self.uncertainty


def compare(candidate: Sequence[Score], live: Sequence[Score]) -> Comparison:
    """
    Compare two sets of weights by their scores on the same requests.

    Requests differ far more than drafts do, so it is the differences whose spread counts. A weak prior stands for it
    while there are few.

    Args:
        candidate (`Sequence[Score]`): Scores of the weights in question.
        live (`Sequence[Score]`): Scores of the live ones, in the same order.

    Returns:
        `Comparison`: Without requests, one that is neither better nor worse.
    """
    differences = [new.accepted - old.accepted for new, old in zip(candidate, live, strict=True)]
    count = len(differences)
    if not count:
        return Comparison(0.0, math.inf, 0)
    mean = sum(differences) / count
    spread = sum((difference - mean) ** 2 for difference in differences)
    variance = (_PRIOR_REQUESTS * _PRIOR_SPREAD**2 + spread) / (_PRIOR_REQUESTS + count - 1)
    return Comparison(mean, math.sqrt(variance / count), count)
