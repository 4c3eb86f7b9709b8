"""Seconds that a forward takes on this machine, measured while serving."""

import threading
from collections import deque
from itertools import pairwise

_RECENT = 9  # samples kept for each figure, so that it follows the machine within a few rounds
_LEAST_SAMPLES = 2  # samples from which on a number of tokens counts as measured
_TRUSTED_SAMPLES = 3  # samples from which on a figure is preferred to one scaled from another context


class CostTable:
    """
    Seconds of a forward by batch size, context length and tokens fed.

    Measured numbers of tokens are looked up. Between two of them costs are interpolated linearly; beyond the last they
    are extrapolated at the mean slope, until a round measures them. Contexts are rounded to powers of two. A new one
    starts from the nearest, scaled: a longer context makes all passes more expensive by about the same factor. Threads
    may share a table.
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
                known = self._known(batch, context.bit_length())
                if not known:
                    return None
                points = sorted(known.items())
                self._curves[key] = [_interpolate(points, tokens) for tokens in range(longest + 1)]
            return self._curves[key]

    def is_point(self, batch: int, context: int) -> bool:
        """Whether only one number of tokens was measured, so that the costs of others are unknown."""
        with self._lock:
            return len(self._known(batch, context.bit_length())) == 1

    def seen(self, batch: int, tokens: int) -> float | None:
        """Return the least seconds of so many tokens over all contexts; `None` where there are too few samples."""
        with self._lock:
            found = [
                figures[tokens]
                for (rows, bucket), figures in self._figures.items()
                if rows == batch and len(self._samples[rows, bucket].get(tokens, ())) >= _LEAST_SAMPLES
            ]
        return min(found, default=None)

    def _known(self, batch: int, bucket: int) -> dict[int, float]:
        """Figures of the nearest context; numbers of tokens that it lacks are scaled from other contexts."""
        known: dict[int, float] = {}
        trusted: set[int] = set()
        for _, other in sorted((abs(other - bucket), other) for rows, other in self._figures if rows == batch):
            figures, samples = self._figures[batch, other], self._samples[batch, other]
            often = {tokens for tokens in figures if len(samples[tokens]) >= _TRUSTED_SAMPLES}
            shared = trusted & often or known.keys() & figures.keys()
            ratio = known[min(shared)] / figures[min(shared)] if shared else 1.0
            new = {tokens for tokens in figures if tokens not in known} | (often - trusted)
            known |= {tokens: ratio * figures[tokens] for tokens in new}
            trusted |= often
        return known


def _interpolate(points: list[tuple[int, float]], tokens: int) -> float:
    """Interpolate linearly between measured points; constant below the first, or where only one is known."""
    if tokens <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if tokens <= right:
            return low + (high - low) * (tokens - left) / (right - left)
    (left, low), (right, high) = points[0], points[-1]  # slope over all points: the last one may be a single sample
    return high + max(high - low, 0.0) * (tokens - right) / (right - left)
