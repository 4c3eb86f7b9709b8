"""Whether the weights that are live still do what they promised: alarms of harm, and of a change of the traffic."""

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple

from ..records import Observation
from .drift import ShortfallSum, errors_below
from .judge import Score, token_mean

Alarm = Literal["loss", "drift"]

# Sums of acceptance over requests of the usual length. The first is what live weights may lose against the initial
# ones before they give way to them: 0.002 a request over a hundred requests. The second is a drop of half, over two or
# three requests.
_LOSS_LIMIT, _DROP_LIMIT = 0.2, 0.5
# A request below the usual acceptance by less than this is no sign of a change.
_SLACK = 0.1
# Standard errors beyond which requests are unlike those before. A loss is acted on sooner than a mere change.
_UNUSUAL_LOSS, _UNUSUAL_DROP = 3.5, 4.5
# Requests that count as before.
_LATEST = 32
# What may be lost against the initial weights for good: as much at once, and so much more with each request; what is
# gained counts as well. Weights that were learned go live while there is as much left.
_CREDIT, _ALLOWANCE, _NEEDED = 1.0, 0.005, 0.4


class Watch:
    """
    Watches live weights, request by request, against the initial ones and against what they did before.

    Each request counts by its length, as it does in the acceptance rate. Mixed traffic has stretches where weights
    lose that win on the whole. So it takes more than a sum of losses to call them harm: the weights are behind over
    the latest requests, or those in question are unlike the others, or the sum is twice as large.

    An alarm ends one loss. The credit is there so that losses do not add up, whatever comes and however often weights
    change: losses of any weights spend it, and while it is low none but the initial ones go live.
    """

    def __init__(self) -> None:
        self._losses, self._drops = ShortfallSum(_LOSS_LIMIT), ShortfallSum(_DROP_LIMIT)
        self._tested: list[_Seen] = []  # before the live weights went live
        self._since: deque[_Seen] = deque(maxlen=_LATEST)
        self._credit = _CREDIT

    def begin(self, tested: Sequence[tuple[Score, Score]]) -> None:
        """
        Start anew with other weights.

        Args:
            tested (`Sequence[tuple[Score, Score]]`): Scores of these and of the initial ones on requests that they
                were tested on.
        """
        self._tested = [_Seen.of(live, initial) for live, initial in tested][-_LATEST:]
        self._since.clear()

    def clear(self) -> None:
        """Forget what was lost: an alarm has been dealt with."""
        self._losses.clear()
        self._drops.clear()

    def add(self, observation: Observation, live: Score, initial: Score) -> Alarm | None:
        """Note what the live and the initial weights made of a request; whether that makes up an alarm."""
        usual = self.usual  # 0 before the first one
        self._since.append(_Seen.of(live, initial))
        length = live.positions / max(fmean(seen.positions for seen in self._latest()), 1.0)
        gained = length * (live.acceptance - initial.acceptance)
        self._credit = min(_CREDIT, self._credit + _ALLOWANCE + gained)
        lost = self._losses.add(-gained, observation)
        dropped = self._drops.add(length * (usual - live.acceptance - _SLACK), observation)
        if lost and not self._is_chance():
            return "loss"
        if dropped and self._errors(self._drops, [seen.live for seen in self._latest()]) > _UNUSUAL_DROP:
            return "drift"
        return None

    @property
    def usual(self) -> float:
        """Acceptance of the live weights over the latest requests, in [0, 1]."""
        return token_mean((seen.live, seen.positions) for seen in self._latest())

    @property
    def advantage(self) -> float:
        """Acceptance above that of the initial weights, likewise."""
        return token_mean((seen.live - seen.initial, seen.positions) for seen in self._latest())

    @property
    def has_changed(self) -> bool:
        """Whether the requests that the live weights lose on are unlike those before."""
        return self._errors(self._losses, [seen.live - seen.initial for seen in self._latest()]) > _UNUSUAL_LOSS

    @property
    def may_risk(self) -> bool:
        """Whether other weights than the initial ones may go live."""
        return self._credit >= _NEEDED

    def suspects(self, alarm: Alarm) -> list[Observation]:
        """Return the latest requests that led to an alarm."""
        return list((self._losses if alarm == "loss" else self._drops).requests)

    def _is_chance(self) -> bool:
        return self.advantage > 0.0 and self._losses.total <= 2.0 * _LOSS_LIMIT and not self.has_changed

    def _errors(self, shortfall: ShortfallSum, rates: list[float]) -> float:
        before = len(rates) - min(shortfall.count, len(self._since))
        return errors_below(rates[before:], rates[:before])

    def _latest(self) -> list["_Seen"]:
        return [*self._tested, *self._since][-_LATEST:]

    def state_dict(self) -> dict[str, Any]:
        """Return numbers for JSON. Without the requests that led to the sums."""
        return {
            "loss": self._losses.total,
            "drop": self._drops.total,
            "credit": self._credit,
            "counts": [self._losses.count, self._drops.count],
            "tested": [list(seen) for seen in self._tested],
            "since": [list(seen) for seen in self._since],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; requests of alarms are looked at only if more of the kind come."""
        self.clear()
        self._losses.total, self._drops.total = state["loss"], state["drop"]
        self._losses.count, self._drops.count = state["counts"]
        self._credit = state["credit"]
        self._tested = [_Seen(*seen) for seen in state["tested"]]
        self._since = deque((_Seen(*seen) for seen in state["since"]), maxlen=_LATEST)


class _Seen(NamedTuple):
    """A request: acceptance of the live and of the initial weights, and its length."""

    live: float
    initial: float
    positions: int

    @classmethod
    def of(cls, live: Score, initial: Score) -> "_Seen":
        return cls(live.acceptance, initial.acceptance, live.positions)
