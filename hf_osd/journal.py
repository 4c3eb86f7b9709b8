"""What learning tells reports: every scored request, update and change of the traffic. Bounded, in memory."""

import threading
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

Decision = Literal["published", "held", "rolled back", "restored", "failed"]

_ENTRIES = 10_000  # of each kind, at most; the oldest leave
_LATEST = 64  # scored requests that say what learning is worth now


@dataclass(frozen=True, slots=True)
class JudgedRequest:
    """
    How the live draft did on a request before anything was learned from it.

    Attributes:
        request (`int`): Its number, from 1.
        acceptance (`float`): How likely the target accepts the draft's token, averaged over positions, in [0, 1].
        positions (`int`): Positions of its output.
        accepted (`float`): Tokens of a proposal that the target would take on average.
        initially (`float`, *optional*): The same of the draft before it learned anything, where that was judged.
    """

    request: int
    acceptance: float
    positions: int
    accepted: float
    initially: float | None = None


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """
    One update of the draft, or one change of what is live.

    Attributes:
        request (`int`): Requests recorded by then.
        decision (`str`): `"published"`: what is learned, or a part of it, went live. `"held"`: an update ended while
            other weights led. `"restored"`: earlier weights went live instead. `"rolled back"`: training goes on from
            the live weights, since what it had led to lost. `"failed"`.
        reason (`str`): In words.
        loss (`float`, *optional*): Mean loss of the steps of an update, in nats.
        learning_rate (`float`, *optional*): At that moment.
        gain (`float`, *optional*): Acceptance of what goes live over that of what was live, on the latest requests.
        mixing (`float`, *optional*): Weight interpolation (alpha): how far the new weights lie on the way from the
            static ones to what is learned.
        seconds (`float`): Time that an update took, without pauses.
    """

    request: int
    decision: Decision
    reason: str
    loss: float | None = None
    learning_rate: float | None = None
    gain: float | None = None
    mixing: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Drift:
    """
    A change of the traffic: the acceptance is far below what is usual.

    Attributes:
        request (`int`): Requests recorded when it was noticed.
        short (`float`): Acceptance of the live weights on the latest requests, those that are unlike the others.
        long (`float`): The usual one.
    """

    request: int
    short: float
    long: float


@dataclass(slots=True)
class Counters:
    """
    What learning has done so far.

    Attributes:
        updates (`int`): Times that learned weights went live.
        failures (`int`): Updates, or other pieces of work, that failed.
        steps (`int`): Steps of the optimiser.
        positions (`int`): Positions learned from, counted once a step.
        last_loss (`float`, *optional*): Mean loss of the last update, in nats.
        seconds (`float`): Time of all of it, without the pauses in which serving went first.
    """

    updates: int = 0
    failures: int = 0
    steps: int = 0
    positions: int = 0
    last_loss: float | None = None
    seconds: float = 0.0


class Journal:
    """The latest entries of each kind. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[type, deque[Any]] = {
            kind: deque(maxlen=_ENTRIES) for kind in (JudgedRequest, UpdateRecord, Drift)
        }

    def add(self, entry: JudgedRequest | UpdateRecord | Drift) -> None:
        """Note an entry; the oldest of its kind may leave."""
        with self._lock:
            self._entries[type(entry)].append(entry)

    @property
    def requests(self) -> list[JudgedRequest]:
        """Judged requests, oldest first."""
        return self._copy(JudgedRequest)

    @property
    def updates(self) -> list[UpdateRecord]:
        """Updates, oldest first."""
        return self._copy(UpdateRecord)

    @property
    def drifts(self) -> list[Drift]:
        """Changes of the traffic, oldest first."""
        return self._copy(Drift)

    @property
    def learned_share(self) -> float:
        """Share of the draft's tokens that the target takes of late only because the draft has learned; in [0, 1]."""
        with self._lock:
            latest = list(self._entries[JudgedRequest])[-_LATEST:]
        pairs = [(one.accepted, one.initially, one.positions) for one in latest if one.initially is not None]
        now, then = (sum(pair[side] * pair[2] for pair in pairs) for side in (0, 1))
        return max(1.0 - then / now, 0.0) if now > 0.0 else 0.0

    def _copy(self, kind: type) -> list[Any]:
        with self._lock:
            return list(self._entries[kind])

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Return everything, ready for JSON."""
        kinds: dict[str, list[Any]] = {"requests": self.requests, "updates": self.updates, "drifts": self.drifts}
        return {name: [asdict(entry) for entry in entries] for name, entries in kinds.items()}
