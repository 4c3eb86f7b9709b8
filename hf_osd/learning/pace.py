"""The pace of learning: its rate, and how much of the time that it is allowed it takes; both follow what it gains."""

from collections.abc import Mapping
from typing import Any

from .candidates import ALPHAS, HALF, WHOLE

FACTORS = {HALF: 0.9, WHOLE: 1.1}  # factor on the learning rate after an update, by the candidate that leads
AFTER_HARM = 0.3  # factor on the learning rate where what is learned has lost too much and is taken back
RECOVERY = 1.1  # factor on a lowered learning rate after an update while other weights lead, up to the first rate
LOWEST, HIGHEST = 0.01, 4.0  # bounds of the learning rate, in multiples of the first one
EASING = 0.75  # factor on the eagerness before an update if acceptance is at no new record
LEAST_EAGERNESS = 0.125  # lower bound of the eagerness, so that a change of the traffic is still noticed


class Pace:
    """
    A learning rate, and an eagerness, which follow what learning leads to.

    Args:
        learning_rate (`float`): The first one, which new traffic begins with as well.
        adapts_rate (`bool`): Whether the learning rate follows.

    Attributes:
        learning_rate (`float`): For the next update.
        eagerness (`float`): Share of the allowed time that learning takes, in (0, 1].
    """

    def __init__(self, learning_rate: float, adapts_rate: bool) -> None:
        self._rate, self._adapts = learning_rate, adapts_rate
        self.begin_anew()

    def begin_anew(self) -> None:
        """Learn from new traffic as fast as from the first."""
        self.learning_rate, self.eagerness = self._rate, 1.0
        self._record = 0.0  # highest gain so far

    def spend_by(self, gain: float) -> None:
        """Take all of the allowed time if the gain in acceptance on the static draft is at a record, else less."""
        self.eagerness = 1.0 if gain > self._record else max(self.eagerness * EASING, LEAST_EAGERNESS)
        self._record = max(gain, self._record)

    def follow(self, leader: str) -> None:
        """Adapt the learning rate to the candidate that leads after an update."""
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
