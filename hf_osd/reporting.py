"""Reports of what an assistant did and learned: a JSON and a picture, without texts or tokens."""

import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from transformers.utils import logging

from .errors import InputError
from .journal import Decision, Journal, JudgedRequest, UpdateRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["mean_acceptance", "moving_acceptance", "to_json", "write_report"]

logger = logging.get_logger(__name__)

_WINDOW = 50  # requests of the moving average
_STYLES = {
    "published": ("o", "tab:green"),
    "held": ("s", "0.6"),
    "rolled back": ("X", "tab:red"),
    "restored": ("D", "tab:purple"),
    "failed": ("*", "black"),
}


class Stats(Protocol):
    """What a report takes from [`OnlineStats`]."""

    def to_dict(self) -> Mapping[str, Any]:
        """Return all counters and rates."""
        ...


def write_report(
    journal: Journal, stats: Stats, directory: str | Path, *, window: int = _WINDOW, plot: bool = True
) -> list[Path]:
    """
    Write `report.json` and `report.png`, over those of an earlier report in the same folder.

    The picture shows how many prompts were served without speculation and why, acceptance by request, the updates by
    what became of them, the acceptance gained by what went live, the learning rate, and when the traffic
    changed. The files hold counts, rates and reasons; no prompt, no output, no token.

    Args:
        journal (`Journal`): What learning did.
        stats (`OnlineStats`): The assistant's counters.
        directory (`str` or `Path`): Made if missing.
        window (`int`, defaults to 50): Requests of the moving average.
        plot (`bool`, defaults to `True`): Whether to draw. Without matplotlib, only the JSON is written, with a
            warning in the log.

    Returns:
        `list[Path]`: The files written, the JSON first.

    Raises:
        InputError: `window` is below 1, or `directory` is a file.
        OSError: The files cannot be written.
    """
    if not isinstance(window, int) or window < 1:
        raise InputError(f"window must be an integer of at least 1, got {window!r}")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: a report goes into a folder")
    directory.mkdir(parents=True, exist_ok=True)
    document = to_json(journal, stats, window)
    written = [_write_json(document, directory / "report.json")]
    if plot and find_spec("matplotlib") is None:
        logger.warning('There is no report.png, which needs matplotlib: pip install "hf-osd[plot]", or plot=False.')
    elif plot:
        written.append(_write_plot(journal, directory / "report.png", window, _fallbacks(stats)))
    return written


def to_json(journal: Journal, stats: Stats, window: int = _WINDOW) -> dict[str, Any]:
    """
    Return the report as plain data.

    Args:
        journal (`Journal`): What learning did.
        stats (`OnlineStats`): The assistant's counters.
        window (`int`, defaults to 50): Requests at either end whose acceptance goes into the summary.

    Returns:
        `dict[str, Any]`: `about`, `stats`, `summary`, and the journal's `requests`, `updates` and `drifts`. Numbers
        that are not finite are `None`: JSON has no others.
    """
    requests, decisions = journal.requests, Counter(update.decision for update in journal.updates)
    summary = {
        "window": window,
        "acceptance_first": mean_acceptance(requests[:window]),
        "acceptance_last": mean_acceptance(requests[-window:]),
        "decisions": {decision: decisions[decision] for decision in get_args(Decision)},
        "drifts": len(journal.drifts),
    }
    about = {"written": datetime.now(UTC).isoformat(timespec="seconds")}
    document = {"about": about, "stats": dict(stats.to_dict()), "summary": summary, **journal.to_dict()}
    return {name: _finite(value) for name, value in document.items()}


def mean_acceptance(requests: Sequence[JudgedRequest]) -> float | None:
    """Return the share of all their positions where the draft chose as the target did; `None` without any."""
    positions = sum(request.positions for request in requests)
    return sum(request.acceptance * request.positions for request in requests) / positions if positions else None


def moving_acceptance(requests: Sequence[JudgedRequest], window: int) -> list[float]:
    """
    Return, for each request, the acceptance over all positions of the last `window` requests, itself included.

    Args:
        requests (`Sequence[JudgedRequest]`): Oldest first.
        window (`int`): At least 1; there are fewer at the beginning.
    """
    return [mean_acceptance(last) or 0.0 for last in _windows(requests, window)]


