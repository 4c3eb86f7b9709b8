"""The run on the terminal: a live panel where there is one, plain lines where the output goes elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..evaluation.contenders import Sample
from ..evaluation.race import Race, total
from .results import CONTENDERS, ONLINE, PLAIN, RECALLING, WINDOW, mismatches, moving

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60  # characters of a sparkline


@contextmanager
def open_display(console: Console, requests: int) -> Iterator[Callable[[Race], None]]:
    """Yield what shows that a race has one more round: a live panel on a terminal, lines elsewhere."""
    if console.is_terminal:
        with _live(console, requests) as on_round:
            yield on_round
    else:
        yield partial(_print_line, console, requests)


def _print_line(console: Console, requests: int, race: Race) -> None:
    """Print a line every few requests."""
    done = len(race.rounds)
    if done % max(1, requests // 10) == 0 or done == requests:
        console.print(f"{done}/{requests} requests | {_line(race)}", highlight=False, soft_wrap=True)


@contextmanager
def _live(console: Console, requests: int) -> Iterator[Callable[[Race], None]]:
    """Redraw a panel in place: progress, acceptance over time, and the speed of each contender."""
    columns = (TextColumn("requests"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns)
    task = progress.add_task("requests", total=requests)
    with Live(_panel(progress, Race()), console=console, refresh_per_second=4) as live:

        def on_round(race: Race) -> None:
            progress.update(task, completed=len(race.rounds))
            live.update(_panel(progress, race))

        yield on_round


def _panel(progress: Progress, race: Race) -> RenderableType:
    if not race.rounds:
        return Panel(Group(progress, Text("warming up ...", style="dim")), title="hf_osd demo")
    parts = (progress, _acceptance_lines(race), _speed_table(race), Text(_footer(race), style="dim"))
    return Panel(Group(*parts), title="hf_osd demo")


def _line(race: Race) -> str:
    recent = {name: total(race.rounds[-WINDOW:], name) for name in CONTENDERS}
    speeds = ", ".join(f"{name} {recent[name].tokens_per_second:.0f}" for name in CONTENDERS)
    static, online = (percent(recent[name].acceptance) for name in (RECALLING, ONLINE))
    return f"acceptance {static} static, {online} online | tokens/s: {speeds} | {_footer(race)}"


def _acceptance_lines(race: Race) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    for name, style in ((RECALLING, "yellow"), (ONLINE, "green")):
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
