"""A picture of which drafts are worth having: cost of a step against acceptance, with lines of equal speed-up."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingDependencyError
from .prediction import predict
from .profiles import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVELS = (1.05, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0)  # speed-ups with a line of their own
_STEPS = 60  # points of the grid for the lines, in each direction
_MARGIN = 1.5  # factor by which the axis goes beyond the fastest and the slowest candidate


@dataclass(frozen=True, slots=True)
class Candidate:
    """
    A draft in the picture.

    Attributes:
        name (`str`): What to write beside it.
        step_seconds (`float`): Time to draft one token for every row, positive.
        acceptance (`float`): Probability that a drafted token is accepted if all before it were, in [0, 1].
    """

    name: str
    step_seconds: float
    acceptance: float


def write_frontier(
    target: Profile, candidates: Sequence[Candidate], path: str | Path, *, batch: int = 1, context: int = 256
) -> Path:
    """
    Draw drafts by the cost of a step and by acceptance, and write a PNG.

    Drafts on one line serve equally fast, by [`predict`]. The cost is in passes of the target, on a logarithmic axis,
    and in milliseconds at the top.

    Args:
        target ([`Profile`]): Costs of the target's passes.
        candidates (`Sequence[Candidate]`): The drafts.
        path (`str` or `Path`): Where to write; its folder must exist.
        batch (`int`, defaults to 1): Rows.
        context (`int`, defaults to 256): Tokens of each row in the cache.

    Returns:
        `Path`: The file.

    Raises:
        InputError: There are no candidates, or one is out of its range.
        MissingDependencyError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    if not candidates:
        raise InputError("there is nothing to draw: pass at least one candidate")
    if find_spec("matplotlib") is None:
        raise MissingDependencyError('the frontier needs matplotlib: pip install "hf-osd[plot]"')
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    _draw_lines(axes, target, candidates, batch, context)
    for one in candidates:
        _draw_candidate(axes, target, one, batch, context)
    _label(axes, target.seconds(batch, context, 1))
    figure.suptitle(f"Speed-up over plain decoding: batch {batch}, context {context}", fontsize="small")
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw_lines(axes: "Axes", target: Profile, candidates: Sequence[Candidate], batch: int, context: int) -> None:
    one_pass = target.seconds(batch, context, 1)
    shares = [one.step_seconds / one_pass for one in candidates]
    low, high = min(shares) / _MARGIN, max(shares) * _MARGIN
    across = [low * (high / low) ** (i / _STEPS) for i in range(_STEPS + 1)]
    upwards = [i / _STEPS for i in range(_STEPS)]  # without 1, where the longest draft is always best
    gains = [[predict(target, x * one_pass, y, batch=batch, context=context).speedup for x in across] for y in upwards]
    axes.set_xscale("log")
    lines = axes.contour(across, upwards, gains, levels=_LEVELS, colors="0.6", linewidths=0.8)
    axes.clabel(lines, fmt="%gx", fontsize="x-small")


def _draw_candidate(axes: "Axes", target: Profile, one: Candidate, batch: int, context: int) -> None:
    gain = predict(target, one.step_seconds, one.acceptance, batch=batch, context=context).speedup
    place = (one.step_seconds / target.seconds(batch, context, 1), one.acceptance)
    axes.plot(*place, "o", color="tab:green")
    is_left = axes.transAxes.inverted().transform(axes.transData.transform(place))[0] < 0.5
    axes.annotate(
        f"{one.name} {gain:.2f}x",
        place,
        xytext=(6 if is_left else -6, 4),
        textcoords="offset points",
        ha="left" if is_left else "right",
        fontsize="small",
        parse_math=False,
    )


def _label(axes: "Axes", one_pass: float) -> None:
    """Name the axes, and show the costs in milliseconds, too."""
    from matplotlib.ticker import LogLocator, NullFormatter

    def to_ms(passes: Any) -> Any:
        return passes * (one_pass * 1e3)

    def from_ms(cost: Any) -> Any:
        return cost / (one_pass * 1e3)

    above = axes.secondary_xaxis("top", functions=(to_ms, from_ms))
    for axis in (axes.xaxis, above.xaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    above.set_xlabel("ms")
    axes.set(xlabel="a step of the draft, in passes of the target", ylabel="acceptance")
