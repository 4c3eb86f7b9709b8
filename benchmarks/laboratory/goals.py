"""The goals of learning in figures, from the runs of one stream; `docs/laboratory.md` defines them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .curves import Curve, best, change_on_return, share_to_reach, worst_window
from .recipes import BASELINE, OFFLINE, STATIC, Recipe
from .streams import STATIONARY, Stream

# What each figure has to be: at most, or at least.
GOALS = {
    "share_to_reach_algorithm_1": ("<=", 0.25),
    "final_above_algorithm_1": (">=", 0.08),
    "worst_window_above_static": (">=", -0.005),
    "change_on_return": (">=", -0.02),
}


@dataclass(frozen=True)
class Run:
    """One recipe over one stream, as `runs.py` kept it."""

    recipe: Recipe
    result: Mapping[str, Any]

    def curve(self, name: str = "agreed") -> Curve:
        """Return the curve of a field of `Score`."""
        scores = self.result["scores"]
        return Curve(scores[name], scores["positions"])


def best_baseline(runs: Sequence[Run]) -> Run | None:
    """Return Algorithm 1 at the learning rate with the highest final acceptance on this stream."""
    found = {run.recipe.name: run for run in runs if run.recipe.family == BASELINE}
    name = best([(name, run.curve().final()) for name, run in found.items()])
    return None if name is None else found[name]


def figures(stream: Stream, runs: Sequence[Run]) -> dict[str, dict[str, float | None]]:
    """
    Return the goals' figures of each online recipe; those only that the stream and the recipes at hand define.

    `share_to_reach_algorithm_1` is `None` where the level is never reached.
    """
    baseline = _curve(best_baseline(runs))
    static = _curve(next((run for run in runs if run.recipe.family == STATIC), None))
    return {
        run.recipe.name: _figures(stream, run.curve(), baseline, static)
        for run in runs
        if run.recipe.family not in (STATIC, OFFLINE)
    }


def _curve(run: Run | None) -> Curve | None:
    return None if run is None else run.curve()


def _figures(stream: Stream, curve: Curve, baseline: Curve | None, static: Curve | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    if baseline is not None and stream.kind in STATIONARY:
        found["share_to_reach_algorithm_1"] = share_to_reach(curve, baseline.final())
        found["final_above_algorithm_1"] = curve.final() - baseline.final()
    if static is not None:
        found["worst_window_above_static"] = worst_window(curve, static)
    if stream.kind == "return":
        found["change_on_return"] = _on_return(stream, curve)
        if static is not None:  # how much easier or harder the requests of the second visit are
            found["change_on_return_static"] = _on_return(stream, static)
    return found


def _on_return(stream: Stream, curve: Curve) -> float:
    first, back = stream.segments[0], stream.segments[-1]
    return change_on_return(curve, (first.start, first.end), (back.start, back.end))


def met(name: str, value: float | None) -> bool | None:
    """Say whether a figure meets its goal; `None` where there is no goal for it."""
    if name not in GOALS:
        return None
    relation, limit = GOALS[name]
    if value is None:
        return False
    return value <= limit if relation == "<=" else value >= limit
