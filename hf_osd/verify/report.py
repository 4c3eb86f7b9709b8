"""Prints a verification: a table, and a verdict in words."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from .results import Outcome, Verification

_SHOWN = 10  # differences that are listed, at most


def print_verification(console: Console, found: Verification) -> None:
    """
    Print what differs, and why.

    Args:
        console (`Console`): Where to print.
        found (`Verification`): A finished verification.
    """
    console.print(_table(found))
    for line in verdict(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def verdict(found: Verification) -> Iterator[str]:
    """Say in words what rounding is here, whether it explains what differs, and what was not speculated on."""
    yield (
        f"Rounding alone moves the target's two best tokens by up to {found.rounding:.3g} against each other: in one "
        "pass or in a batch, instead of token by token."
    )
    ours = {name: one for name, one in found.outcomes.items() if one.is_ours}
    for name, one in ours.items():
        for reason, outputs in one.fallbacks.items():
            yield f"{name} wrote {outputs} of {found.requests} outputs without draft or speculation: {reason}."
    if not any(one.differences for one in ours.values()):
        yield "All outputs of hf_osd equal those of generate."
    elif found.is_lossless:
        yield "Rounding explains every output of hf_osd that differs."
    else:
        yield "Outputs of hf_osd are NOT the target's own:"
        yield from _unexplained(found, ours)


def _unexplained(found: Verification, ours: dict[str, Outcome]) -> Iterator[str]:
    lines = [
        f"  {name}, request {one.request}, token {one.position}: "
        + ("no such output of the target" if one.gap is None else f"{one.gap:.3g} below the best token")
        for name, outcome in ours.items()
        for one in found.unexplained(outcome)
    ]
    yield from lines[:_SHOWN]
    if len(lines) > _SHOWN:
        yield f"  and {len(lines) - _SHOWN} more"


def _table(found: Verification) -> Table:
    table = Table(title=f"{found.dtype}: {found.requests} greedy outputs against generate, one prompt at a time")
    table.add_column("decoding")
    for heading in ("differ", "largest gap", "outside", "tokens/pass"):
        table.add_column(heading, justify="right")
    for name, one in found.outcomes.items():
        per_pass = "" if one.tokens_per_pass is None else f"{one.tokens_per_pass:.2f}"
        gap = "-" if one.largest_gap is None else f"{one.largest_gap:.3g}"
        table.add_row(name, str(len(one.differences)), gap, str(len(found.unexplained(one))), per_pass)
    return table
