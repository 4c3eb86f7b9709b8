"""Suite `serving`: every way to decode, on every stream, with the same weights and outputs that are checked equal."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from ..demo.results import PLAIN
from . import peers
from .contenders import CompiledGenerate, Contender, Generate
from .figures import ratios, report, speedups, summarise
from .peers import Maker, Peers
from .session import Session
from .streams import Stream, in_batches

ASSISTED = "transformers assisted, defaults"
LOOKUP = "transformers prompt lookup"
COMPILED = "plain, static cache and compile"
STATIC = "hf_osd, static draft"
DRAFT_ALONE = "hf_osd, static draft, no lookup"
ONLINE = "hf_osd, online draft"

_LOOKUP_TOKENS = 10  # what transformers' own documentation proposes
_SWEPT_LENGTHS = (1, 2, 3, 4, 6, 8)
_SWEPT_REQUESTS = 6


def run(session: Session) -> dict[str, Any]:
    """
    Measure every stream.

    In batches, transformers' assisted generation and prompt lookup take no part: they serve one row.

    Returns:
        `dict[str, Any]`: By stream: the figures of each contender, speedups by medians over plain decoding and over
        both kinds of transformers' assisted generation, ratios of total time, the sweep that found the best fixed
        length, and the check of the outputs. With peers, `peers` has their sweeps, and who was left out and why.
    """
    return {"streams": {stream.name: _measure(session, stream) for stream in session.streams}}


def _measure(session: Session, stream: Stream) -> dict[str, Any]:
    if session.batch > 1:
        stream = in_batches(stream, session.batch, session.options["pad_token_id"])
    assisted = sweep_assisted(session, stream) if session.batch == 1 else {}
    with ExitStack() as stack:
        found = _open_peers(session, stream, stack)
        swept = {name: sweep(session, stream, name, make, peers.LENGTHS) for name, make in found.makers.items()}
        contenders = [
            *_own_contenders(session, stream, stack),
            *(found.makers[name](_fastest(times)) for name, times in swept.items()),
        ]
        if assisted:
            contenders[1:1] = _stock_contenders(session, _fastest(assisted))
        title = f"serving {stream.name}"
        race = session.race(contenders, stream.requests, title, warm_up=stream.warm_up, floor=session.floor)
    figures = report(race)
    over = (PLAIN, ASSISTED, fixed_name(_fastest(assisted))) if assisted else (PLAIN,)
    figures |= {
        "speedup_over": {name: speedups(figures["contenders"], name) for name in over},
        "total_time_over_plain": ratios(race, PLAIN),
        "assisted_ms_per_token_by_fixed_length": assisted,
    }
    if session.peers:
        figures["peers"] = {"ms_per_token_by_length": swept, "left_out": found.left_out}
    return figures


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
        lambda length: Generate(fixed_name(length), pair.target, pair.draft, fixed_settings(length)),
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


def _fastest(times: dict[int, float]) -> int:
    return min(times, key=lambda length: times[length])


def _open_peers(session: Session, stream: Stream, stack: ExitStack) -> Peers:
    if not session.peers:
        return Peers()
    return peers.open_peers(session.pair, stream.warm_up, session.options, stack, session.eagle3)


def _stock_contenders(session: Session, best_length: int) -> list[Contender]:
    """Return what transformers has for one row."""
    pair = session.pair
    return [
        Generate(ASSISTED, pair.target, pair.draft),
        Generate(fixed_name(best_length), pair.target, pair.draft, fixed_settings(best_length)),
        Generate(LOOKUP, pair.target, settings={"prompt_lookup_num_tokens": _LOOKUP_TOKENS}),
    ]


def _own_contenders(session: Session, stream: Stream, stack: ExitStack) -> list[Contender]:
    """Set up plain decoding and ours over one target; only the one that learns needs a draft of its own."""
    pair = session.pair
    contenders: list[Contender] = [Generate(PLAIN, pair.target), session.assisted(stack, STATIC, session.static())]
    if session.peers:  # some of them draft without a lookup
        contenders.append(session.assisted(stack, DRAFT_ALONE, session.static(prompt_lookup=False)))
    if session.script is None:  # a scripted draft has nothing to learn
        contenders.append(session.assisted(stack, ONLINE, session.online(), copy.deepcopy(pair.draft)))
    if session.compiles:
        longest = max(one["input_ids"].shape[1] for one in (*stream.requests, stream.warm_up))
        contenders.append(CompiledGenerate(COMPILED, pair.target, longest + session.max_new_tokens))
    return contenders
