"""How fast to learn, found out while learning: the learning rate, and the share of the allowed time that is spent."""

from collections.abc import Mapping
from typing import Any

from .candidates import ALPHAS, HALF, WHOLE

FACTORS = {HALF: 0.9, WHOLE: 1.1}  # on the learning rate after an update, by which part of what is learned leads
AFTER_HARM = 0.3  # factor on the learning rate where training has led to weights that lost too much
RECOVERY = 1.1  # factor on a lowered rate after an update that says nothing: what did harm may be what is needed later
LOWEST, HIGHEST = 0.01, 4.0  # bounds of the learning rate, as multiples of the one it begins with
EASING = 0.75  # factor on the share of time after an update before which acceptance had not risen to a new record
LEAST_EAGERNESS = 0.125  # bound on the product of these: what is still spent on watching for traffic that changes


class Pace:
    """
    A learning rate, and a share of the time that learning is allowed, which follow what learning leads to.

    Args:
        learning_rate (`float`): Where it begins, and begins again with new traffic.
        adapts_rate (`bool`): Whether the learning rate follows.

    Attributes:
        learning_rate (`float`): For the next update.
        eagerness (`float`): Share of the allowed time to spend, in (0, 1].
    """

    def __init__(self, learning_rate: float, adapts_rate: bool) -> None:
        self._rate, self._adapts = learning_rate, adapts_rate
        self.begin_anew()

    def begin_anew(self) -> None:
        """Learn from new traffic as fast as from the first."""
        self.learning_rate, self.eagerness = self._rate, 1.0
        self._record = 0.0  # highest gain so far

    def spend_by(self, gain: float) -> None:
        """
        Spend all that is allowed where acceptance has risen to a new record, and less each time where it has not.

        Args:
            gain (`float`): Acceptance of late above that of the static draft.
        """
        self.eagerness = 1.0 if gain > self._record else max(self.eagerness * EASING, LEAST_EAGERNESS)
        self._record = max(gain, self._record)

    def follow(self, leader: str) -> None:
        """Let the learning rate follow which candidate leads after an update."""
        if leader in ALPHAS:
            self._turn(FACTORS[leader])
        elif self.learning_rate < self._rate and self._adapts:
            self.learning_rate = min(self.learning_rate * RECOVERY, self._rate)

    def slow_down(self) -> None:
        """Learn more slowly: training has done harm."""
        self._turn(AFTER_HARM)

    def _turn(self, factor: float) -> None:
        if self._adapts:
            self.learning_rate = min(max(self.learning_rate * factor, LOWEST * self._rate), HIGHEST * self._rate)

    def state_dict(self) -> dict[str, float]:
        """Return everything, ready for JSON."""
        return {"learning_rate": self.learning_rate, "eagerness": self.eagerness, "record": self._record}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.learning_rate, self._record = float(state["learning_rate"]), float(state["record"])
        self.eagerness = float(state.get("eagerness", 1.0))
