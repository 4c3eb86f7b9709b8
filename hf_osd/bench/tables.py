"""The results on the terminal, made from the same JSON as the plots."""

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

_OVER = ("over plain", "over assisted", "over assisted, best")  # headings, in the order of the figures
_TOLD = {
    "acceptance": "accepted",
    "lookup_acceptance": "lookups",
    "tokens_per_pass": "tokens/pass",
    "engine_efficiency": "efficiency",
}


def make_table(title: str, first: str, *columns: str) -> Table:
    """Return a table whose first column is of words, and the others of numbers."""
    table = Table(title=escape(title))  # the name of a file may look like markup
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def number(value: float | None, digits: int = 2) -> str:
    """Write a number; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def serving(figures: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of the suite `serving`, one a stream; figures that nobody has get no column."""
    for name, stream in figures["streams"].items():
        found = stream["contenders"]
        told = [key for key in _TOLD if any(key in one for one in found.values())]
        over = dict(zip(stream["speedup_over"], _OVER, strict=False))
        columns = ("ms/token", "total s", *over.values(), *(_TOLD[key] for key in told))
        table = make_table(f"serving: {name}", "contender", *columns)
        for contender, one in found.items():
            table.add_row(
                contender,
                number(one["ms_per_token"]),
                number(one["total_seconds"], 1),
                *(f"{stream['speedup_over'][key][contender]:.2f}x" for key in over),
                *(number(one[key]) for key in told),
            )
        yield table
