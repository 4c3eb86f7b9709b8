"""How likely a proposed token is to be accepted, estimated from earlier proposals."""

from collections.abc import Sequence

_MEMORY = 1 - 1 / 64  # factor on the weight of earlier tokens with each judged one: the last 64 weigh most
_PRIOR = 3.0  # judged tokens that the prior of a bin weighs as much as
_REQUEST_PRIOR = 6.0  # accepted tokens that the factor of a new request starts from, so that it moves slowly from 1


class Calibration:
    """
    Acceptance rate in bins of something known when a token is proposed, such as the draft's own probability of it, or
    the lookup's evidence. Recent tokens weigh more.

    Args:
        priors (`Sequence[float]`): Rate of each bin before anything was judged.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self._accepted = [prior * _PRIOR for prior in priors]
        self._judged = [_PRIOR] * len(priors)

    def rate(self, index: int) -> float:
        """Return the acceptance rate of a bin."""
        return self._accepted[index] / self._judged[index]

    def note(self, index: int, accepted: bool) -> None:
        """Take note of one judged token."""
        self._accepted[index] = self._accepted[index] * _MEMORY + accepted
        self._judged[index] = self._judged[index] * _MEMORY + 1.0


class RequestFactor:
    """Ratio of one request's acceptance to what was expected of its proposals, in [0.5, 1.5]; starts at 1."""

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
    A mean of the latest samples.

    Args:
        start (`float`): Value before any sample.
        memory (`int`): Samples that it averages over; older ones fade.
        weight (`int`): Samples that `start` is worth.
    """

    def __init__(self, start: float, memory: int, weight: int = 1) -> None:
        self.value = start
        self._memory, self._seen = memory, weight

    def note(self, sample: float) -> None:
        """Take a sample."""
        self._seen = min(self._seen + 1, self._memory)
        self.value += (sample - self.value) / self._seen
