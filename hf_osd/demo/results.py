"""What a run of the demo measured, and the figures that follow from it. Counts and seconds only: never a text."""

from collections.abc import Sequence
from dataclasses import dataclass, field

PLAIN = "plain"
STOCK = "transformers assisted"
STATIC = "static draft"
ONLINE = "online draft"
CONTENDERS = (PLAIN, STOCK, STATIC, ONLINE)

WINDOW = 16  # requests in a moving average


@dataclass(frozen=True, slots=True)
class Measure:
    """
    One contender's answer to one request, in figures.

    Attributes:
        tokens (`int`): Tokens generated.
        seconds (`float`): Wall-clock time of serving them.
        learning_seconds (`float`): Time that the request further waited for an update of the draft.
        drafted (`int`):
            Drafted tokens that the target judged, up to and including the first refusal of each round; 0 where the
            contender does not say.
        accepted (`int`): Those that the target accepted.
        passes (`int`): Forward passes of the target; 0 where the contender does not say.
        updates (`int`): Updates of the draft within this request.
    """

    tokens: int
    seconds: float
    learning_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    updates: int = 0


@dataclass(frozen=True, slots=True)
class Difference:
    """
    An output that is not the target's own.

    Attributes:
        request (`int`): Index of the request.
        contender (`str`): Whose output it is.
        position (`int`): First output position that differs.
        gap (`float`): Distance between the target's two largest logits there.
        near_tie (`bool`): Whether that distance is within the rounding of two ways to compute the same logits.
    """

    request: int
    contender: str
    position: int
    gap: float
    near_tie: bool


@dataclass(frozen=True, slots=True)
class Round:
    """One request answered by every contender, with the differences from plain decoding (greedy only)."""

    measures: dict[str, Measure]
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Figures of one contender over a stretch of requests."""

    requests: int
    tokens: int
    seconds: float
    learning_seconds: float
    drafted: int
    accepted: int
    passes: int
    updates: int

    @property
    def tokens_per_second(self) -> float:
        """Speed of serving alone."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second_with_learning(self) -> float:
        """Speed with the waiting for updates counted in."""
        seconds = self.seconds + self.learning_seconds
        return self.tokens / seconds if seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """Share of the judged tokens that the target accepted; `None` where none is known to be judged."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens for each forward pass of the target; `None` where the passes are not known."""
        return self.tokens / self.passes if self.passes else None


@dataclass(slots=True)
class DemoResult:
    """All rounds of a run, in order. `stopped_early` says that the time budget ended it."""

    rounds: list[Round] = field(default_factory=list)
    stopped_early: bool = False

    def quarter(self, which: int) -> list[Round]:
        """Return the rounds of quarter 1 to 4 of the run."""
        size = len(self.rounds)
        return self.rounds[(which - 1) * size // 4 : which * size // 4] or self.rounds

    @property
    def differences(self) -> list[Difference]:
        """Every output that differs from plain decoding, of any contender."""
        return [difference for one in self.rounds for difference in one.differences]

    @property
    def mismatches(self) -> list[Difference]:
        """Differences of our own contenders that are no near tie: each would be a bug."""
        ours = (STATIC, ONLINE)
        return [item for item in self.differences if item.contender in ours and not item.near_tie]


def aggregate(rounds: Sequence[Round], contender: str) -> Aggregate:
    """Sum one contender's measures over some rounds."""
    measures = [one.measures[contender] for one in rounds]
    return Aggregate(
        requests=len(measures),
        tokens=sum(one.tokens for one in measures),
        seconds=sum(one.seconds for one in measures),
        learning_seconds=sum(one.learning_seconds for one in measures),
        drafted=sum(one.drafted for one in measures),
        accepted=sum(one.accepted for one in measures),
        passes=sum(one.passes for one in measures),
        updates=sum(one.updates for one in measures),
    )


def moving(rounds: Sequence[Round], contender: str, window: int) -> list[Aggregate]:
    """Aggregate the last `window` rounds up to each round, for curves."""
    return [aggregate(rounds[max(0, end - window) : end], contender) for end in range(1, len(rounds) + 1)]
