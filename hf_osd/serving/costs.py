"""What a forward costs here and now, measured while serving."""

import threading
from collections import deque
from itertools import pairwise

_RECENT = 9  # samples behind a figure: it follows the machine within a few rounds


class CostTable:
    """
    Seconds of a forward by batch size, context length and tokens fed.

    What was measured is looked up; what lies between or beyond is a straight line through the nearest figures, which
    the first round that trusts it corrects. Contexts are told apart by powers of two. Threads may share one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: dict[tuple[int, int], dict[int, deque[float]]] = {}
        self._figures: dict[tuple[int, int], dict[int, float]] = {}
        self._curves: dict[tuple[int, int, int], list[float]] = {}

    def note(self, batch: int, context: int, tokens: int, seconds: float) -> None:
        """Take a measurement: `tokens` fed to each of `batch` rows behind `context` tokens."""
        key = (batch, context.bit_length())
        with self._lock:
            samples = self._samples.setdefault(key, {}).setdefault(tokens, deque(maxlen=_RECENT))
            samples.append(seconds)
            figures, figure = self._figures.setdefault(key, {}), sorted(samples)[len(samples) // 4]
            if figures.get(tokens) != figure:
                figures[tokens] = figure
                self._curves.clear()

    def curve(self, batch: int, context: int, longest: int) -> list[float] | None:
        """
        Return the seconds of 0, 1, ... `longest` tokens; `None` where nothing was measured at this batch size.

        Args:
            batch (`int`): Rows.
            context (`int`): Tokens before those fed; the nearest measured one is taken.
            longest (`int`): Last entry.
        """
        key = (batch, context.bit_length(), longest)
        with self._lock:
            if key not in self._curves:
                known = self._nearest(batch, context.bit_length())
                if known is None:
                    return None
                points = sorted(known.items())
                self._curves[key] = [_interpolate(points, tokens) for tokens in range(longest + 1)]
            return self._curves[key]

    def is_point(self, batch: int, context: int) -> bool:
        """Whether only one number of tokens was measured, which says nothing of others."""
        with self._lock:
            return len(self._nearest(batch, context.bit_length()) or ()) == 1

    def _nearest(self, batch: int, bucket: int) -> dict[int, float] | None:
        buckets = [(abs(other - bucket), other) for rows, other in self._figures if rows == batch]
        return self._figures[batch, min(buckets)[1]] if buckets else None


def _interpolate(points: list[tuple[int, float]], tokens: int) -> float:
    """Read a line through measured points; flat below the first, and beyond the last if only one is known."""
    if tokens <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if tokens <= right:
            return low + (high - low) * (tokens - left) / (right - left)
    (left, low), (right, high) = points[-2:]
    return high + max(high - low, 0.0) * (tokens - right) / (right - left)
