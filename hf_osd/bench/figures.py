"""Figures of one contender over a stream: medians by request, totals, and what follows from both."""

import statistics
from collections.abc import Sequence
from typing import Any

from ..serving.stopwatch import STAGES
from .contenders import Sample
from .floor import Floor
from .race import Race


def summarise(race: Race, name: str, floor: Floor | None = None) -> dict[str, Any]:
    """
    Sum up one contender.

    Args:
        race (`Race`): A finished race.
        name (`str`): The contender.
        floor (`Floor`, *optional*): Prices its forwards.

    Returns:
        `dict[str, Any]`: `ms_per_token` is the median over requests. `acceptance` (of the draft's judged
        proposals), `lookup_acceptance` (of prompt lookup's) and `tokens_per_pass` are `None` where the contender does
        not say. `engine_efficiency` is the median over requests
        of the floor of their forwards divided by their wall-clock time, `None` where these cannot be seen.
    """
    samples = race.samples[name]
    lookups = sum(one.lookups for one in samples)
    drafted, passes = sum(one.drafted for one in samples), sum(one.passes for one in samples)
    seen = race.shapes.get(name, [])
    floors = [floor.total(shapes) for shapes in seen] if floor is not None and all(seen) else []
    return {
        "ms_per_token": statistics.median(1e3 * one.seconds / one.tokens for one in samples),
        "total_seconds": sum(one.seconds for one in samples),
        "learning_seconds": sum(one.learning_seconds for one in samples),
        "tokens": sum(one.tokens for one in samples),
        "acceptance": sum(one.accepted for one in samples) / drafted if drafted else None,
        "lookup_acceptance": sum(one.accepted_lookups for one in samples) / lookups if lookups else None,
        "tokens_per_pass": sum(one.tokens for one in samples) / passes if passes else None,
        "engine_efficiency": _efficiency(samples, floors),
        "seconds_by_request": [round(one.seconds, 6) for one in samples],
    }


def _efficiency(samples: Sequence[Sample], floors: Sequence[float]) -> float | None:
    if not floors:
        return None
    return statistics.median(floor / one.seconds for floor, one in zip(floors, samples, strict=True))


def speedups(figures: dict[str, dict[str, Any]], over: str) -> dict[str, float]:
    """Divide one contender's median milliseconds a token by everybody's: above 1 is faster than it."""
    reference = figures[over]["ms_per_token"]
    return {name: reference / one["ms_per_token"] for name, one in figures.items()}


def ratios(race: Race, over: str) -> dict[str, float]:
    """Divide everybody's total time by one contender's: above 1 is slower than it."""
    totals = {name: sum(one.seconds for one in samples) for name, samples in race.samples.items()}
    return {name: total / totals[over] for name, total in totals.items()}


def round_breakdown(race: Race, name: str) -> dict[str, float]:
    """
    Return the milliseconds of each stage of a round.

    A round is one forward of the target, the prompt's included; bookkeeping is what decoding takes beside the stages.
    The median over requests, so that one interrupted request does not count.
    """
    rounds = [sum(n for shape, n in shapes.items() if shape.model == "target") for shapes in race.shapes[name]]
    pairs = list(zip(race.samples[name], rounds, strict=True))
    return {
        stage: statistics.median(1e3 * one.stages[stage] / count for one, count in pairs)
        for stage in (*STAGES, "bookkeeping")
    }
