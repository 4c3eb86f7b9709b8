"""Acceptance along a stream, and the figures of the goals. Every rate is of tokens, not a mean over requests."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

# Requests of a point of the printed and drawn curves, and of the moving rate that says when a level is reached.
WINDOW = 25
# Requests that "never worse than the static draft" and "back where it was" are measured over.
LONG_WINDOW = 100


class Curve:
    """
    What was reached at each request, out of how much: tokens agreed out of tokens, say.

    Args:
        reached (`Iterable[float]`): One number a request.
        positions (`Iterable[int]`): Tokens of each request.
    """

    def __init__(self, reached: Iterable[float], positions: Iterable[int]) -> None:
        self._reached = [0.0, *accumulate(reached)]
        self._positions = [0, *accumulate(positions)]

    def __len__(self) -> int:
        return len(self._positions) - 1

    def rate(self, start: int, end: int) -> float:
        """What was reached per token from request `start` to before `end`; 0 where there are no tokens."""
        positions = self._positions[end] - self._positions[start]
        return (self._reached[end] - self._reached[start]) / positions if positions else 0.0

    def windows(self, width: int = WINDOW) -> list[float]:
        """Rates of consecutive windows; the last one may be shorter."""
        return [self.rate(start, min(start + width, len(self))) for start in range(0, len(self), width)]

    def quarters(self) -> list[float]:
        """Rates of the four quarters."""
        marks = [len(self) * quarter // 4 for quarter in range(5)]
        return [self.rate(start, end) for start, end in pairwise(marks)]

    def final(self) -> float:
        """Rate of the last quarter."""
        return self.rate(len(self) * 3 // 4, len(self))


def share_to_reach(curve: Curve, level: float, width: int = WINDOW) -> float | None:
    """
    Share of the requests after which a level is reached, and kept.

    Args:
        curve (`Curve`): What is watched.
        level (`float`): The rate to reach.
        width (`int`, defaults to 25): Requests of the moving rate.

    Returns:
        `float`, *optional*: In (0, 1]: the first request at which the last `width` ones have the level, and all that
        follow have it together, by the number of requests. `None` where there is none.
    """
    total = len(curve)
    for end in range(min(width, total), total + 1):
        kept = end == total or curve.rate(end, total) >= level
        if kept and curve.rate(max(end - width, 0), end) >= level:
            return end / total
    return None


def worst_window(curve: Curve, reference: Curve, width: int = LONG_WINDOW) -> float:
    """Smallest difference of two rates over any `width` consecutive requests, or over all where there are fewer."""
    width = min(width, len(curve))
    starts = range(len(curve) - width + 1)
    return min(curve.rate(start, start + width) - reference.rate(start, start + width) for start in starts)


def change_on_return(curve: Curve, first: tuple[int, int], back: tuple[int, int], width: int = LONG_WINDOW) -> float:
    """
    How much better the beginning of a second visit is than the end of the first one; negative where it is worse.

    Args:
        curve (`Curve`): A stream that returns to its first domain.
        first (`tuple[int, int]`): First request of the first visit, and the one after its last.
        back (`tuple[int, int]`): Likewise of the second visit.
        width (`int`, defaults to 100): Requests of either, at most.
    """
    before = curve.rate(max(first[0], first[1] - width), first[1])
    return curve.rate(back[0], min(back[0] + width, back[1])) - before


def best(finals: Sequence[tuple[str, float]]) -> str | None:
    """Return the name with the highest figure."""
    return max(finals, key=lambda pair: pair[1])[0] if finals else None
