"""The run as a picture: acceptance and speed over the requests."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.race import Race
from .results import CONTENDERS, ONLINE, PLAIN, RECALLING, STATIC, STOCK, WINDOW, moving

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {PLAIN: "0.45", STOCK: "tab:blue", STATIC: "tab:orange", RECALLING: "tab:red", ONLINE: "tab:green"}


def write_plot(race: Race, path: Path) -> None:
    """Draw acceptance (beside the same lookup) and speed (all contenders) as moving averages, and write a PNG."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_acceptance(left, race)
    _draw_speed(right, race)
    for axes in (left, right):
        axes.set_xlabel(f"requests (moving average over {WINDOW})")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_acceptance(axes: "Axes", race: Race) -> None:
    axes.set_title("Drafted tokens accepted")
    for name in (RECALLING, ONLINE):
        shares = [one.acceptance or 0.0 for one in moving(race.rounds, name)]
        axes.plot(range(1, len(shares) + 1), shares, label=name, color=_COLOURS[name])


def _draw_speed(axes: "Axes", race: Race) -> None:
    axes.set_title("Tokens per second")
    for name in CONTENDERS:
        curve = moving(race.rounds, name)
        label = f"{name}, serving" if name == ONLINE else name
        requests = range(1, len(curve) + 1)
        axes.plot(requests, [one.tokens_per_second for one in curve], label=label, color=_COLOURS[name])
        if name == ONLINE:
            total = [one.tokens_per_second_with_learning for one in curve]
            axes.plot(requests, total, label=f"{name}, serving + learning", color=_COLOURS[name], linestyle="--")
