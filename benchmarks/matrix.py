"""
Record what a test run found with one set of versions; run by `make test-matrix`, with the Python of that set.

    .venv-oldest/bin/python -m benchmarks.matrix oldest runs/matrix/oldest.xml
"""

import argparse
import json
import platform
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .tables import table

RESULTS = Path(__file__).parent / "results" / "matrix.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def summary(report: Path) -> dict[str, Any]:
    """Return the counts of a JUnit report of pytest, with the versions that run this."""
    suites = ET.parse(report).getroot().iter("testsuite")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in totals:
            totals[name] += int(suite.attrib[name])
    passed = totals["tests"] - totals["failures"] - totals["errors"] - totals["skipped"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "passed": passed,
        "failed": totals["failures"] + totals["errors"],
        "skipped": totals["skipped"],
    }


def tests_table() -> str:
    """Return what the recorded runs found, as a table in Markdown."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    lines = [[name, *_cells(runs[name])] for name in ("oldest", "newest")]
    return table(["python", *PACKAGES, "passed", "failed", "skipped", "on"], lines)


def _cells(run: dict[str, Any]) -> list[str]:
    counts = (str(run[name]) for name in ("passed", "failed", "skipped"))
    return [*run["versions"].values(), *counts, run["date"]]


def main() -> None:
    """Add a run to the recorded ones, in place of an earlier one of its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("oldest", "newest"))
    parser.add_argument("report", type=Path, help="what `pytest --junitxml` wrote")
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"command": "make test-matrix", "runs": {}}
    known["runs"][options.name] = summary(options.report)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{options.name}: {known['runs'][options.name]}")


if __name__ == "__main__":
    main()
