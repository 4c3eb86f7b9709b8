"""The files of a run: one JSON a suite, which says what was run, on what, and what was found; never a text."""

import json
from pathlib import Path
from typing import Any

from ..config import reason_of
from ..errors import InputError

SUITES = ("serving", "engine", "lengths", "promise")


def write_result(folder: Path, suite: str, about: dict[str, Any], figures: dict[str, Any]) -> Path:
    """
    Write the figures of one suite, over those of an earlier run in the same folder.

    Args:
        folder (`Path`): Made if missing.
        suite (`str`): One of `SUITES`; the file's name.
        about (`dict[str, Any]`): Command, versions, machine, models and settings.
        figures (`dict[str, Any]`): What the suite returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.json"
    document = {"suite": suite, "about": about, "figures": rounded(figures)}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def rounded(value: Any) -> Any:
    """Keep six significant digits, more than any of them is worth; names of JSON objects become texts."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(name): rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def read_results(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """
    Read every result in a folder.

    Raises:
        InputError: There is none, or a file of a suite's name is not one.
    """
    found = [(path, read_result(path)) for suite in SUITES if (path := folder / f"{suite}.json").is_file()]
    if not found:
        raise InputError(f"{folder}: no results of hf-osd bench ({', '.join(f'{suite}.json' for suite in SUITES)})")
    return found


def read_result(path: Path) -> dict[str, Any]:
    """
    Read one result.

    Raises:
        InputError: It is none.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document["suite"] == path.stem and document["figures"] and document["about"]:
            return document
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a result of hf-osd bench ({reason_of(error)})") from error
    raise InputError(f"{path}: not a result of hf-osd bench {path.stem}")
