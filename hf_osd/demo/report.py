"""What remains of a run: the closing table, a JSON of all figures, and the verdict on losslessness."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..evaluation.exactness import Difference
from ..evaluation.race import Race, Round, total
from .display import percent
from .results import CONTENDERS, ONLINE, OURS, PLAIN, RECALLING, mismatches, quarter


def print_report(console: Console, race: Race, *, sample: bool) -> None:
    """
    Print what the run found.

    Args:
        console (`Console`): Where to print.
        race (`Race`): A finished run.
        sample (`bool`): Whether outputs were sampled, and so could not be compared.
    """
    console.print(_acceptance_table(race))
    console.print(_speed_table(race))
    learner = total(race.rounds, ONLINE)
    console.print(
        f"Updates of the online draft: {learner.updates}. Learning took {learner.learning_seconds:.1f} s beside "
        f"{learner.seconds:.1f} s of serving: 'serving' leaves it out, '+ learning' counts it in.",
        highlight=False,
    )
    if race.stopped_early:
        console.print(f"The time budget ended the run after {len(race.rounds)} requests.")
    for line in verdict(race, sample=sample):
        console.print(line, highlight=False)


def verdict(race: Race, *, sample: bool) -> list[str]:
    """Say in words whether every output was the target's own."""
    if sample:
        return ["Outputs were sampled, so they are not compared token for token."]
    count = len(OURS) * len(race.rounds)
    lines = [f"All {count} outputs of hf_osd equal the target's own."]
    if wrong := mismatches(race):
        lines = [f"{wrong} of {count} outputs of hf_osd are NOT the target's own:"]
        lines += [_describe(item) for item in race.mismatches if item.contender in OURS]
    elif ties := [item.gap or 0.0 for item in race.near_ties if item.contender in OURS]:
        lines = [
            f"{count - len(ties)} of {count} outputs of hf_osd equal the target's own, the others up to a near tie of "
            f"its best two tokens: logits at most {max(ties):.1e} apart."
        ]
    return lines


def _describe(item: Difference) -> str:
    apart = "no such output of the target" if item.gap is None else f"logits {item.gap:.1e} apart"
    return f"  request {item.request}, {item.contender}, token {item.position}: mismatch, {apart}"


def _acceptance_table(race: Race) -> Table:
    table = Table(title="Acceptance: share of the drafted tokens judged by the target that it accepted")
    table.add_column("draft")
    for title in ("first quarter", "last quarter", "change", "whole run", "tokens per target pass"):
        table.add_column(title, justify="right")
    for name in (RECALLING, ONLINE):
        first, last = total(quarter(race.rounds, 1), name), total(quarter(race.rounds, 4), name)
        whole, per_pass = total(race.rounds, name), last.tokens_per_pass
        change = _signed(last.acceptance, first.acceptance)
        shares = (percent(first.acceptance), percent(last.acceptance), change, percent(whole.acceptance))
        table.add_row(name, *shares, "-" if per_pass is None else f"{per_pass:.2f}")
    firsts, lasts = ([total(quarter(race.rounds, q), name).acceptance for name in (ONLINE, RECALLING)] for q in (1, 4))
    table.add_section()
    table.add_row("gain", _signed(*firsts), _signed(*lasts), "", _gain(race), "")
    return table


def _gain(race: Race) -> str:
    return _signed(*(total(race.rounds, name).acceptance for name in (ONLINE, RECALLING)))


def _signed(one: float | None, other: float | None) -> str:
    return "-" if one is None or other is None else f"{one - other:+.2f}".replace("0.", ".", 1)


def _speed_table(race: Race) -> Table:
    table = Table(title="Tokens per second (and speed-up over plain decoding)")
    table.add_column("decoding")
    for title in ("whole run", "last quarter"):
        table.add_column(title, justify="right")
    for label, name, learning in _speed_rows():
        cells = [_speed(rounds, name, learning) for rounds in (race.rounds, quarter(race.rounds, 4))]
        table.add_row(label, *cells, style="bold" if name == ONLINE else None)
    return table


def _speed_rows() -> list[tuple[str, str, bool]]:
    rows = [(name, name, False) for name in CONTENDERS if name != ONLINE]
    return [*rows, (f"{ONLINE}, serving", ONLINE, False), (f"{ONLINE}, serving + learning", ONLINE, True)]


def _speed(rounds: Sequence[Round], name: str, learning: bool) -> str:
    one, plain = total(rounds, name), total(rounds, PLAIN).tokens_per_second
    speed = one.tokens_per_second_with_learning if learning else one.tokens_per_second
    return f"{speed:.0f} ({speed / plain:.2f}x)" if plain else f"{speed:.0f}"


def to_json(race: Race, about: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return all figures of a run. No prompt and no output is among them.

    Args:
        race (`Race`): A finished run.
        about (`Mapping[str, Any]`): What was run, and where, as [`~hf_osd.evaluation.output.about`] says it.
    """
    rounds = race.rounds
    stretches = {"whole_run": rounds, "first_quarter": quarter(rounds, 1), "last_quarter": quarter(rounds, 4)}
    return {
        "about": dict(about),
        "stopped_early": race.stopped_early,
        "mismatches": mismatches(race),
        "rounding": race.rounding,
        "differences": [asdict(item) for item in race.differences],
        "summary": {
            stretch: {name: _figures(some, name) for name in CONTENDERS} for stretch, some in stretches.items()
        },
        "requests": [{name: asdict(one[name]) for name in CONTENDERS} for one in rounds],
    }


def _figures(rounds: Sequence[Round], name: str) -> dict[str, Any]:
    one = total(rounds, name)
    figures = {"requests": len(rounds), **asdict(one)}
    del figures["stages"]  # they are of single requests
    return figures | {
        "acceptance": one.acceptance,
        "tokens_per_target_pass": one.tokens_per_pass,
        "tokens_per_second": one.tokens_per_second,
        "tokens_per_second_with_learning": one.tokens_per_second_with_learning,
    }


def run_paths(output: Path) -> tuple[Path, Path]:
    """Make the output folder, and return where this run's JSON and PNG go: two runs never share a name."""
    output.mkdir(parents=True, exist_ok=True)
    stem = datetime.now(UTC).strftime("demo-%Y%m%d-%H%M%S-%f")
    return output / f"{stem}.json", output / f"{stem}.png"
