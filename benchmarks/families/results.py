"""The file of results: which command made it, with which versions, and what each row found."""

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "families.json"
PACKAGES = ("torch", "transformers", "trl", "peft")


def document(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows with the command, the date and the versions behind them."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.families", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "rows": rows,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(found: Mapping[str, Any], path: Path) -> None:
    """Write results, a line for each cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(found) + "\n", encoding="utf-8")


def read(path: Path = RESULTS) -> dict[str, Any]:
    """Return results."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _lines(value: Any, indent: str = "") -> str:
    """Return JSON in which an object without objects in it takes one line."""
    if not isinstance(value, Mapping) or not any(isinstance(one, Mapping) for one in value.values()):
        return json.dumps(value)
    lines = [f"{indent} {json.dumps(key)}: {_lines(one, indent + ' ')}" for key, one in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
