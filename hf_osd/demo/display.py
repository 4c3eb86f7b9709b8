"""The run on the terminal: a live panel where there is one, plain lines where the output goes elsewhere."""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..evaluation.contenders import Sample
from ..evaluation.race import Race, total
from .results import CONTENDERS, ONLINE, PLAIN, STATIC, WINDOW, mismatches, moving

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60  # characters of a sparkline


class Display(AbstractContextManager["Display"], Protocol):
    """An observer that is open for the length of a run."""

    def on_round(self, race: Race) -> None:
        """Show that `race` has one more round."""
        ...


def open_display(console: Console, requests: int) -> Display:
    """Return the display that suits the console: live on a terminal, lines elsewhere."""
    return LiveDisplay(console, requests) if console.is_terminal else LineDisplay(console, requests)


class LineDisplay:
    """
    One line every few requests.

    Args:
        console (`Console`): Where to print.
        requests (`int`): Requests of the whole run.
    """

    def __init__(self, console: Console, requests: int) -> None:
        self._console = console
        self._requests = requests
        self._every = max(1, requests // 10)

    def on_round(self, race: Race) -> None:
        """Print a line if it is time for one."""
        done = len(race.rounds)
        if done % self._every == 0 or done == self._requests:
            self._console.print(f"{done}/{self._requests} requests | {_line(race)}", highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave nothing behind."""


class LiveDisplay:
    """
    A panel that is redrawn in place: progress, acceptance over time, and the speed of each contender.

    Args:
        console (`Console`): A terminal.
        requests (`int`): Requests of the whole run.
    """

    def __init__(self, console: Console, requests: int) -> None:
        self._progress = Progress(
            TextColumn("requests"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._progress.add_task("requests", total=requests)
        self._live = Live(self._draw(Race()), console=console, refresh_per_second=4)

    def on_round(self, race: Race) -> None:
        """Redraw."""
        self._progress.update(self._task, completed=len(race.rounds))
        self._live.update(self._draw(race))

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._live.__exit__(kind, value, trace)

    def _draw(self, race: Race) -> RenderableType:
        if not race.rounds:
            return Panel(Group(self._progress, Text("warming up ...", style="dim")), title="hf_osd demo")
        parts = [self._progress, _acceptance_lines(race), _speed_table(race), Text(_footer(race), style="dim")]
        return Panel(Group(*parts), title="hf_osd demo")


def _line(race: Race) -> str:
    recent = {name: total(race.rounds[-WINDOW:], name) for name in CONTENDERS}
    speeds = ", ".join(f"{name} {recent[name].tokens_per_second:.0f}" for name in CONTENDERS)
    static, online = (percent(recent[name].acceptance) for name in (STATIC, ONLINE))
    return f"acceptance {static} static, {online} online | tokens/s: {speeds} | {_footer(race)}"


def _acceptance_lines(race: Race) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    for name, style in ((STATIC, "yellow"), (ONLINE, "green")):
        curve = moving(race.rounds, name)
        grid.add_row(
            f"acceptance, {name}",
            Text(sparkline([one.acceptance or 0.0 for one in curve]), style=style),
            percent(curve[-1].acceptance),
        )
    return grid


def _speed_table(race: Race) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"last {WINDOW} requests")
    for title in ("tokens/s", "speed-up"):
        table.add_column(title, justify="right")
    recent = {name: total(race.rounds[-WINDOW:], name) for name in CONTENDERS}
    for name in CONTENDERS:
        table.add_row(name, f"{recent[name].tokens_per_second:.0f}", _speed_up(recent[name], recent[PLAIN]))
    return table


def _footer(race: Race) -> str:
    whole = total(race.rounds, ONLINE)
    return (
        f"updates: {whole.updates} ({whole.learning_seconds:.1f} s of learning, not in tokens/s), "
        f"mismatches: {mismatches(race)}"
    )


def _speed_up(one: Sample, plain: Sample) -> str:
    return f"{one.tokens_per_second / plain.tokens_per_second:.2f}x" if plain.tokens_per_second else "-"


def percent(share: float | None) -> str:
    """Write a share as `.57`, or `-` where there is none."""
    return "-" if share is None else f"{share:.2f}".replace("0.", ".", 1)


def sparkline(values: list[float], width: int = _WIDTH) -> str:
    """Draw shares in [0, 1] as a row of bars, the newest at the right, thinned out to `width` characters."""
    columns = min(len(values), width)
    chosen = [values[(column + 1) * len(values) // columns - 1] for column in range(columns)]
    return "".join(_BARS[min(len(_BARS) - 1, int(value * len(_BARS)))] for value in chosen)
