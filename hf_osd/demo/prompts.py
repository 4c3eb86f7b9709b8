"""Real prompts: the docstrings of the Python that runs this, which need no licence, and whatever the user brings."""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import PromptSourceError

INSTRUCTION = "Please generate code based on the following doc:\n"
PROMPT_COLUMNS = ("prompt", "instruction", "question", "text")
CHAT_COLUMN = "messages"

Prompt = str | list[dict[str, Any]]
"""A plain text, or the messages of a chat that wait for an answer."""

_MAX_DOCSTRING = 600  # characters; longer ones are reference manuals rather than requests
_MAX_SOURCE = 1500  # characters


def load_prompts(source: str | None, limit: int) -> list[Prompt]:
    """
    Return the first prompts of a source.

    Args:
        source (`str`, *optional*):
            A `.jsonl`, `.json` or `.txt` file, or a `datasets` id or folder, as `id`, `id:config` or
            `id:config:split`. Rows hold a prompt under one of `PROMPT_COLUMNS`, or a chat under `messages`. Defaults
            to held-out docstrings of the running Python's standard library.
        limit (`int`): How many prompts to return at most.

    Returns:
        `list[Prompt]`: At least one prompt.

    Raises:
        PromptSourceError: The source does not exist, cannot be parsed, or has no column of prompts.
    """
    if source is None:
        return [*stdlib_prompts()[:limit]]
    if Path(source).suffix in _READERS and not Path(source).is_dir():
        rows = _READERS[Path(source).suffix](Path(source))
    elif Path(source).is_file():
        raise PromptSourceError(f"{source}: a file of prompts ends in one of {', '.join(sorted(_READERS))}")
    else:
        rows = _dataset_rows(source)
    if prompts := [_to_prompt(row, where) for where, row in islice(rows, limit)]:
        return prompts
    raise PromptSourceError(f"{source}: no prompts in it")


def stdlib_prompts() -> list[str]:
    """Return the demo's default prompts: held-out docstrings of the running Python, in a fixed mixed order."""
    held_out = [docstring for docstring, _ in stdlib_functions(keep=is_held_out)]
    held_out.sort(key=lambda docstring: hashlib.sha256(docstring.encode()).digest()[1:])
    return [INSTRUCTION + docstring for docstring in held_out]


def is_held_out(docstring: str) -> bool:
    """
    Say whether a docstring is kept from the embedded target's training, and so may be a prompt of the demo.

    The split hashes the text itself, so it is the same on every machine and Python version. About 1 in 16.
    """
    return hashlib.sha256(docstring.encode()).digest()[0] < 16


def stdlib_functions(
    root: Path | None = None, keep: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, str]]:
    """
    Walk Python's standard library for documented functions.

    Args:
        root (`Path`, *optional*): The library's folder; defaults to that of the running Python.
        keep (`Callable[[str], bool]`, *optional*): Which docstrings to look at; all of them by default.

    Yields:
        `tuple[str, str]`: A docstring and the function's source without it (normalised by `ast.unparse`), each
        docstring once, in a fixed order.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        for docstring, node in _documented_functions(path):
            if docstring in seen or len(docstring) > _MAX_DOCSTRING or not keep(docstring):
                continue
            node.body, node.decorator_list = node.body[1:], []
            if len(source := ast.unparse(node)) <= _MAX_SOURCE:
                seen.add(docstring)
                yield docstring, source


def _documented_functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in the library are not the user's business
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):  # the library ships deliberately broken files for its own tests
        return
    for node in _walk_statements(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        if docstring := ast.get_docstring(node):
            yield docstring, node


def _walk_statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Walk as `ast.walk` does, in its order, but stay out of expressions: most nodes, and no functions in them."""
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            todo.extend(getattr(node, name, ()))
        yield node


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise PromptSourceError(f"{path}, line {number}: not JSON ({error.msg})") from error


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise PromptSourceError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(rows, list):
        raise PromptSourceError(f"{path}: expected a list of prompts or rows, found a JSON {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _text_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".txt": _text_lines,
}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptSourceError(f"{path}: cannot be read ({error})") from error


def _dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    name, config, split = (*source.split(":"), None, None)[:3]
    for number, row in enumerate(_open_dataset(source, str(name), config or None, split or None), start=1):
        yield f"{source}, row {number}", row


def _open_dataset(source: str, name: str, config: str | None, split: str | None) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset  # here, because it takes a second and the default prompts do not need it

    try:
        splits = load_dataset(name, config, streaming=True)  # a few hundred rows are needed, not the download
        chosen = split or ("train" if "train" in splits else next(iter(splits)))
        rows: Iterable[Mapping[str, Any]] = splits[chosen]
    except Exception as error:  # `datasets` raises a dozen types, from offline hubs to missing configs
        reason = " ".join(str(error).split())
        raise PromptSourceError(f"{source}: neither a file nor a data set that loads ({reason})") from error
    return rows


def _to_prompt(row: Any, where: str) -> Prompt:
    if isinstance(row, str) and row.strip():
        return row
    if not isinstance(row, Mapping):
        raise PromptSourceError(f"{where}: expected a text or an object with columns, found {row!r:.60}")
    for column in (*PROMPT_COLUMNS, CHAT_COLUMN):
        value = row.get(column)
        if isinstance(value, str) and value.strip() and column != CHAT_COLUMN:
            return value
        if isinstance(value, list) and value:
            return _to_chat(value, f"{where}, {column!r}")
    expected = ", ".join(map(repr, (*PROMPT_COLUMNS, CHAT_COLUMN)))
    found = ", ".join(map(repr, row)) or "none"
    raise PromptSourceError(f"{where}: no prompt under any of {expected}; columns found: {found}")


def _to_chat(messages: list[Any], where: str) -> Prompt:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise PromptSourceError(f"{where}: a chat is a list of objects with 'role' and 'content'")
    chat = [dict(message) for message in messages]
    while chat and chat[-1]["role"] == "assistant":  # recorded chats end with the answer that we are to generate
        chat.pop()
    if not chat:
        raise PromptSourceError(f"{where}: a chat without a message to answer")
    return chat