def _windows(requests: Sequence[JudgedRequest], window: int) -> Iterator[deque[JudgedRequest]]:
    last: deque[JudgedRequest] = deque(maxlen=window)
    for request in requests:
        last.append(request)
        yield last


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _write_json(document: Mapping[str, Any], path: Path) -> Path:
    whole = path.with_suffix(".json.part")  # a reader never finds half a file
    whole.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    whole.replace(path)
    return path


def _fallbacks(stats: Stats) -> str:
    """Say in a line how many prompts fell back, and why, most frequent first."""
    counted: Mapping[str, Any] = stats.to_dict()
    reasons = sorted(counted.get("fallback_reasons", {}).items(), key=lambda item: -item[1])
    if not reasons:
        return ""
    named = ", ".join(f"{reason} ({count})" for reason, count in reasons)
    return f"{counted['fallbacks']} of {counted['requests']} prompts without draft or speculation: {named}"


def _write_plot(journal: Journal, path: Path, window: int, title: str) -> Path:
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=(10, 9), layout="constrained")
    figure.suptitle(title, fontsize="small", wrap=True)
    panels = figure.subplots(4, 1, sharex=True, height_ratios=(4, 1.6, 2, 1.6))
    _draw_acceptance(panels[0], journal, window)
    _draw_decisions(panels[1], journal.updates)
    _draw_gain(panels[2], journal.updates)
    _draw_learning_rate(panels[3], journal.updates)
    for axes in panels:
        axes.grid(alpha=0.3)
        for drift in journal.drifts:
            axes.axvline(drift.request, color="tab:red", linestyle=":", linewidth=1)
    panels[-1].set_xlabel("requests")
    _save(figure, path)
    return path


def _save(figure: "Figure", path: Path) -> None:
    whole = path.with_suffix(".png.part")
    figure.savefig(whole, dpi=150, format="png")
    whole.replace(path)


def _draw_acceptance(axes: "Axes", journal: Journal, window: int) -> None:
    requests = journal.requests
    numbers = [request.request for request in requests]
    axes.set_title("Acceptance: positions where the draft chose as the target did", fontsize="small")
    shares = [request.acceptance for request in requests]
    axes.plot(numbers, shares, ".", color="tab:blue", alpha=0.25, label="request")
    average = moving_acceptance(requests, window)
    axes.plot(numbers, average, color="tab:blue", label=f"moving average over {window}")
    if journal.drifts:
        axes.plot([], [], ":", color="tab:red", label="the traffic changed")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize="x-small")


def _draw_decisions(axes: "Axes", updates: Sequence[UpdateRecord]) -> None:
    axes.set_title("Updates, and what became of them", fontsize="small")
    for decision, chosen in _by_decision(updates):
        places = [update.request for update in chosen]
        label = f"{decision} ({len(chosen)})"
        marker, colour = _STYLES[decision]
        axes.plot(places, [label] * len(places), marker, color=colour, markersize=4)
    axes.margins(y=0.3)
    axes.tick_params(axis="y", labelsize="x-small")


def _draw_gain(axes: "Axes", updates: Sequence[UpdateRecord]) -> None:
    axes.set_title("Acceptance gained by what went live, on the latest requests", fontsize="small")
    for decision, chosen in _by_decision(updates):
        measured = [(one.request, one.gain) for one in chosen if one.gain is not None]
        if measured:
            places, gains = zip(*measured, strict=True)
            marker, colour = _STYLES[decision]
            axes.plot(places, gains, marker, color=colour, markersize=4)
    axes.axhline(0.0, color="0.3", linewidth=0.8)


def _draw_learning_rate(axes: "Axes", updates: Sequence[UpdateRecord]) -> None:
    axes.set_title("Learning rate of the last step", fontsize="small")
    known = [(update.request, update.learning_rate) for update in updates if update.learning_rate]
    axes.plot([place for place, _ in known], [rate for _, rate in known], ".-", color="tab:brown", linewidth=0.8)
    if known:
        axes.set_yscale("log")


def _by_decision(updates: Sequence[UpdateRecord]) -> Iterator[tuple[str, list[UpdateRecord]]]:
    for decision in _STYLES:
        chosen = [update for update in updates if update.decision == decision]
        if chosen:
            yield decision, chosen
