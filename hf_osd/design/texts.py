"""Reads the texts that a draft learns from: prompts, with answers or without, and documents."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from ..config import reason_of, shown
from ..errors import PromptSourceError
from ..evaluation.prompts import (
    CHAT_COLUMN,
    INSTRUCTION,
    Prompt,
    checked_text,
    is_held_out,
    stdlib_functions,
    to_prompt,
)
from ..evaluation.rows import read_rows

ANSWER_COLUMN = "response"
BY_THE_TARGET = "target"
"""Source of prompts that the target writes itself."""

STDLIB = "stdlib"
"""Source of the documented functions of the running Python's standard library."""

_PIECE = 1_500  # characters of a piece of a document, at most: some 400 tokens


@dataclass(frozen=True, slots=True)
class Text:
    """
    A text to learn from.

    Attributes:
        prompt (`str` or `list[dict]`, *optional*): What is asked; `None` for a piece of a document.
        answer (`str`, *optional*): A given answer, or the piece itself; `None` where the target is to answer.
    """

    prompt: Prompt | None
    answer: str | None = None


def load_texts(sources: Sequence[str], limit: int) -> list[Text]:
    """
    Return texts of several sources, one of each in turn.

    Args:
        sources (`Sequence[str]`):
            `.jsonl`, `.json` and `.txt` files and `datasets` ids as [`~hf_osd.evaluation.rows.read_rows`] takes them,
            whose rows hold a prompt and maybe an answer under `response`, or a chat under `messages`; and `.md` files,
            which are read as documents. `"stdlib"` stands for the documented functions of the running Python's
            standard library, but for those that `hf-osd demo` asks for.
        limit (`int`): How many texts to return at most.

    Raises:
        PromptSourceError: A source cannot be read, or there is nothing in it.
    """
    texts = [*islice(in_turn([_read(source) for source in sources]), limit)]
    if not texts:
        raise PromptSourceError(f"{', '.join(sources)}: no texts in it")
    return texts


def stdlib_texts() -> list[Text]:
    """Return documented functions of the standard library in a fixed random order: docstrings, answered by code."""
    functions = [*stdlib_functions(keep=lambda docstring: not is_held_out(docstring))]
    functions.sort(key=lambda function: sha256(function[0].encode()).digest())
    return [Text(INSTRUCTION + docstring, source) for docstring, source in functions]


def in_turn(sources: Iterable[Iterable[Text]]) -> Iterator[Text]:
    """Yield one text of each source in turn, as long as it has any."""
    for row in zip_longest(*sources):
        yield from (text for text in row if text is not None)


def _read(source: str) -> Iterator[Text]:
    if source == STDLIB:
        return iter(stdlib_texts())
    if Path(source).suffix == ".md":
        return (Text(None, piece) for piece in _pieces(Path(source)))
    return (_to_text(row, where) for where, row in read_rows(source))


def _to_text(row: Any, where: str) -> Text:
    prompt = to_prompt(row, where)
    answer = _answer(row) if isinstance(row, Mapping) else None
    if answer is None:
        return Text(prompt)
    if not isinstance(answer, str) or not answer.strip():
        raise PromptSourceError(f"{where}: an answer is a text that is not empty, found {shown(answer)}")
    return Text(prompt, checked_text(answer, where))


def _answer(row: Mapping[str, Any]) -> Any:
    """Return the answer of a row, or of the chat in it if that ends with one."""
    if row.get(ANSWER_COLUMN) is not None:
        return row[ANSWER_COLUMN]
    chat = row.get(CHAT_COLUMN)
    last = chat[-1] if isinstance(chat, list) and chat else {}
    return last.get("content") if last.get("role") == "assistant" else None


def _pieces(path: Path) -> Iterator[str]:
    """Cut a document into paragraphs, as many at a time as fit into a piece."""
    try:
        paragraphs = path.read_text(encoding="utf-8-sig").split("\n\n")
    except (OSError, ValueError) as error:
        raise PromptSourceError(f"{path}: cannot be read ({reason_of(error)})") from error
    piece = ""
    for paragraph in paragraphs:
        if piece.strip() and len(piece) + len(paragraph) > _PIECE:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece.strip():
        yield piece
