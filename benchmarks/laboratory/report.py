"""What came out, as JSON and as Markdown."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_osd.evaluation.machine import versions
from hf_osd.evaluation.output import command_line
from hf_osd.learning.scoring import PROPOSAL_LENGTH

from .curves import WINDOW
from .goals import GOALS, Run, best_baseline, figures, met
from .streams import Stream

_HEADINGS = {
    "share_to_reach_algorithm_1": "share to reach Alg. 1",
    "final_above_algorithm_1": "final - Alg. 1",
    "worst_window_above_static": "worst window - static",
    "change_on_return": "on return",
}


def document(settings: Mapping[str, Any], measured: Iterable[tuple[Stream, Sequence[Run]]]) -> dict[str, Any]:
    """Return everything that was found, ready for JSON: rates by window of requests, quarters, segments, goals."""
    return {
        "command": command_line(),
        "versions": versions(),
        "window": WINDOW,
        "draft_length": PROPOSAL_LENGTH,
        **settings,
        "goals": {name: " ".join(map(str, goal)) for name, goal in GOALS.items()},
        "streams": {stream.name: _stream(stream, runs) for stream, runs in measured},
    }


def _stream(stream: Stream, runs: Sequence[Run]) -> dict[str, Any]:
    baseline = best_baseline(runs)
    goals = figures(stream, runs)
    return {
        "kind": stream.kind,
        "requests": len(stream.requests),
        "segments": [[part.label, part.start, part.end] for part in stream.segments],
        "best_algorithm_1": baseline and baseline.recipe.name,
        "recipes": {run.recipe.name: _run(stream, run, goals.get(run.recipe.name)) for run in runs},
    }


def _run(stream: Stream, run: Run, goals: Mapping[str, float | None] | None) -> dict[str, Any]:
    agreed, overlap, runs = (run.curve(name) for name in ("agreed", "overlap", "run"))
    return {
        "config": dict(run.recipe.config),
        "acceptance": _rounded(agreed.windows()),
        "acceptance_by_quarter": _rounded(agreed.quarters()),
        "acceptance_by_segment": _rounded(agreed.rate(part.start, part.end) for part in stream.segments),
        "final_acceptance": round(agreed.final(), 4),
        "overlap": _rounded(overlap.windows()),
        "final_overlap": round(overlap.final(), 4),
        "accepted_per_round": _rounded(runs.windows()),
        "final_accepted_per_round": round(runs.final(), 4),
        "goals": None if goals is None else {name: _maybe(value) for name, value in goals.items()},
        "learned": run.result["learned"],
        "seconds": run.result["seconds"],
        "library": run.result["depends_on"]["library"],
    }


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _maybe(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def markdown(found: Mapping[str, Any]) -> str:
    """Return the tables of a document, one a stream, and what its goals came to."""
    return "\n".join(line for name, stream in found["streams"].items() for line in _table(name, stream))


def _table(name: str, stream: Mapping[str, Any]) -> Iterable[str]:
    columns = [*_parts(stream), "overlap", "accepted of 5", *_goal_headings(stream), "updates", "learning, s"]
    yield f"### {name}: {stream['requests']} requests\n"
    yield f"| acceptance (greedy agreement) | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for recipe, run in stream["recipes"].items():
        best = " (its best rate)" if recipe == stream["best_algorithm_1"] else ""
        yield f"| {recipe}{best} | {' | '.join(_cells(stream, run))} |"
    yield ""


def _parts(stream: Mapping[str, Any]) -> list[str]:
    if len(stream["segments"]) > 1:
        return [label for label, _, _ in stream["segments"]]
    return ["1st quarter", "2nd", "3rd", "last"]


def _goal_headings(stream: Mapping[str, Any]) -> list[str]:
    return [_HEADINGS[name] for name in _goal_names(stream)]


def _goal_names(stream: Mapping[str, Any]) -> list[str]:
    present = {name for run in stream["recipes"].values() for name in run["goals"] or ()}
    return [name for name in GOALS if name in present]


def _cells(stream: Mapping[str, Any], run: Mapping[str, Any]) -> Iterable[str]:
    several = len(stream["segments"]) > 1
    yield from (f"{rate:.3f}" for rate in run["acceptance_by_segment" if several else "acceptance_by_quarter"])
    yield f"{run['final_overlap']:.3f}"
    yield f"{run['final_accepted_per_round']:.2f}"
    for name in _goal_names(stream):
        yield _goal_cell(name, run["goals"])
    yield str(run["learned"]["updates"])
    yield f"{run['learned']['seconds']:.0f}"


def _goal_cell(name: str, goals: Mapping[str, float | None] | None) -> str:
    if goals is None or name not in goals:
        return ""
    value = goals[name]
    text = "never" if value is None else f"{value:.2f}" if name.startswith("share") else f"{value:+.3f}"
    return f"**{text}**" if met(name, value) else text


def summary(found: Mapping[str, Any]) -> str:
    """Return one line a recipe: the worst figure of each goal over all streams, and where."""
    lines = ["### The goals, each at its worst stream\n", f"| | {' | '.join(_HEADINGS.values())} |", "|---" * 5 + "|"]
    names = {name: None for stream in found["streams"].values() for name in stream["recipes"]}  # in order, once
    rows = {recipe: [_worst(found, recipe, goal) for goal in GOALS] for recipe in names}
    lines += [f"| {recipe} | {' | '.join(cells)} |" for recipe, cells in rows.items() if any(cells)]
    return "\n".join(lines)


def _worst(found: Mapping[str, Any], recipe: str, goal: str) -> str:
    values = [
        (run["goals"][goal], name)
        for name, stream in found["streams"].items()
        if (run := stream["recipes"].get(recipe)) and goal in (run["goals"] or {})
    ]
    if not values:
        return ""
    sign = -1.0 if GOALS[goal][0] == "<=" else 1.0
    value, where = min(values, key=lambda pair: float("-inf") if pair[0] is None else sign * pair[0])
    return f"{_goal_cell(goal, {goal: value})} ({where})"


def compact(value: Any, indent: str = "") -> str:
    """Return JSON with a line for each entry of an object, and each list on its line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    lines = [f"{indent}  {json.dumps(key)}: {compact(one, indent + '  ')}" for key, one in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
