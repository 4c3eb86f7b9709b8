"""When the traffic has changed, or the live weights have become worse than others: sums of shortfalls."""

from collections import deque

from ..records import Observation

# Latest requests since a shortfall began that weights are compared on.
_SUSPECTS = 8


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
        self.total = 0.0
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
            self.requests.clear()
        else:
            self.requests.append(observation)
        return self.total > self._limit


class MovingAverage:
    """
    A mean that forgets: of all values while there are few, then mostly of the last `span`.

    Args:
        span (`int`): Values that count.
    """

    def __init__(self, span: int) -> None:
        self._span = span
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """Take another value."""
        self.count += 1
        self.value += (value - self.value) / min(self.count, self._span)

    def restart(self, value: float) -> None:
        """Forget everything but this value."""
        self.value, self.count = value, 1
