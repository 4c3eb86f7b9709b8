"""
What the next requests say of an alarm by requests that are unlike those before: was it chance, or has traffic changed?

Few requests raise an alarm, since more would cost too much. Other weights go live at once, which is easily undone;
what cannot be undone, such as turning away from what was learned, waits for the next few requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..records import Observation
from .archive import Checkpoint
from .drift import errors_below
from .judge import Score

Verdict = Literal["chance", "so"]

# Sums of acceptance over requests of the usual length, since an alarm: weights that gave way come back where they are
# this much ahead of those in their place, and not where they are as much behind.
_AHEAD, _BEHIND = 0.3, 0.2
# Requests that it takes to believe an alarm, and after which one is believed that nothing speaks against.
_ENOUGH, _MOST = 4, 8
# Standard errors by which a drop lasts.
_LASTING = 2.0


@dataclass(frozen=True, slots=True)
class Cause:
    """
    What an alarm rests on.

    Attributes:
        suspects (`Sequence[Observation]`): Requests that raised it.
        before (`Sequence[float]`): Acceptance of the live weights on each request before those.
        memorable (`Checkpoint`, *optional*): The live weights, if it is worth remembering them in that case.
    """

    suspects: Sequence[Observation]
    before: Sequence[float]
    memorable: Checkpoint | None


class Doubt:
    """
    An alarm that is not yet believed.

    Args:
        cause (`Cause`): What it rests on.
        live (`Checkpoint`): What is live since. With other weights it is pointless.

    Attributes:
        requests (`list[Observation]`): Those that raised it, and those since.
        suspended (`Checkpoint`, *optional*): Weights that gave way.
    """

    suspended: Checkpoint | None = None

    def __init__(self, cause: Cause, live: Checkpoint) -> None:
        self.cause = cause
        self.live = live
        self.requests = list(cause.suspects)
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
    """
    Others went live in the place of weights that lost, or were not as good any more. Are they really better?

    Args:
        cause (`Cause`): What the alarm rests on.
        live (`Checkpoint`): The others.
        suspended (`Checkpoint`): The weights that gave way.
    """

    def __init__(self, cause: Cause, live: Checkpoint, suspended: Checkpoint) -> None:
        super().__init__(cause, live)
        self.suspended = suspended
        self._lead = 0.0

    def _weigh(self, live: Score, suspended: Score, length: float) -> Verdict | None:
        self._lead += length * (suspended.acceptance - live.acceptance)
        if self._lead >= _AHEAD:
            return "chance"
        is_behind = self._lead <= -_BEHIND and self._count >= _ENOUGH
        return "so" if is_behind or self._count >= _MOST else None


class Drop(Doubt):
    """Acceptance has dropped, and no other weights are better. Does it stay so low?"""

    def __init__(self, cause: Cause, live: Checkpoint) -> None:
        super().__init__(cause, live)
        self._since: list[float] = []

    def _weigh(self, live: Score, suspended: Score, length: float) -> Verdict | None:
        self._since.append(live.acceptance)
        if self._count < _ENOUGH:
            return None
        return "so" if errors_below(self._since, self.cause.before) > _LASTING else "chance"
