"""The results on the terminal, made from the same JSON as the plots."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_OVER = ("over plain", "over assisted", "over assisted, best")  # headings, in the order of the figures


def print_result(console: Console, suite: str, figures: dict[str, Any]) -> None:
    """Print the tables of one suite."""
    for table in _TABLES[suite](figures):
        console.print(table)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=escape(title))  # the name of a file may look like markup
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _serving(figures: dict[str, Any]) -> Iterator[Table]:
    told = ("acceptance", "lookup_acceptance", "tokens_per_pass", "engine_efficiency")
    for name, stream in figures["streams"].items():
        over = dict(zip(stream["speedup_over"], _OVER, strict=False))
        columns = ("ms/token", "total s", *over.values(), "accepted", "lookups", "tokens/pass", "efficiency")
        table = _table(f"serving: {name}", "contender", *columns)
        for contender, one in stream["contenders"].items():
            table.add_row(
                contender,
                _number(one["ms_per_token"]),
                _number(one["total_seconds"], 1),
                *(f"{stream['speedup_over'][key][contender]:.2f}x" for key in over),
                *(_number(one[key]) for key in told),
            )
        left_out = stream.get("peers", {}).get("left_out", {})
        table.caption = escape("\n".join(f"{peer} is left out: {reason}" for peer, reason in left_out.items())) or None
        yield table


def _engine(figures: dict[str, Any]) -> Iterator[Table]:
    for axis, points in figures["axes"].items():
        names = list(dict.fromkeys(name for point in points for name in point["contenders"]))
        stages = list(points[0]["round_ms"]) if points else []
        headings = (*(f"efficiency, {name}" for name in names), *(f"{stage}, ms" for stage in stages))
        table = _table(f"engine: by {axis.replace('_', ' ')}", axis.replace("_", " "), *headings, "plain / generate")
        for point in points:
            found = point["contenders"]
            table.add_row(
                str(point[axis]),
                *(_number(found[name]["engine_efficiency"]) if name in found else "" for name in names),
                *(_number(point["round_ms"][stage], 3) for stage in stages),
                _number(point["plain_over_generate"], 3),
            )
        yield table


def _lengths(figures: dict[str, Any]) -> Iterator[Table]:
    for name, stream in figures["streams"].items():
        table = _table(
            f"draft lengths: {name}", "schedule", "ms/token", "total s", "over best fixed", "accepted", "lookups"
        )
        for schedule, one in stream["contenders"].items():
            table.add_row(
                f"fixed {schedule}" if schedule.isdigit() else schedule,
                _number(one["ms_per_token"]),
                _number(one["total_seconds"], 1),
                _number(stream["total_time_over_best_fixed_length"][schedule], 3),
                _number(one["acceptance"]),
                _number(one["lookup_acceptance"]),
            )
        yield table


def _promise(figures: dict[str, Any]) -> Iterator[Table]:
    columns = ("over plain", "with learning", "plain again", "plain / generate", "kept")
    table = _table(f"promise: at most {figures['limit']} times our plain decoding", "case", *columns)
    for name, case in figures["cases"].items():
        values = (case[key] for key in ("ratio", "ratio_with_learning", "control", "plain_over_generate"))
        table.add_row(name, *(_number(value, 3) for value in values), "yes" if case["kept"] else "NO")
    yield table


_TABLES: dict[str, Callable[[dict[str, Any]], Iterator[Table]]] = {
    "serving": _serving,
    "engine": _engine,
    "lengths": _lengths,
    "promise": _promise,
}
