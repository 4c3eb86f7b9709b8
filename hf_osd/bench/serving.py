"""Suite `serving`: every way to decode, on every stream, with the same weights and outputs that are checked equal."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ..demo.results import PLAIN
from .contenders import CompiledGenerate, Contender, Generate
from .figures import ratios, report, speedups, summarise
from .session import Session
from .streams import Stream

ASSISTED = "transformers assisted, defaults"
LOOKUP = "transformers prompt lookup"
COMPILED = "plain, static cache and compile"
STATIC = "hf_osd, static draft"
ONLINE = "hf_osd, online draft"

_LOOKUP_TOKENS = 10  # what transformers' own documentation proposes
_SWEPT_LENGTHS = (1, 2, 3, 4, 6, 8)
_SWEPT_REQUESTS = 6


def run(session: Session) -> dict[str, Any]:
    """
    Measure every stream.

    Returns:
        `dict[str, Any]`: By stream: the figures of each contender, speedups by medians over plain decoding and over
        both kinds of transformers' assisted generation, ratios of total time, the sweep that found the best fixed
        length, and the check of the outputs.
    """
    return {"streams": {stream.name: _measure(session, stream) for stream in session.streams}}


def _measure(session: Session, stream: Stream) -> dict[str, Any]:
    sweep = sweep_assisted(session, stream)
    best = min(sweep, key=lambda length: sweep[length])
    with open_contenders(session, stream, best) as contenders:
        title = f"serving {stream.name}"
        race = session.race(contenders, stream.requests, title, warm_up=stream.warm_up, floor=session.floor)
    found = report(race)
    over = (PLAIN, ASSISTED, fixed_name(best))
    return found | {
        "speedup_over": {name: speedups(found["contenders"], name) for name in over},
        "total_time_over_plain": ratios(race, PLAIN),
        "assisted_ms_per_token_by_fixed_length": sweep,
    }


def fixed_name(length: int) -> str:
    """Name transformers' assisted generation at a fixed length."""
    return f"transformers assisted, {length} token{'s' if length > 1 else ''}"


def fixed_settings(length: int) -> dict[str, Any]:
    """Return what keeps transformers' assisted generation at one draft length."""
    return {
        "num_assistant_tokens": length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }


def sweep_assisted(session: Session, stream: Stream) -> dict[int, float]:
    """Return transformers' median milliseconds a token for fixed lengths, on the first requests of the stream."""
    pair = session.pair
    requests = stream.requests[:_SWEPT_REQUESTS]
    contenders = {
        length: Generate(fixed_name(length), pair.target, pair.draft, fixed_settings(length))
        for length in _SWEPT_LENGTHS
    }
    title = f"sweeping assisted generation on {stream.name}"
    race = session.race([*contenders.values()], requests, title, warm_up=stream.warm_up)
    return {length: summarise(race, one.name)["ms_per_token"] for length, one in contenders.items()}


@contextmanager
def open_contenders(session: Session, stream: Stream, best_length: int) -> Iterator[Sequence[Contender]]:
    """Set up all contenders over one target; only the one that learns needs a draft of its own."""
    pair = session.pair
    with ExitStack() as stack:
        contenders: list[Contender] = [
            Generate(PLAIN, pair.target),
            Generate(ASSISTED, pair.target, pair.draft),
            Generate(fixed_name(best_length), pair.target, pair.draft, fixed_settings(best_length)),
            Generate(LOOKUP, pair.target, settings={"prompt_lookup_num_tokens": _LOOKUP_TOKENS}),
            session.assisted(stack, STATIC, session.static()),
        ]
        if session.script is None:  # a scripted draft has nothing to learn
            contenders.append(session.assisted(stack, ONLINE, session.online(), copy.deepcopy(pair.draft)))
        if session.compiles:
            longest = max(one["input_ids"].shape[1] for one in (*stream.requests, stream.warm_up))
            contenders.append(CompiledGenerate(COMPILED, pair.target, longest + session.max_new_tokens))
        yield contenders
