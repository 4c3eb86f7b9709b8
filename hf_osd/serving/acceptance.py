"""How likely a proposed token is to be accepted, learned from what became of earlier ones."""

from collections.abc import Sequence

_MEMORY = 1 - 1 / 64  # a token judged so long ago that 64 followed counts a third
_PRIOR = 3.0  # judged tokens that a prior is worth
_REQUEST_PRIOR = 6.0  # expected acceptances before a request's own record weighs as much as everybody's


class Calibration:
    """
    Acceptance rate by what was known when a token was proposed: how sure the draft was, how long the match.

    Args:
        priors (`Sequence[float]`): Rate of each bin before anything was judged.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self._accepted = [prior * _PRIOR for prior in priors]
        self._judged = [_PRIOR] * len(priors)
        self._last = len(priors) - 1

    def rate(self, index: int) -> float:
        """Return the acceptance rate of a bin; indices beyond the last mean the last."""
        index = min(index, self._last)
        return self._accepted[index] / self._judged[index]

    def note(self, index: int, accepted: bool) -> None:
        """Take note of one judged token."""
        index = min(index, self._last)
        self._accepted[index] = self._accepted[index] * _MEMORY + accepted
        self._judged[index] = self._judged[index] * _MEMORY + 1.0


class RequestFactor:
    """How much better or worse than expected the proposals of one request fare; starts at 1."""

    def __init__(self) -> None:
        self._accepted = self._expected = _REQUEST_PRIOR
        self.value = 1.0

    def note(self, expected: float, accepted: bool) -> None:
        """Take note of a judged token that was expected to be accepted at a rate."""
        self._accepted = self._accepted * _MEMORY + accepted
        self._expected = self._expected * _MEMORY + expected
        self.value = min(max(self._accepted / self._expected, 0.5), 1.5)


class Average:
    """
    A running mean that forgets.

    Args:
        start (`float`): Value before any sample.
        memory (`int`): Samples it looks back over.
        weight (`int`): Samples that `start` is worth.
    """

    def __init__(self, start: float, memory: int, weight: int = 1) -> None:
        self.value = start
        self._memory, self._seen = memory, weight

    def note(self, sample: float) -> None:
        """Take a sample."""
        self._seen = min(self._seen + 1, self._memory)
        self.value += (sample - self.value) / self._seen
