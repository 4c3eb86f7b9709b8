"""What remains of a run: the closing table, a JSON of all figures, and the verdict on losslessness."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .display import percent
from .environment import machine, versions
from .results import CONTENDERS, ONLINE, PLAIN, STATIC, Aggregate, DemoResult, Difference, Round, aggregate


def print_report(console: Console, result: DemoResult, *, sample: bool) -> None:
    """
    Print what the run found.

    Args:
        console (`Console`): Where to print.
        result (`DemoResult`): A finished run.
        sample (`bool`): Whether outputs were sampled, and so could not be compared.
    """
    console.print(_acceptance_table(result))
    console.print(_speed_table(result))
    learner = aggregate(result.rounds, ONLINE)
    console.print(
        f"Updates of the online draft: {learner.updates}. Learning took {learner.learning_seconds:.1f} s beside "
        f"{learner.seconds:.1f} s of serving: 'serving' leaves it out, '+ learning' counts it in.",
        highlight=False,
    )
    if result.stopped_early:
        console.print(f"The time budget ended the run after {len(result.rounds)} requests.")
    for line in verdict(result, sample=sample):
        console.print(line, highlight=False)


def verdict(result: DemoResult, *, sample: bool) -> list[str]:
    """Say in words whether every output was the target's own."""
    if sample:
        return ["Outputs were sampled, so they are not compared token for token."]
    count = len(result.rounds)
    ties = [item for item in result.differences if item.near_tie]
    lines = [f"All {2 * count} outputs of hf_osd equal the target's own."]
    if result.mismatches:
        lines = [f"{len(result.mismatches)} of {2 * count} outputs of hf_osd are NOT the target's own:"]
        lines += [_describe(item) for item in result.mismatches]
    elif any(item.contender in (STATIC, ONLINE) for item in ties):
        lines = [
            f"All {2 * count} outputs of hf_osd equal the target's own, but for near ties of its best two tokens:"
        ]
    return lines + [_describe(item) for item in ties]


def _describe(item: Difference) -> str:
    kind = "near tie" if item.near_tie else "mismatch"
    return f"  request {item.request}, {item.contender}, token {item.position}: {kind}, logits {item.gap:.1e} apart"


def _acceptance_table(result: DemoResult) -> Table:
    table = Table(title="Acceptance: share of the drafted tokens judged by the target that it accepted")
    table.add_column("draft")
    for title in ("first quarter", "last quarter", "change", "whole run", "tokens per target pass"):
        table.add_column(title, justify="right")
    for name in (STATIC, ONLINE):
        first, last = aggregate(result.quarter(1), name), aggregate(result.quarter(4), name)
        whole, per_pass = aggregate(result.rounds, name), last.tokens_per_pass
        change = _signed(last.acceptance, first.acceptance)
        shares = (percent(first.acceptance), percent(last.acceptance), change, percent(whole.acceptance))
        table.add_row(name, *shares, "-" if per_pass is None else f"{per_pass:.2f}")
    firsts, lasts = ([aggregate(result.quarter(q), name).acceptance for name in (ONLINE, STATIC)] for q in (1, 4))
    table.add_section()
    table.add_row("gain", _signed(*firsts), _signed(*lasts), "", _gain(result), "")
    return table


def _gain(result: DemoResult) -> str:
    return _signed(*(aggregate(result.rounds, name).acceptance for name in (ONLINE, STATIC)))


def _signed(one: float | None, other: float | None) -> str:
    return "-" if one is None or other is None else f"{one - other:+.2f}".replace("0.", ".", 1)


def _speed_table(result: DemoResult) -> Table:
    table = Table(title="Tokens per second (and speed-up over plain decoding)")
    table.add_column("decoding")
    for title in ("whole run", "last quarter"):
        table.add_column(title, justify="right")
    for label, name, learning in _speed_rows():
        cells = [_speed(rounds, name, learning) for rounds in (result.rounds, result.quarter(4))]
        table.add_row(label, *cells, style="bold" if name == ONLINE else None)
    return table


def _speed_rows() -> list[tuple[str, str, bool]]:
    rows = [(name, name, False) for name in CONTENDERS if name != ONLINE]
    return [*rows, (f"{ONLINE}, serving", ONLINE, False), (f"{ONLINE}, serving + learning", ONLINE, True)]


def _speed(rounds: Sequence[Round], name: str, learning: bool) -> str:
    one, plain = aggregate(rounds, name), aggregate(rounds, PLAIN).tokens_per_second
    speed = one.tokens_per_second_with_learning if learning else one.tokens_per_second
    return f"{speed:.0f} ({speed / plain:.2f}x)" if plain else f"{speed:.0f}"


def to_json(result: DemoResult, about: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return all figures of a run. No prompt and no output is among them.

    Args:
        result (`DemoResult`): A finished run.
        about (`Mapping[str, Any]`): What was run: command, models, settings.
    """
    stretches = {"whole_run": result.rounds, "first_quarter": result.quarter(1), "last_quarter": result.quarter(4)}
    return {
        "about": {**about, "machine": machine(), "versions": versions()},
        "stopped_early": result.stopped_early,
        "mismatches": len(result.mismatches),
        "differences": [asdict(item) for item in result.differences],
        "summary": {
            stretch: {name: _figures(aggregate(rounds, name)) for name in CONTENDERS}
            for stretch, rounds in stretches.items()
        },
        "requests": [{name: asdict(one.measures[name]) for name in CONTENDERS} for one in result.rounds],
    }


def _figures(one: Aggregate) -> dict[str, float | None]:
    return asdict(one) | {
        "acceptance": one.acceptance,
        "tokens_per_target_pass": one.tokens_per_pass,
        "tokens_per_second": one.tokens_per_second,
        "tokens_per_second_with_learning": one.tokens_per_second_with_learning,
    }


def write_json(result: DemoResult, about: Mapping[str, Any], path: Path) -> None:
    """Write `to_json` to a file."""
    path.write_text(json.dumps(to_json(result, about), indent=1) + "\n", encoding="utf-8")


def run_paths(output: Path) -> tuple[Path, Path]:
    """Make the output folder, and return where this run's JSON and PNG go: two runs never share a name."""
    output.mkdir(parents=True, exist_ok=True)
    stem = datetime.now(UTC).strftime("demo-%Y%m%d-%H%M%S-%f")
    return output / f"{stem}.json", output / f"{stem}.png"
