"""Real prompts: the docstrings of the Python that runs this, which need no licence, and whatever the user brings."""

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import shown
from ..errors import PromptSourceError
from .rows import read_rows

INSTRUCTION = "Please generate code based on the following doc:\n"
PROMPT_COLUMNS = ("prompt", "instruction", "question", "text")
CHAT_COLUMN = "messages"
_MESSAGE = ("role", "content")

Prompt = str | list[dict[str, Any]]
"""A plain text, or the messages of a chat that wait for an answer."""

_MAX_DOCSTRING = 600  # characters; longer ones are reference manuals rather than requests
_MAX_SOURCE = 1500  # characters
_MOST_COLUMNS = 20  # that a message lists


def load_prompts(source: str | None, limit: int) -> list[Prompt]:
    """
    Return the first prompts of a source.

    Args:
        source (`str`, *optional*):
            As [`read_rows`] takes it. Rows hold a prompt under one of `PROMPT_COLUMNS`, or a chat under `messages`.
            Defaults to held-out docstrings of the running Python's standard library.
        limit (`int`): How many prompts to return at most.

    Returns:
        `list[Prompt]`: At least one prompt.

    Raises:
        PromptSourceError: The source does not exist, cannot be parsed, has no column of prompts, or a prompt is no
            text that a tokenizer takes.
    """
    if source is None:
        return [*stdlib_prompts()[:limit]]
    if prompts := [to_prompt(row, where) for where, row in islice(read_rows(source), min(limit, sys.maxsize))]:
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


def to_prompt(row: Any, where: str) -> Prompt:
    """
    Return the prompt of a row: a text, or what stands under one of `PROMPT_COLUMNS` or `messages`.

    Raises:
        PromptSourceError: There is none, or it is no text that a tokenizer takes.
    """
    if isinstance(row, str) and row.strip():
        return checked_text(row, where)
    if not isinstance(row, Mapping):
        raise PromptSourceError(f"{where}: expected a text or an object with columns, found {shown(row)}")
    for column in (*PROMPT_COLUMNS, CHAT_COLUMN):
        value = row.get(column)
        if isinstance(value, str) and value.strip() and column != CHAT_COLUMN:
            return checked_text(value, where)
        if isinstance(value, list) and value:
            return _to_chat(value, f"{where}, {column!r}")
    expected = ", ".join(map(repr, (*PROMPT_COLUMNS, CHAT_COLUMN)))
    found = ", ".join(map(shown, islice(row, _MOST_COLUMNS))) or "none"
    raise PromptSourceError(f"{where}: no prompt under any of {expected}; columns found: {found}")


def _to_chat(messages: list[Any], where: str) -> Prompt:
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(name), str) for name in _MESSAGE):
            raise PromptSourceError(
                f"{where}: a chat is a list of objects with 'role' and 'content', two texts, found {shown(message)}"
            )
        for name in _MESSAGE:
            checked_text(message[name], where)
    chat = [dict(message) for message in messages]
    while chat and chat[-1]["role"] == "assistant":  # recorded chats end with the answer that we are to generate
        chat.pop()
    if not chat:
        raise PromptSourceError(f"{where}: a chat without a message to answer")
    return chat


def checked_text(text: str, where: str) -> str:
    """
    Return a text that tokenizers take: one that can be written as UTF-8.

    Raises:
        PromptSourceError: There is a lone surrogate in it, which JSON can escape and no encoding can write.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise PromptSourceError(f"{where}: {found!r} is half of a character, which no tokenizer takes") from error
    return text
