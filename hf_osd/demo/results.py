"""Whom the demo compares, and stretches of a run."""

from collections.abc import Sequence

from ..evaluation.contenders import Sample
from ..evaluation.race import Race, Round, total

PLAIN = "plain"
STOCK = "transformers assisted"
STATIC = "static draft"
RECALLING = "static draft, recent outputs"
ONLINE = "online draft"
OURS = (STATIC, RECALLING, ONLINE)
CONTENDERS = (PLAIN, STOCK, *OURS)

WINDOW = 16  # requests in a moving average


def quarter(rounds: Sequence[Round], which: int) -> Sequence[Round]:
    """Return the rounds of quarter 1 to 4 of a run."""
    size = len(rounds)
    return rounds[(which - 1) * size // 4 : which * size // 4] or rounds


def moving(rounds: Sequence[Round], contender: str, window: int = WINDOW) -> list[Sample]:
    """Sum up the last `window` rounds up to each round, for curves."""
    return [total(rounds[max(0, end - window) : end], contender) for end in range(1, len(rounds) + 1)]


def mismatches(race: Race) -> int:
    """Count the outputs of hf_osd that are not the target's own."""
    return sum(item.contender in OURS for item in race.mismatches)
