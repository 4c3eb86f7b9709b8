"""
Rows of files and data sets, each with the place that it was found at.

Files are read as far as they are asked for. Lines of JSON end with a line feed alone: Unicode's other separators, such
as U+2028, may stand inside a JSON text.
"""

import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import reason_of
from ..errors import PromptSourceError

Row = tuple[str, Any]
"""Where a row is, for messages, and what it holds."""


def read_rows(source: str) -> Iterator[Row]:
    """
    Read a source row by row.

    Args:
        source (`str`):
            A `.jsonl`, `.json` or `.txt` file, or a `datasets` id or folder, as `id`, `id:config` or
            `id:config:split`.

    Yields:
        `Row`: A value of JSON, a line of text or a mapping of columns.

    Raises:
        PromptSourceError: The source does not exist, or cannot be read as what it seems to be.
    """
    path, mode = Path(source), _mode(source)
    if path.suffix in _READERS and not stat.S_ISDIR(mode):
        return _READERS[path.suffix](path)
    if mode and not stat.S_ISDIR(mode):
        raise PromptSourceError(f"{source}: a file of prompts ends in one of {', '.join(sorted(_READERS))}")
    return _dataset_rows(source)


def _mode(source: str) -> int:
    """Return what is at a path, as `stat` says it; 0 where nothing is, or where nothing could have such a name."""
    try:
        return Path(source).stat().st_mode
    except (OSError, ValueError):
        return 0


def json_lines(path: Path) -> Iterator[Row]:
    """Read a file of one JSON value a line; blank lines are left out."""
    for number, line in enumerate(_lines(path, newline="\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _parse(line.removesuffix("\n"), path, number)


def _json_list(path: Path) -> Iterator[Row]:
    rows = _parse("".join(_lines(path)), path)
    if not isinstance(rows, list):
        raise PromptSourceError(f"{path}: expected a list of prompts or rows, found a JSON {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _text_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if "\0" in line:
            raise PromptSourceError(f"{path}, line {number}: a NUL character, so it is no file of text")
        if line.strip():
            yield f"{path}, line {number}", line.strip()


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _json_list,
    ".jsonl": json_lines,
    ".txt": _text_lines,
}


def _lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """Yield lines of UTF-8, with or without a byte order mark; they end as in any text file, or with `newline`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no regular file")  # a pipe would be waited for, and a device need not end
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except (OSError, ValueError) as error:
        raise PromptSourceError(f"{path}: cannot be read ({error})") from error


def _parse(text: str, path: Path, line: int = 1) -> Any:
    """Parse JSON that begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptSourceError(f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of brackets
        raise PromptSourceError(f"{path}, line {line}: JSON that cannot be read ({error})") from error


def _dataset_rows(source: str) -> Iterator[Row]:
    name, *rest = source.split(":")
    if not name or len(rest) > 2:
        raise PromptSourceError(f"{source!r}: a data set is written id, id:config or id:config:split")
    config, split = (*rest, "", "")[:2]
    try:
        for number, row in enumerate(_open_dataset(name, config or None, split or None), start=1):
            yield f"{source}, row {number}", row
    except Exception as error:  # `datasets` raises a dozen types, from offline hubs to broken files in the middle
        reason = reason_of(error)
        raise PromptSourceError(f"{source}: neither a file nor a data set that loads ({reason})") from error


def _open_dataset(name: str, config: str | None, split: str | None) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset  # here, because it takes a second and the default prompts do not need it

    splits = load_dataset(name, config, streaming=True)  # a few hundred rows are needed, not the download
    chosen = split or ("train" if "train" in splits else next(iter(splits)))
    rows: Iterable[Mapping[str, Any]] = splits[chosen]
    return rows
