"""Suite `lengths`: the draft length from measured cost, next to every fixed one and to transformers' schedules."""

from contextlib import ExitStack
from typing import Any

from ..assistant import OnlineAssistant
from ..config import OnlineConfig
from .contenders import Assisted
from .figures import ratios, summarise
from .race import describe_differences, run_race
from .session import Session
from .streams import Stream

MEASURED = "measured"
DRAFT_ONLY = "measured, no prompt lookup"
LONGEST = 8
_STOCK_LENGTH, _STOCK_THRESHOLD = 20, 0.4  # transformers' defaults


def run(session: Session) -> dict[str, Any]:
    """
    Measure every stream with every schedule, all in our engine and with a draft that does not learn.

    Returns:
        `dict[str, Any]`: By stream: the figures of each schedule, and the total time of each over that of the fixed
        length that hindsight finds best.
    """
    return {"streams": {stream.name: _measure(session, stream) for stream in session.streams}}


def schedules(session: Session) -> dict[str, OnlineConfig]:
    """Return the settings to compare, by name; length 0, which all outputs are compared with, comes first."""
    fixed = {
        f"{length}": session.static(draft_length=length, draft_length_schedule="constant")
        for length in range(LONGEST + 1)
    }
    return fixed | {
        "heuristic": session.static(draft_length=LONGEST, draft_length_schedule="heuristic"),
        "confidence": session.static(
            draft_length=_STOCK_LENGTH, draft_length_schedule="constant", confidence_threshold=_STOCK_THRESHOLD
        ),
        DRAFT_ONLY: session.static(draft_length=LONGEST, draft_length_schedule="measured", prompt_lookup=False),
        MEASURED: session.static(draft_length=LONGEST, draft_length_schedule="measured"),
    }


def _measure(session: Session, stream: Stream) -> dict[str, Any]:
    pair = session.pair
    with ExitStack() as stack:
        contenders = [
            Assisted(name, pair.target, stack.enter_context(OnlineAssistant(pair.draft, pair.target, config)))
            for name, config in schedules(session).items()
        ]
        race = run_race(
            contenders,
            stream.requests,
            session.options,
            session.steps(f"draft lengths on {stream.name}", len(stream.requests)),
            warm_up=stream.warm_up,
        )
    totals = {name: sum(one.seconds for one in samples) for name, samples in race.samples.items()}
    best = min((name for name in totals if name.isdigit()), key=lambda name: totals[name])
    return {
        "contenders": {one.name: summarise(race, one.name) for one in contenders},
        "best_fixed_length": int(best),
        "total_time_over_best_fixed_length": ratios(race, best),
        "outputs": describe_differences(race),
    }
