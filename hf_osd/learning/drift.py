"""When the traffic has changed, or the live weights have become worse than others: sums of shortfalls."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

from ..records import Observation
from .gate import variance

# Latest requests since a shortfall began that weights are compared on.
_SUSPECTS = 8
# Spread of the acceptance of requests that are alike, where there are few to tell from.
_PRIOR_SPREAD = 0.1
# So few values say nothing of what is usual.
_FEW = 8


class ShortfallSum:
    """
    Adds up how far requests fall short of what is expected, and starts again from zero whenever they make up for it.

    Page's cumulative sum (https://doi.org/10.1093/biomet/41.1-2.100). Since it is the largest sum over all stretches
    that end now, no stretch of requests can lose more than the limit and one request before the alarm.

    Args:
        limit (`float`): Where it raises the alarm, in the unit of the shortfalls.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.clear()

    def clear(self) -> None:
        """Start from zero."""
        self.total, self.count = 0.0, 0
        self.requests: deque[Observation] = deque(maxlen=_SUSPECTS)

    def add(self, shortfall: float, observation: Observation) -> bool:
        """
        Add a request.

        Args:
            shortfall (`float`): What is missing; negative where it did better than expected.
            observation (`Observation`): The request.

        Returns:
            `bool`: Whether the sum is beyond the limit.
        """
        self.total = max(0.0, self.total + shortfall)
        if self.total == 0.0:
            self.clear()
        else:
            self.count += 1
            self.requests.append(observation)
        return self.total > self._limit


def errors_below(now: Sequence[float], before: Sequence[float]) -> float:
    """
    How unusual it is that values are as low as they are, after others.

    Args:
        now (`Sequence[float]`): The values in question.
        before (`Sequence[float]`): Those that came before.

    Returns:
        `float`: By how many standard errors, of `before`, their mean is lower; 0 where fewer than eight came before.
    """
    if not now or len(before) < _FEW:
        return 0.0
    error = math.sqrt(variance(before, _PRIOR_SPREAD) * (1.0 / len(now) + 1.0 / len(before)))
    return (statistics.fmean(before) - statistics.fmean(now)) / error
