"""Pictures of the suites, made from their JSON alone, so that a committed file can be drawn again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_osd.bench.plots import Draw, draw_bars, draw_serving, write_plot
from hf_osd.config import shown
from hf_osd.errors import InputError
from hf_osd.evaluation.output import writing

from .engine import GENERATE, OURS, PLAIN, STOCK
from .results import read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STAGE_COLOURS = ("tab:orange", "tab:blue", "tab:purple", "tab:green", "0.6")


def replot(folder: Path) -> list[Path]:
    """
    Draw every result in a folder, each beside its JSON.

    Returns:
        `list[Path]`: The PNGs.

    Raises:
        InputError: There is no result in the folder, or one that cannot be drawn.
        ConfigError: The folder cannot be written to.
    """
    return [_replot(path, document) for path, document in read_results(folder)]


def _replot(path: Path, document: dict[str, Any]) -> Path:
    with writing(path.parent):
        try:
            return write_plot(document, DRAW[document["suite"]], path.with_suffix(".png"))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not figures of the suite {path.stem} ({shown(error)})") from error


def _draw_engine(figure: "Figure", figures: dict[str, Any]) -> None:
    figure.set_size_inches(11, 7)
    for column, (axis, points) in zip(figure.subplots(2, 3).T, figures["axes"].items(), strict=True):
        places = [str(point[axis]) for point in points]
        _draw_efficiency(column[0], places, points)
        _draw_rounds(column[1], places, points)
        for axes in column:
            axes.set_xlabel(axis.replace("_", " "), fontsize="small")
            axes.tick_params(labelsize="x-small")
            if axis == "batch":  # the same everywhere
                axes.legend(fontsize="x-small")


def _draw_efficiency(axes: "Axes", places: list[str], points: list[dict[str, Any]]) -> None:
    axes.set_title("engine efficiency", fontsize="small")
    for name, colour in zip(
        (GENERATE, STOCK, PLAIN, OURS), ("0.45", "tab:blue", "tab:olive", "tab:orange"), strict=True
    ):
        pairs = [
            (place, point["contenders"][name]["engine_efficiency"])
            for place, point in zip(places, points, strict=True)
            if name in point["contenders"]
        ]
        axes.plot([place for place, _ in pairs], [value for _, value in pairs], "o-", label=name, color=colour)
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_rounds(axes: "Axes", places: list[str], points: list[dict[str, Any]]) -> None:
    axes.set_title("a round of hf_osd, ms", fontsize="small")
    bottom = [0.0] * len(points)
    for stage, colour in zip(points[0]["round_ms"], _STAGE_COLOURS, strict=True):
        heights = [max(point["round_ms"][stage], 0.0) for point in points]
        axes.bar(places, heights, bottom=bottom, label=stage, color=colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def _draw_lengths(figure: "Figure", figures: dict[str, Any]) -> None:
    streams = figures["streams"]
    figure.set_size_inches(9, 0.6 + 3 * len(streams))
    for (axes,), (name, stream) in zip(figure.subplots(len(streams), 1, squeeze=False), streams.items(), strict=True):
        found = stream["contenders"]
        times = {f"fixed {key}" if key.isdigit() else key: one["ms_per_token"] for key, one in found.items()}
        draw_bars(axes, times, f"{name}: ms per token (median), hf_osd with a static draft")


def _draw_promise(figure: "Figure", figures: dict[str, Any]) -> None:
    figure.set_size_inches(9, 4)
    axes = figure.subplots()
    found = figures["cases"]
    draw_bars(axes, {name: case["ratio"] for name, case in found.items()}, "time over hf_osd's plain decoding")
    axes.plot([case["control"] for case in found.values()], range(len(found)), "k|", label="plain decoding again")
    axes.axvline(figures["limit"], color="tab:red", linewidth=0.8, label=f"the promise: {figures['limit']}")
    axes.axvline(1.0, color="0.3", linewidth=0.8)
    axes.legend(frameon=False, fontsize="x-small")


DRAW: dict[str, Draw] = {
    "serving": draw_serving,
    "engine": _draw_engine,
    "lengths": _draw_lengths,
    "promise": _draw_promise,
}
