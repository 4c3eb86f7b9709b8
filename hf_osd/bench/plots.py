"""Pictures of the results, made from their JSON alone, so that a committed file can be drawn again."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("0.45", "tab:blue", "tab:cyan", "tab:purple", "tab:orange", "tab:green", "tab:red")

Draw = Callable[["Figure", dict[str, Any]], None]
"""Draws the figures of a suite."""


def write_plot(document: dict[str, Any], draw: Draw, path: Path) -> Path:
    """Draw one result as a PNG; the machine, the models and the dtype are in its title."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(layout="constrained")
    draw(figure, document["figures"])
    figure.suptitle(_title(document["about"]), fontsize="small", parse_math=False)
    figure.savefig(path, dpi=150)
    return path


def _title(about: dict[str, Any]) -> str:
    models, machine = about["models"], about["machine"]
    target, draft = (f"{models['parameters'][name] / 1e6:,.1f}M" for name in ("target", "draft"))
    where = machine.get("gpu") or f"{machine['processor']}, {about['threads']} thread(s)"
    return f"{models['kind']} pair, {target} and {draft} parameters, {models['dtype']}, on {where}"


def draw_serving(figure: "Figure", figures: dict[str, Any]) -> None:
    """Draw the milliseconds of a token, and beside them the efficiency of the engine where it was measured."""
    streams = figures["streams"]
    bars = max(len(stream["contenders"]) for stream in streams.values())
    shares = {name: _efficiencies(stream["contenders"]) for name, stream in streams.items()}
    columns = 2 if any(shares.values()) else 1
    figure.set_size_inches(5.5 * columns, 1.2 + max(2.4, 0.3 * bars) * len(streams))
    rows = figure.subplots(len(streams), columns, squeeze=False)
    for row, (name, stream) in zip(rows, streams.items(), strict=True):
        times = {key: one["ms_per_token"] for key, one in stream["contenders"].items()}
        draw_bars(row[0], times, f"{name}: ms per token (median)")
        if columns == 2:
            draw_bars(row[1], shares[name], "engine efficiency: raw forwards / wall time")
            row[1].axvline(1.0, color="0.3", linewidth=0.8)


def _efficiencies(found: dict[str, Any]) -> dict[str, float]:
    values = {key: one.get("engine_efficiency") for key, one in found.items()}
    return {key: value for key, value in values.items() if value is not None}


def draw_bars(axes: "Axes", values: dict[str, float], title: str) -> None:
    """Draw a bar for each value, the first at the top."""
    bars = axes.barh([*values], [*values.values()], color=[_COLOURS[i % len(_COLOURS)] for i in range(len(values))])
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize="x-small")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.tick_params(labelsize="x-small")
    axes.set_title(title, fontsize="small", parse_math=False)  # the name of a file may hold a dollar
