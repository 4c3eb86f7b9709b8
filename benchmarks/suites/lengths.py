"""Suite `lengths`: the draft length from measured cost, next to every fixed one and to transformers' schedules."""

from contextlib import ExitStack
from typing import Any

from hf_osd.bench.figures import ratios, report
from hf_osd.bench.session import Session
from hf_osd.config import OnlineConfig
from hf_osd.evaluation.streams import Stream

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
    with ExitStack() as stack:
        contenders = [session.assisted(stack, name, config) for name, config in schedules(session).items()]
        title = f"draft lengths on {stream.name}"
        race = session.race(contenders, stream.requests, title, warm_up=stream.warm_up)
    found = report(race)
    times = found["contenders"]
    best = min(filter(str.isdigit, times), key=lambda name: times[name]["total_seconds"])
    return found | {"best_fixed_length": int(best), "total_time_over_best_fixed_length": ratios(times, best)}
