"""Figures of the contenders over a stream: medians by request, totals, and what follows from both."""

import statistics
from typing import Any

from ..serving.stopwatch import STAGES
from .race import Race, describe_differences


def report(race: Race) -> dict[str, Any]:
    """Sum up a race, ready for JSON: the figures of each contender, and the check of the outputs."""
    return {
        "contenders": {name: summarise(race, name) for name in race.samples},
        "outputs": describe_differences(race),
    }


def summarise(race: Race, name: str) -> dict[str, Any]:
    """
    Sum up one contender.

    Args:
        race (`Race`): A finished race.
        name (`str`): The contender.

    Returns:
        `dict[str, Any]`: `ms_per_token` is the median over requests. `acceptance` (of the draft's judged
        proposals), `lookup_acceptance` (of prompt lookup's) and `tokens_per_pass` are `None` where the contender does
        not say. `engine_efficiency` is the median, over the requests that were replayed, of the floor of their
        forwards divided by their wall-clock time; `None` where none was.
    """
    samples = race.samples[name]
    shares = [one.efficiency for one in samples if one.efficiency is not None]
    lookups = sum(one.lookups for one in samples)
    drafted, passes = sum(one.drafted for one in samples), sum(one.passes for one in samples)
    return {
        "ms_per_token": statistics.median(1e3 * one.seconds / one.tokens for one in samples),
        "total_seconds": sum(one.seconds for one in samples),
        "learning_seconds": sum(one.learning_seconds for one in samples),
        "tokens": sum(one.tokens for one in samples),
        "acceptance": sum(one.accepted for one in samples) / drafted if drafted else None,
        "lookup_acceptance": sum(one.accepted_lookups for one in samples) / lookups if lookups else None,
        "tokens_per_pass": sum(one.tokens for one in samples) / passes if passes else None,
        "engine_efficiency": statistics.median(shares) if shares else None,
        "seconds_by_request": [round(one.seconds, 6) for one in samples],
        "floor_by_request": [one.floor and round(one.floor, 6) for one in samples] if shares else [],
    }


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
    samples, stages = race.samples[name], (*STAGES, "bookkeeping")
    return {stage: statistics.median(1e3 * one.stages[stage] / one.rounds for one in samples) for stage in stages}
