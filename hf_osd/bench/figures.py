"""Figures of the contenders over a stream: medians by request, totals, and what follows from both."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..evaluation.race import Race, total


def report(race: Race) -> dict[str, Any]:
    """Sum up a race, ready for JSON: the figures of each contender, and the check of the outputs."""
    return {
        "contenders": {name: summarise(race, name) for name in race.rounds[0]},
        "outputs": {
            "requests": len(race.rounds),
            "near_ties": len(race.near_ties),
            "mismatches": [asdict(item) for item in race.mismatches],
        },
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
        not say.
    """
    samples, whole = race.samples(name), total(race.rounds, name)
    return {
        "ms_per_token": statistics.median(1e3 * one.seconds / one.tokens for one in samples),
        "total_seconds": whole.seconds,
        "learning_seconds": whole.learning_seconds,
        "tokens": whole.tokens,
        "acceptance": whole.acceptance,
        "lookup_acceptance": whole.lookup_acceptance,
        "tokens_per_pass": whole.tokens_per_pass,
        "seconds_by_request": [round(one.seconds, 6) for one in samples],
    }


def speedups(figures: Mapping[str, Mapping[str, Any]], over: str) -> dict[str, float]:
    """Divide one contender's median milliseconds a token by everybody's: above 1 is faster than it."""
    reference = figures[over]["ms_per_token"]
    return {name: reference / one["ms_per_token"] for name, one in figures.items()}


def ratios(figures: Mapping[str, Mapping[str, Any]], over: str) -> dict[str, float]:
    """Divide everybody's total time by one contender's: above 1 is slower than it."""
    return {name: one["total_seconds"] / figures[over]["total_seconds"] for name, one in figures.items()}


def has_mismatch(figures: Any) -> bool:
    """Find a mismatch anywhere in a suite's figures: each race reports its own."""
    if isinstance(figures, dict):
        return bool(figures.get("mismatches")) or any(has_mismatch(item) for item in figures.values())
    return isinstance(figures, list) and any(has_mismatch(item) for item in figures)


def rounded(value: Any) -> Any:
    """Keep six significant digits, more than any of them is worth; names of JSON objects become texts."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(name): rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
