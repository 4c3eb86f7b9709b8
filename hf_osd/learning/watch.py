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
        self._sums: dict[Alarm, ShortfallSum] = {"loss": ShortfallSum(_LOSS_LIMIT), "drift": ShortfallSum(_DROP_LIMIT)}
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

    def clear(self, *alarms: Alarm) -> None:
        """Forget what led to alarms, or to all of them: it has been dealt with."""
        for alarm in alarms or self._sums:
            self._sums[alarm].clear()

    def add(self, observation: Observation, live: Score, initial: Score) -> Alarm | None:
        """Note what the live and the initial weights made of a request; whether that makes up an alarm."""
        usual = self.usual  # 0 before the first one
        self._since.append(_Seen.of(live, initial))
        length = self.length(live)
        gained = length * (live.acceptance - initial.acceptance)
        self._credit = min(_CREDIT, self._credit + _ALLOWANCE + gained)
        lost = self._sums["loss"].add(-gained, observation)
        dropped = self._sums["drift"].add(length * (usual - live.acceptance - _SLACK), observation)
        if lost and not self._is_chance():
            return "loss"
        if dropped and self._errors("drift", self._rates()) > _UNUSUAL_DROP:
            return "drift"
        return None

    def length(self, score: Score) -> float:
        """Return how long a request is, in requests of the usual length."""
        return score.positions / max(fmean(seen.positions for seen in self._latest()), 1.0)

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
        return self._errors("loss", [seen.live - seen.initial for seen in self._latest()]) > _UNUSUAL_LOSS

    @property
    def may_risk(self) -> bool:
        """Whether other weights than the initial ones may go live."""
        return self._credit >= _NEEDED

    def suspects(self, alarm: Alarm) -> list[Observation]:
        """Return the latest requests that led to an alarm."""
        return list(self._sums[alarm].requests)

    def before(self, alarm: Alarm) -> list[float]:
        """Return the acceptance of the live weights on each request before those."""
        return self._rates()[: self._start(alarm)]

    def _is_chance(self) -> bool:
        return self.advantage > 0.0 and self._sums["loss"].total <= 2.0 * _LOSS_LIMIT and not self.has_changed

    def _errors(self, alarm: Alarm, rates: list[float]) -> float:
        start = self._start(alarm)
        return errors_below(rates[start:], rates[:start])

    def _start(self, alarm: Alarm) -> int:
        """Where the requests of an alarm begin among the latest."""
        return len(self._latest()) - min(self._sums[alarm].count, len(self._since))

    def _rates(self) -> list[float]:
        return [seen.live for seen in self._latest()]

    def _latest(self) -> list["_Seen"]:
        return [*self._tested, *self._since][-_LATEST:]

    def state_dict(self) -> dict[str, Any]:
        """Return numbers for JSON. Without the requests that led to the sums."""
        return {
            "sums": {alarm: [one.total, one.count] for alarm, one in self._sums.items()},
            "credit": self._credit,
            "tested": [list(seen) for seen in self._tested],
            "since": [list(seen) for seen in self._since],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; requests of alarms are looked at only if more of the kind come."""
        self.clear()
        for alarm, one in self._sums.items():
            one.total, one.count = state["sums"][alarm]
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
