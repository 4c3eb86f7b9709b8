"""The results of the suites on the terminal, made from the same JSON as the plots."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_osd.bench import tables
from hf_osd.bench.tables import make_table, number


def _serving(figures: dict[str, Any]) -> Iterator[Table]:
    for table, stream in zip(tables.serving(figures), figures["streams"].values(), strict=True):
        left_out = stream.get("peers", {}).get("left_out", {})
        table.caption = escape("\n".join(f"{peer} is left out: {reason}" for peer, reason in left_out.items())) or None
        yield table


def _engine(figures: dict[str, Any]) -> Iterator[Table]:
    for axis, points in figures["axes"].items():
        names = list(dict.fromkeys(name for point in points for name in point["contenders"]))
        stages = list(points[0]["round_ms"]) if points else []
        headings = (*(f"efficiency, {name}" for name in names), *(f"{stage}, ms" for stage in stages))
        table = make_table(
            f"engine: by {axis.replace('_', ' ')}", axis.replace("_", " "), *headings, "plain / generate"
        )
        for point in points:
            found = point["contenders"]
            table.add_row(
                str(point[axis]),
                *(number(found[name]["engine_efficiency"]) if name in found else "" for name in names),
                *(number(point["round_ms"][stage], 3) for stage in stages),
                number(point["plain_over_generate"], 3),
            )
        yield table


def _lengths(figures: dict[str, Any]) -> Iterator[Table]:
    for name, stream in figures["streams"].items():
        table = make_table(
            f"draft lengths: {name}", "schedule", "ms/token", "total s", "over best fixed", "accepted", "lookups"
        )
        for schedule, one in stream["contenders"].items():
            table.add_row(
                f"fixed {schedule}" if schedule.isdigit() else schedule,
                number(one["ms_per_token"]),
                number(one["total_seconds"], 1),
                number(stream["total_time_over_best_fixed_length"][schedule], 3),
                number(one["acceptance"]),
                number(one["lookup_acceptance"]),
            )
        yield table


def _promise(figures: dict[str, Any]) -> Iterator[Table]:
    columns = ("over plain", "with learning", "plain again", "plain / generate", "kept")
    table = make_table(f"promise: at most {figures['limit']} times our plain decoding", "case", *columns)
    for name, case in figures["cases"].items():
        values = (case[key] for key in ("ratio", "ratio_with_learning", "control", "plain_over_generate"))
        table.add_row(name, *(number(value, 3) for value in values), "yes" if case["kept"] else "NO")
    yield table


TABLES: dict[str, Callable[[dict[str, Any]], Iterator[Table]]] = {
    "serving": _serving,
    "engine": _engine,
    "lengths": _lengths,
    "promise": _promise,
}
