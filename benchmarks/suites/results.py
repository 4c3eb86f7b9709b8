"""The files of earlier runs: one JSON a suite, which says what was run, on what, and what was found."""

import json
from pathlib import Path
from typing import Any

from hf_osd.config import reason_of
from hf_osd.errors import InputError

SUITES = ("serving", "engine", "lengths", "promise")


def read_results(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """
    Read every result in a folder.

    Raises:
        InputError: There is none, or a file of a suite's name is not one.
    """
    found = [(path, read_result(path)) for suite in SUITES if (path := folder / f"{suite}.json").is_file()]
    if not found:
        raise InputError(f"{folder}: no results of the suites ({', '.join(f'{suite}.json' for suite in SUITES)})")
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
        raise InputError(f"{path}: not a result of the suites ({reason_of(error)})") from error
    raise InputError(f"{path}: not a result of the suite {path.stem}")
