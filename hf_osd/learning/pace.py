"""The pace of learning: its rate, and how much of the time that it is allowed it takes; both follow what it gains."""

from collections.abc import Mapping
from typing import Any

from .candidates import ALPHAS, HALF, WHOLE

FACTORS = {HALF: 0.9, WHOLE: 1.1}  # factor on the learning rate after an update, by the candidate that leads
AFTER_HARM = 0.3  # factor on the learning rate where what is learned has lost too much and is taken back
RECOVERY = 1.1  # factor on a lowered learning rate after an update while other weights lead, up to the first rate
LOWEST, HIGHEST = 0.01, 4.0  # bounds of the learning rate, in multiples of the first one
TRIAL = 6  # updates for which all is spent on new traffic: before, nobody knows what there is to gain
EASING = 0.5  # factor on the eagerness before a later update if acceptance is at no new record
LEAST_EAGERNESS = 0.03  # lower bound of the eagerness, so that a change of the traffic is still noticed


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
        self.learning_rate = self._rate
        self.begin_trial()

    def begin_trial(self) -> None:
        """Spend all of the allowed time until it is known what there is to gain."""
        self.eagerness = 1.0
        self._updates, self._record = 0, 0.0  # on this traffic, and the highest gain so far

    def spend_by(self, gain: float) -> None:
        """
        Choose what to spend after an update, by what the best candidate has gained in acceptance on the static draft.

        All of the allowed time during the trial, and after a new record; half as much with each other update.
        """
        self._updates += 1
        is_trial = self._updates <= TRIAL  # in which the gain is a mean over few requests, and no record
        self.eagerness = 1.0 if is_trial or gain > self._record else max(self.eagerness * EASING, LEAST_EAGERNESS)
        self._record = max(gain, 0.0 if is_trial else self._record)

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
        numbers = {"learning_rate": self.learning_rate, "eagerness": self.eagerness}
        return {**numbers, "record": self._record, "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.learning_rate, self._record = float(state["learning_rate"]), float(state["record"])
        self.eagerness, self._updates = float(state.get("eagerness", 1.0)), int(state.get("updates", 0))
