"""
What the next requests say of an alarm: was it chance, or is it so?

Few requests raise an alarm, since more would cost too much. Other weights go live at once, which is easily undone;
what cannot be undone, such as turning away from what was learned, waits for the next few requests.
"""

from collections.abc import Sequence
from typing import Literal

from ..records import Observation
from .archive import Checkpoint
from .drift import errors_below
from .judge import Score

Verdict = Literal["chance", "so"]

# Sums of acceptance over requests of the usual length, since an alarm: weights that gave way come back where they are
# this much ahead of those in their place, and not where they are as much behind.
_AHEAD, _BEHIND = 0.3, 0.2
# Requests that end any doubt; and those that confirm a drop, by as many standard errors.
_MOST, _ENOUGH, _CERTAIN = 8, 4, 2.0


class Doubt:
    """
    An alarm that is not yet believed.

    Args:
        suspects (`Sequence[Observation]`): Requests that raised it.
        usual (`float`): Acceptance of the live weights before it.
        is_change (`bool`): Whether they are unlike the requests before: if it is so, the traffic has changed.

    Attributes:
        requests (`list[Observation]`): They, and those since.
        suspended (`Checkpoint`, *optional*): Weights that gave way.
    """

    suspended: Checkpoint | None = None

    def __init__(self, suspects: Sequence[Observation], usual: float, is_change: bool) -> None:
        self.requests = list(suspects)
        self.usual = usual
        self.is_change = is_change
        self._count = 0

    def add(self, observation: Observation, live: Score, suspended: Score, length: float) -> Verdict | None:
        """
        Note a request.

        Args:
            observation (`Observation`): The request.
            live (`Score`): What the live weights made of it.
            suspended (`Score`): What those that gave way would have made of it; else the same.
            length (`float`): Its length, in requests of the usual one.

        Returns:
            `str`, *optional*: `"chance"` or `"so"`; `None` where it takes more requests.
        """
        self.requests.append(observation)
        self._count += 1
        return self._weigh(live, suspended, length)

    def _weigh(self, live: Score, suspended: Score, length: float) -> Verdict | None:
        raise NotImplementedError


class Suspension(Doubt):
    """Others went live in the place of weights that lost, or were not as good any more. Are they really better?"""

    def __init__(self, suspended: Checkpoint, suspects: Sequence[Observation], usual: float, is_change: bool) -> None:
        super().__init__(suspects, usual, is_change)
        self.suspended = suspended
        self._lead = 0.0

    def _weigh(self, live: Score, suspended: Score, length: float) -> Verdict | None:
        self._lead += length * (suspended.acceptance - live.acceptance)
        if self._lead >= _AHEAD:
            return "chance"
        return "so" if self._lead <= -_BEHIND or self._count >= _MOST else None


class Drop(Doubt):
    """
    Acceptance has dropped, and no other weights are better. Does it stay so low?

    Args:
        suspects (`Sequence[Observation]`): Requests that it dropped on.
        usual (`float`): Acceptance of the live weights before it.
        before (`Sequence[float]`): The same by request.
    """

    def __init__(self, suspects: Sequence[Observation], usual: float, before: Sequence[float]) -> None:
        super().__init__(suspects, usual, is_change=True)
        self._before = before
        self._since: list[float] = []

    def _weigh(self, live: Score, suspended: Score, length: float) -> Verdict | None:
        self._since.append(live.acceptance)
        if self._count < _ENOUGH:
            return None
        return "so" if errors_below(self._since, self._before) > _CERTAIN else "chance"
