"""
Build the smallest model of each family, try it as a target and as a draft, and keep which way each is served.

    python -m benchmarks.families                    # all rows, then benchmarks/results/families.json and the docs
    python -m benchmarks.families "^Llama" mamba     # rows whose names match; printed, and kept nowhere
    python -m benchmarks.families --write-docs       # docs/support.md from the results, without running anything

docs/support.md shows what was found.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from . import results, support
from .checks import VERDICTS
from .models import ROWS
from .running import Found, run_rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.families", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="REGEX", help="rows to run, whatever the case; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    parser.add_argument("--limit", type=float, default=240.0, metavar="SECONDS", help="that one row may take")
    parser.add_argument("--output", type=Path, help=f"file of results; {results.RESULTS.name} where all rows are run")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--write-docs", action="store_true", help="write docs/support.md anew, and run nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run rows and keep what they found, or write the documentation."""
    options = parse(arguments)
    names = [name for name in ROWS if _is_chosen(name, options.rows)]
    if not names:
        sys.exit(f"no row matches {' or '.join(options.rows)}: --list names them")
    if options.list:
        print("\n".join(names))
    elif options.write_docs:
        support.write()
    else:
        _keep(_run(names, options), options)


def _is_chosen(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(re.search(pattern, name, re.IGNORECASE) for pattern in patterns)


def _run(names: Sequence[str], options: argparse.Namespace) -> dict[str, Found]:
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    found = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        rows = run_rows(names, options.jobs, options.limit)
        for name, row in progress.track(rows, total=len(names), description="families"):
            found[name] = row
            print(f"{name}: {summary(row, with_cells=bool(options.rows))}", flush=True)
    return {name: found[name] for name in names}


def summary(row: Found, with_cells: bool = False) -> str:
    """Say on one line how often a row found each verdict, the worst first; with a line for each cell if asked for."""
    cells = row.get("cells")
    if cells is None:
        return row.get("missing") or row["failed"]
    counts = Counter(cell["verdict"] for cell in cells.values())
    lines = [", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS if counts[verdict])]
    if with_cells:
        lines += [f"    {key}: {' '.join(map(str, cell.values()))}" for key, cell in cells.items()]
    return "\n".join(lines)


def _keep(found: dict[str, Found], options: argparse.Namespace) -> None:
    path = options.output or (None if options.rows else results.RESULTS)
    if path is not None:
        results.write(results.document(found), path)
    if path == results.RESULTS:
        support.write()


if __name__ == "__main__":
    main()
