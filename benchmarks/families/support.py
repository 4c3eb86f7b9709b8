"""The tables of docs/support.md, made from the results."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..matrix import tests_table
from ..tables import filled, table
from .checks import (
    ALONE,
    CRASH,
    FAILED_UPDATE,
    LEARNS,
    NOT_SERVED,
    PLAIN,
    REFUSED,
    SPECULATIVE,
    STATIC,
    UNCOUNTED,
    VERDICTS,
    WRONG,
)
from .results import read

DOCUMENT = Path(__file__).parents[2] / "docs" / "support.md"

Cell = Mapping[str, Any]
Row = Mapping[str, Any]

_WORDS = {
    SPECULATIVE: "speculative",
    PLAIN: "plain",
    REFUSED: "refused",
    NOT_SERVED: "not by `generate` either",
    ALONE: "as each row alone",
    WRONG: "**differs**",
    CRASH: "**crashes**",
    FAILED_UPDATE: "**updates fail**",
    UNCOUNTED: "equal, not counted",
}
_ERRORS = (WRONG, CRASH, FAILED_UPDATE, UNCOUNTED, ALONE)  # one such cell is what a column says
_MODELS = (
    "full attention", "windows or chunks, text within", "windows or chunks, text past",
    "sparse attention, all tokens selected", "sparse attention, few tokens selected", "recurrent and hybrid",
    "vision-language, text only", "vision-language, with images", "encoder-decoder",
)  # fmt: skip
_WRAPPERS = ("wrappers", "modes")
_SETTINGS = ("generation settings",)
SHOWN = (*_MODELS, *_WRAPPERS, *_SETTINGS)


@dataclass(frozen=True)
class Line:
    """
    What a row of the results becomes.

    Attributes:
        one, batches, draft (`str`): How a target is served at batch size 1 and above, and what becomes of a draft;
            empty where that was not tried.
        why (`str`): Reasons of whatever is not speculative.
    """

    one: str
    batches: str
    draft: str
    why: str


def line(row: Row) -> Line:
    """Return what a row found, in the words of the documentation."""
    cells: Mapping[str, Cell] = row.get("cells", {})
    if "failed" in row:
        return Line("**failed**", "", "", row["failed"])
    one = _chosen(cells, "batch 1", "sampling, batch 1", "learning")
    four = _chosen(cells, "batch 4", "sampling, batch 4")
    tried = [_chosen(cells, f"as draft, {what}") for what in ("batch 1", "batch 4", "learning")]
    of_target = _reasons(one, four)
    of_draft = [f"as draft: {why}" for why in _reasons(*tried) if why not in of_target]
    draft = _of_draft(*tried) if tried[0] else _of_learning(one, _chosen(cells, "learning"))
    return Line(_word(one), _word(four), draft, "; ".join([*of_target, *of_draft]))


def _chosen(cells: Mapping[str, Cell], *beginnings: str) -> Cell | None:
    """The worst of some cells where it is an error; else the best, since a draft may be why others are not better."""
    some = [cell for key, cell in cells.items() if key.startswith(beginnings)]
    if not some:
        return None
    worst, best = (choose(some, key=lambda cell: VERDICTS.index(cell["verdict"])) for choose in (min, max))
    return worst if worst["verdict"] in _ERRORS else best


def _word(cell: Cell | None) -> str:
    return "" if cell is None else _WORDS[cell["verdict"]]


def _of_draft(alone: Cell | None, together: Cell | None, learning: Cell | None) -> str:
    tried = [cell["verdict"] for cell in (alone, together, learning) if cell is not None]
    worst = [verdict for verdict in (*_ERRORS, REFUSED) if verdict in tried]
    if worst:
        return _WORDS[worst[0]]
    if tried[0] != SPECULATIVE:
        return "no"
    limits = {"one prompt at a time": tried[1] != SPECULATIVE, "does not learn": tried[2:] not in ([], [LEARNS])}
    return ", ".join(["yes", *(limit for limit, holds in limits.items() if holds)])


def _of_learning(served: Cell | None, learning: Cell | None) -> str:
    """Where only drafts of others were tried, what is worth a word is a draft that serves and does not learn."""
    is_static = served and served["verdict"] == SPECULATIVE and learning and learning["verdict"] == STATIC
    return "does not learn" if is_static else ""


def _reasons(*cells: Cell | None) -> list[str]:
    """Why something is not speculative, without repetitions. What `generate` itself fails for is not said."""
    told = (cell for cell in cells if cell is not None and cell["verdict"] not in (SPECULATIVE, LEARNS, NOT_SERVED))
    return list(dict.fromkeys(_clause(cell["why"]) for cell in told if cell.get("why")))


def _clause(why: str) -> str:
    """Return the first clause of a reason, without what differs between families: names of errors and of classes."""
    model = r"\w+(?:ForCausalLM|ForConditionalGeneration|LMHeadModel|MTModel)"
    why = re.sub(r"^\w+Error: |^(?:target|draft): ", "", why)
    why = re.sub(model, "the model", re.sub(rf"\b(the (?:target|draft)) {model}", r"\1", why))
    return re.split(r"[:,;] ", why)[0]


def _merged(rows: Mapping[str, Row], groups: Sequence[str]) -> Iterator[tuple[str, list[str], Line]]:
    """Yield a group, its rows of which the same is to be said, and that; groups and rows in their order."""
    for group in groups:
        labels: dict[Line, list[str]] = {}
        for row in rows.values():
            if row["group"] == group and "missing" not in row:
                labels.setdefault(line(row), []).append(row["label"])
        for said, same in labels.items():
            yield group, same, said


def served(rows: Mapping[str, Row], groups: Sequence[str]) -> str:
    """Targets and drafts, a line for each group and what is to be said of it."""
    lines = [
        [f"**{group}**: {', '.join(labels)}", said.one, said.batches, said.draft, said.why]
        for group, labels, said in _merged(rows, groups)
    ]
    return table(["batch 1", "batches", "as draft", "why"], lines) + _missing(rows, groups)


def settings(rows: Mapping[str, Row]) -> str:
    """Arguments of `generate`."""
    lines = [
        [", ".join(labels), said.one if said.one == said.batches else f"{said.one}; batches {said.batches}", said.why]
        for _, labels, said in _merged(rows, _SETTINGS)
    ]
    return table(["", "why"], lines) + _missing(rows, _SETTINGS)


def _missing(rows: Mapping[str, Row], groups: Sequence[str]) -> str:
    names = [name for name, row in rows.items() if row["group"] in groups and "missing" in row]
    return f"\n\nNot installed where this was run, and so not tried: {', '.join(names)}." if names else ""


def versions(found: Mapping[str, Any]) -> str:
    """What the tests found with the oldest and the newest versions, and with which the tables above were made."""
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    made = f"The tables above: {found['date']}, {packages}, {len(found['rows'])} rows, by `{found['command']}`."
    return f"{tests_table()}\n\n{made}"


def document(text: str, found: Mapping[str, Any]) -> str:
    """Return docs/support.md with its tables as the results have them; what stands outside of them stays."""
    rows = found["rows"]
    tables = {
        "models": lambda: served(rows, _MODELS),
        "wrappers": lambda: served(rows, _WRAPPERS),
        "settings": lambda: settings(rows),
        "versions": lambda: versions(found),
    }
    return filled(text, tables)


def write() -> None:
    """Write the tables of docs/support.md anew."""
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8"), read()), encoding="utf-8")
