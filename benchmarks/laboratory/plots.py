"""Acceptance by request, drawn from a document alone: one panel a stream, one line a recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipes import BASELINE, OFFLINE, STATIC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 2
_STYLES: dict[str, dict[str, Any]] = {
    STATIC: {"color": "0.45", "linestyle": "--"},
    OFFLINE: {"color": "0.45", "linestyle": ":"},
    BASELINE: {"color": "tab:orange"},
    "defaults": {"color": "tab:green", "linewidth": 2.0},
}


def write_plot(found: Mapping[str, Any], path: Path) -> None:
    """Draw a document of `report.py` as a PNG; of Algorithm 1, its best learning rate on each stream."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    streams = found["streams"]
    rows = -(-len(streams) // _COLUMNS)
    figure = Figure(figsize=(6 * min(len(streams), _COLUMNS), 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, min(len(streams), _COLUMNS), squeeze=False).flatten()
    for axes, (name, stream) in zip(panels, streams.items(), strict=False):
        _draw(axes, name, stream, found["window"])
    for axes in panels[len(streams) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def _draw(axes: "Axes", name: str, stream: Mapping[str, Any], window: int) -> None:
    for recipe, run in stream["recipes"].items():
        family = recipe.partition("@")[0]
        if family == BASELINE and recipe != stream["best_algorithm_1"]:
            continue
        ends = [min((i + 1) * window, stream["requests"]) for i in range(len(run["acceptance"]))]
        axes.plot(ends, run["acceptance"], label=recipe, **_STYLES.get(family, {}))
    for label, start, _ in stream["segments"] if len(stream["segments"]) > 1 else ():
        axes.axvline(start, color="0.8", linewidth=0.8, zorder=0)
        axes.annotate(label, (start, 0.98), xycoords=("data", "axes fraction"), fontsize="x-small", va="top")
    axes.set_title(f"{name}: acceptance, windows of {window} requests", fontsize="small")
    axes.set_xlabel("requests", fontsize="small")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="x-small")
