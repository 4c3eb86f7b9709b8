"""How fast to learn, found out while learning: the learning rate, and how many requests apart updates are."""

from collections.abc import Mapping
from typing import Any

from .candidates import ALPHAS, HALF, WHOLE

FACTORS = {HALF: 0.9, WHOLE: 1.1}  # on the learning rate after an update, by which part of what is learned leads
AFTER_HARM = 0.3  # factor on the learning rate where training has led to weights that lost too much
RECOVERY = 1.1  # factor on a lowered rate after an update that says nothing: what did harm may be what is needed later
LOWEST, HIGHEST = 0.01, 4.0  # bounds of the learning rate, as multiples of the one it begins with
SPACING = 1.2  # factor on the interval after an update before which acceptance had not risen to a new record
WIDEST = 4.0  # bound on the interval, as a multiple of the one it begins with


class Pace:
    """
    A learning rate and an interval between updates that follow what learning leads to.

    Args:
        learning_rate (`float`): Where it begins, and begins again with new traffic.
        update_every (`int`): Requests between two updates, likewise.
        adapts_rate (`bool`): Whether the learning rate follows.
        spaces_updates (`bool`): Whether updates become rarer where acceptance rises no more.

    Attributes:
        learning_rate (`float`): For the next update.
        interval (`float`): Requests until the next update.
    """

    def __init__(self, learning_rate: float, update_every: int, adapts_rate: bool, spaces_updates: bool) -> None:
        self._rate, self._every = learning_rate, float(update_every)
        self._adapts, self._spaces = adapts_rate, spaces_updates
        self.begin_anew()

    def begin_anew(self) -> None:
        """Learn from new traffic as fast as from the first."""
        self.learning_rate, self.interval = self._rate, self._every
        self._record = 0.0  # highest gain so far

    def space(self, gain: float) -> None:
        """
        Make updates rarer where acceptance rises to no new record, and as frequent as at first where it does.

        Args:
            gain (`float`): Acceptance of late above that of the static draft.
        """
        if self._spaces:
            wider = min(self.interval * SPACING, WIDEST * self._every)
            self.interval = self._every if gain > self._record else wider
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
        return {"learning_rate": self.learning_rate, "interval": self.interval, "record": self._record}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.learning_rate, self.interval, self._record = (
            float(state[name]) for name in ("learning_rate", "interval", "record")
        )
