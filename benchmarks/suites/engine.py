"""Suite `engine`: what a round costs beside its forwards, over batch sizes, draft lengths and contexts."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hf_osd.bench.figures import ratios
from hf_osd.bench.serving import fixed_settings
from hf_osd.evaluation.contenders import Contender, Generate
from hf_osd.evaluation.encoding import Inputs, context_of
from hf_osd.evaluation.models import Pair
from hf_osd.serving.stopwatch import STAGES

from .floor import Watched, watched
from .session import Session

GENERATE = "transformers plain"
PLAIN = "hf_osd, plain"
STOCK = "transformers assisted"
OURS = "hf_osd"

BATCHES = (1, 2, 4, 8, 16, 32)
LENGTHS = tuple(range(9))
CONTEXTS = (128, 256, 512, 1024, 2048)
REPEATS, REPEATS_OF_LARGE_BATCHES = 5, 3


@dataclass(frozen=True, slots=True)
class Point:
    """
    Where to measure.

    Attributes:
        batch (`int`): Rows.
        draft_length (`int`): Tokens drafted in each round, always all of them; 0 is plain decoding.
        context (`int`): Tokens of the prompt of each row.
    """

    batch: int = 1
    draft_length: int = 4
    context: int = 128


BASE = Point()
AXES: dict[str, tuple[int, ...]] = {"batch": BATCHES, "draft_length": LENGTHS, "context": CONTEXTS}


def points() -> dict[str, list[Point]]:
    """Return the points of each axis: one setting varies, the others stay at the base point."""
    return {axis: [replace(BASE, **{axis: value}) for value in values] for axis, values in AXES.items()}


def run(session: Session) -> dict[str, Any]:
    """
    Measure every axis.

    Every row is a stretch of the streams' text and generates to its full length. Our engine records what it would
    learn from, but never learns; plain decoding does not record.

    Returns:
        `dict[str, Any]`: By axis, a list of points with the figures of each contender, the milliseconds of each stage
        of a round, and the total time of our plain decoding over that of transformers. Points that do not fit into the
        models' context are under `skipped`.
    """
    wanted = points()
    room = context_of(session.pair) - session.max_new_tokens
    fitting = [point for point in dict.fromkeys(p for axis in wanted.values() for p in axis) if point.context <= room]
    done = session.steps("engine", len(fitting))
    measured: dict[Point, dict[str, Any]] = {}
    with without_eos(session.pair):
        for point in fitting:
            measured[point] = measure(session, point)
            done()
    return {
        "axes": {axis: [measured[p] for p in wanted[axis] if p in measured] for axis in wanted},
        "skipped": [asdict(p) for axis in wanted.values() for p in axis if p not in measured],
    }


def measure(session: Session, point: Point) -> dict[str, Any]:
    """Measure one point: the same batch several times, the median of all."""
    requests = [request for stream in session.streams for request in stream.requests]
    batch = texts_of_length(requests, point.batch, point.context)
    repeats = REPEATS if point.batch < 8 else REPEATS_OF_LARGE_BATCHES
    with _open_contenders(session, point) as contenders:
        race, figures = session.measure(contenders, [batch] * repeats)
    return {
        **asdict(point),
        **figures,
        "round_ms": round_breakdown(watched(race, OURS if point.draft_length else PLAIN)),
        "plain_over_generate": ratios(figures["contenders"], GENERATE)[PLAIN],
    }


def round_breakdown(samples: Sequence[Watched]) -> dict[str, float]:
    """
    Return the milliseconds of each stage of a round.

    A round is one forward of the target, the prompt's included; bookkeeping is what decoding takes beside the stages.
    The median over requests, so that one interrupted request does not count.
    """
    stages = (*STAGES, "bookkeeping")
    return {stage: statistics.median(1e3 * one.stages[stage] / one.rounds for one in samples) for stage in stages}


def texts_of_length(requests: Sequence[Inputs], batch: int, length: int) -> Inputs:
    """
    Return a batch of rows of exactly one length, each another stretch of all requests joined.

    Args:
        requests (`Sequence[Inputs]`): At least one.
        batch (`int`): Rows.
        length (`int`): Tokens of each row.
    """
    tokens = torch.cat([one["input_ids"][0] for one in requests])
    starts = torch.arange(batch) * (max(len(tokens) // batch, 1))
    columns = (starts[:, None] + torch.arange(length)) % len(tokens)
    ids = tokens[columns.to(tokens.device)]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def without_eos(pair: Pair) -> Iterator[None]:
    """Let every row run to its full length, so that a point of measurement is what it says it is."""
    configs = [model.generation_config for model in (pair.target, pair.draft)]
    before = [config.eos_token_id for config in configs]
    for config in configs:
        config.eos_token_id = None
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.eos_token_id = value


@contextmanager
def _open_contenders(session: Session, point: Point) -> Iterator[list[Contender]]:
    pair, k = session.pair, point.draft_length
    with ExitStack() as stack:

        def ours(name: str, **settings: Any) -> Contender:
            return session.assisted(stack, name, session.online(draft_length_schedule="constant", **settings))

        contenders: list[Contender] = [Generate(GENERATE, pair.target), ours(PLAIN, draft_length=0, learn=False)]
        if k:
            contenders.append(ours(OURS, draft_length=k, update_every=2**31))
        if k and point.batch == 1:  # all that transformers' assisted generation serves
            contenders.append(Generate(STOCK, pair.target, pair.draft, fixed_settings(k)))
        yield contenders
