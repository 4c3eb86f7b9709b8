"""Suite `serving`: every way to decode, on every stream, with the same weights and outputs that are checked equal."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from ..evaluation.contenders import Contender, Generate, assisted_by_stock, takes_draft
from ..evaluation.models import STOCK_LOOKUP
from ..evaluation.streams import Stream, in_batches
from .compiled import CompiledGenerate
from .figures import ratios, speedups, summarise
from .session import Session

PLAIN = "plain"
ASSISTED = "transformers assisted, defaults"
LOOKUP = "transformers prompt lookup"
COMPILED = "plain, static cache and compile"
STATIC = "hf_osd, static draft"
ONLINE = "hf_osd, online draft"

_SWEPT_LENGTHS = (1, 2, 3, 4, 6, 8)
_SWEPT_REQUESTS = 6

Maker = Callable[[int], Contender]
"""Makes the contender that proposes at most so many tokens in each round."""


def run(session: Session) -> dict[str, Any]:
    """
    Measure every stream.

    In batches, transformers' assisted generation and prompt lookup take no part: they serve one row. Nor does its
    assisted generation with a draft that reads the target's states, which transformers cannot give it.

    Returns:
        `dict[str, Any]`: By stream: the figures of each contender, speedups by medians over plain decoding and over
        both kinds of transformers' assisted generation, ratios of total time, the sweep that found the best fixed
        length, and the check of the outputs.
    """
    return {"streams": {stream.name: measure(session, in_rows(session, stream)) for stream in session.streams}}


def in_rows(session: Session, stream: Stream) -> Stream:
    """Return the stream in batches, where the session serves these."""
    return (
        stream
        if session.batch == 1
        else in_batches(stream, session.batch, session.options["pad_token_id"], right=session.pair.has_encoder)
    )


def measure(
    session: Session, stream: Stream, guests: Callable[[ExitStack], Sequence[Contender]] = lambda stack: ()
) -> dict[str, Any]:
    """Measure one stream; `guests` sets up contenders beside the usual ones, until the stack closes."""
    with ExitStack() as stack:
        swept = sweep_assisted(session, stream) if session.batch == 1 and takes_draft(session.pair) else {}
        contenders = [
            Generate(PLAIN, session.pair.target),
            *(_stock_contenders(session, swept) if session.batch == 1 else ()),
            *_own_contenders(session, stack),
            *guests(stack),
            *_compiled(session, stream),
        ]
        _, figures = session.measure(contenders, stream.requests, f"serving {stream.name}", warm_up=stream.warm_up)
    found, over = figures["contenders"], (PLAIN, ASSISTED, fixed_name(fastest(swept))) if swept else (PLAIN,)
    return figures | {
        "speedup_over": {name: speedups(found, name) for name in over},
        "total_time_over_plain": ratios(found, PLAIN),
        "assisted_ms_per_token_by_fixed_length": swept,
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
    return sweep(
        session,
        stream,
        "assisted generation",
        lambda length: assisted_by_stock(fixed_name(length), pair, fixed_settings(length)),
        _SWEPT_LENGTHS,
    )


def sweep(session: Session, stream: Stream, name: str, make: Maker, lengths: Sequence[int]) -> dict[int, float]:
    """
    Let one way to decode find its best length.

    Args:
        session (`Session`): The run.
        stream (`Stream`): Its first requests are served.
        name (`str`): What to call the contender meanwhile.
        make (`Callable[[int], Contender]`): Makes it for a length.
        lengths (`Sequence[int]`): What to try.

    Returns:
        `dict[int, float]`: Median milliseconds a token by length.
    """
    contenders = {length: make(length) for length in lengths}
    requests = stream.requests[:_SWEPT_REQUESTS]
    race = session.race([*contenders.values()], requests, f"sweeping {name} on {stream.name}", warm_up=stream.warm_up)
    return {length: summarise(race, one.name)["ms_per_token"] for length, one in contenders.items()}


def fastest(times: dict[int, float]) -> int:
    """Return the length that took least."""
    return min(times, key=lambda length: times[length])


def _stock_contenders(session: Session, swept: dict[int, float]) -> list[Contender]:
    """Return what transformers has for one row."""
    pair = session.pair
    lookup = Generate(LOOKUP, pair.target, settings={"prompt_lookup_num_tokens": STOCK_LOOKUP})
    if not swept:
        return [lookup]
    best = fastest(swept)
    return [
        assisted_by_stock(ASSISTED, pair),
        assisted_by_stock(fixed_name(best), pair, fixed_settings(best)),
        lookup,
    ]


def _own_contenders(session: Session, stack: ExitStack) -> list[Contender]:
    """Set up ours over one target; only the one that learns needs a draft of its own."""
    static: list[Contender] = [session.assisted(stack, STATIC, session.static())]
    if not session.learns:
        return static
    return [*static, session.assisted(stack, ONLINE, session.online(), copy.deepcopy(session.pair.draft))]


def _compiled(session: Session, stream: Stream) -> list[Contender]:
    if not session.compiles:
        return []
    longest = max(one["input_ids"].shape[1] for one in (*stream.requests, stream.warm_up))
    return [CompiledGenerate(COMPILED, session.pair.target, longest + session.max_new_tokens)]
