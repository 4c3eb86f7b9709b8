"""The table of model families: its checks, what the documentation makes of it, and some of its rows anew."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_osd
from benchmarks.families import checks, results, support
from benchmarks.families.building import Missing, configure, llama, prompts, small_draft
from benchmarks.families.cases import as_target
from benchmarks.families.models import GROUPS, ROWS, Row
from benchmarks.families.running import run_apart, run_row

ROOT = Path(__file__).parents[1]
FOUND = results.read()

# One of each way to be served, each less than a second.
FAST = ("greedy", "T5", "`inputs_embeds`", "a draft with another tokenizer", "the target itself as draft")


def verdicts(row: Any) -> dict[str, str]:
    return {key: cell["verdict"] for key, cell in row.get("cells", {}).items()}


def test_the_documentation_has_what_was_found() -> None:
    """Catches results that were made anew, and tables that still tell the old ones or were edited by hand."""
    text = support.DOCUMENT.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == 4
    assert support.document(text, FOUND) == text


def test_every_row_was_run() -> None:
    """Catches rows that were added or renamed and never run, and results of a part of the table."""
    assert list(FOUND["rows"]) == list(ROWS)
    assert {name: row["group"] for name, row in FOUND["rows"].items()} == {n: r.group for n, r in ROWS.items()}
    assert set(support.SHOWN) == set(GROUPS)


def test_nothing_is_served_wrong() -> None:
    """Catches results in which an output differs from the target's own, and rows that broke."""
    wrong = (checks.WRONG, checks.CRASH, checks.FAILED_UPDATE)
    found = {name: [key for key, one in verdicts(row).items() if one in wrong] for name, row in FOUND["rows"].items()}
    assert {name: keys for name, keys in found.items() if keys} == {}
    assert [name for name, row in FOUND["rows"].items() if "failed" in row] == []


def test_drafts_are_as_good_as_they_are_called() -> None:
    """Catches models whose greedy output any draft guesses, and so rows in which nothing is ever taken back."""
    cells = [(key, one) for row in FOUND["rows"].values() for key, one in row.get("cells", {}).items()]
    tried = [(key, one.get("accepted", 0) / one["verified"]) for key, one in cells if "verified" in one]
    rates = {kind: [rate for key, rate in tried if kind in key] for kind in ("wrong", "near")}
    assert len(rates["wrong"]) > 100
    assert max(rates["wrong"]) < 0.1
    assert all(0 < rate < 1 for rate in rates["near"])


@pytest.mark.parametrize("name", FAST)
def test_a_row_is_served_as_the_documentation_says(name: str) -> None:
    """Catches serving that changed its ways, and results that were not made anew."""
    assert verdicts(run_row(name)) == verdicts(FOUND["rows"][name])


@pytest.mark.slow
def test_all_rows(tmp_path: Path) -> None:
    """Catches the same for every row, and the command that runs them."""
    output = tmp_path / "families.json"
    command = [sys.executable, "-m", "benchmarks.families", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    anew = results.read(output)["rows"]
    both = [name for name in ROWS if not {"missing"} & ({*anew[name]} | {*FOUND["rows"][name]})]
    assert {name: verdicts(anew[name]) for name in both} == {name: verdicts(FOUND["rows"][name]) for name in both}


def change_generate(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let `change` have the target and the output of every `hf_osd.generate`, and return another one."""
    real = hf_osd.generate
    monkeypatch.setattr(hf_osd, "generate", lambda model, **call: change(model, real(model, **call)))


def other_last_token(model: Any, output: torch.Tensor) -> torch.Tensor:
    output[:, -1] = (output[:, -1] + 1) % 200
    return output


def test_one_wrong_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches checks that compare an output with itself, or a prompt only."""
    change_generate(monkeypatch, other_last_token)
    case = as_target(llama())
    for cell in (checks.decoding(case, small_draft(), 4), checks.sampling(case, small_draft(), 1)):
        assert cell.verdict == checks.WRONG
        assert "between two logits" in cell.why
    assert checks.learning(case, small_draft(), gate=True).why.startswith("6 of 6 outputs")


def touch_an_unused_weight(model: Any, output: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1e-6
    return output


def test_one_changed_bit_of_the_target_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches learning that writes to the target where no output shows it yet."""
    change_generate(monkeypatch, touch_an_unused_weight)
    cell = checks.learning(as_target(llama()), small_draft(), gate=False)
    assert (cell.verdict, cell.why) == (checks.WRONG, "the target's weights have changed")


def fails(model: Any, output: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no file at /some/where/model.py")


def test_errors_are_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a crash that ends the row, a refusal that counts as one, and paths of a machine in the results."""
    case = as_target(llama())
    refused = checks.decoding(case, case.target, 1)  # the target as its own draft
    assert refused.verdict == checks.REFUSED
    assert refused.why.startswith("UnsupportedModelError: ")
    nothing = as_target(torch.nn.Linear(1, 1))
    assert checks.decoding(nothing, small_draft(), 1).verdict == checks.NOT_SERVED
    change_generate(monkeypatch, fails)
    assert checks.decoding(case, small_draft(), 1) == checks.Cell(checks.CRASH, "RuntimeError: no file at ...")


@pytest.mark.parametrize(
    ("ours", "precision", "gap"),
    [
        ([[1, 2, 5, 6]], torch.float32, 0.0),
        ([[1, 2, 5, 7]], torch.float32, 0.0078125),
        ([[1, 2, 5, 7]], torch.bfloat16, 0.0),
        ([[1, 2, 4, 6]], torch.bfloat16, 3.0),
        ([[1, 2, 4, 7]], torch.float32, 3.0),  # what follows a difference is another text
        ([[1, 3, 5, 6]], torch.bfloat16, torch.inf),
        ([[1, 2, 5]], torch.bfloat16, torch.inf),
    ],
)
def test_gaps(ours: list[list[int]], precision: torch.dtype, gap: float) -> None:
    """Catches rounding that counts as an error, errors that count as rounding, and the logits of another step."""
    first, second = torch.full((1, 8), -torch.inf), torch.zeros(1, 8)
    first[0, 4:6] = torch.tensor([0.0, 3.0])
    second[0, 6:8] = torch.tensor([1.0, 1.0 - 2**-7])
    truth = checks.Truth(torch.tensor([[1, 2, 5, 6]]), lambda: (first, second), checks.Request(1, 0, 2))
    assert checks.largest_gap(truth, torch.tensor(ours), precision) == gap


class Stats:
    """Counters of an assistant."""

    def __init__(self, drafted: int = 0, looked_up: int = 0, fallbacks: int = 0) -> None:
        self.draft_tokens, self.lookup_tokens = drafted, looked_up
        self.accepted_tokens = self.accepted_lookup_tokens = 0
        self.fallbacks, self.fallback_reasons = fallbacks, {"beam search": fallbacks} if fallbacks else {}


@pytest.mark.parametrize(
    ("gaps", "alone", "stats", "verdict", "why"),
    [
        ([0.0, 0.0], False, Stats(drafted=3), checks.SPECULATIVE, ""),
        ([0.0, 0.0], False, Stats(looked_up=3, fallbacks=1), checks.SPECULATIVE, "beam search"),
        ([0.0, 0.0], False, Stats(fallbacks=2), checks.PLAIN, "beam search"),
        ([0.0, 0.0], False, Stats(), checks.UNCOUNTED, ""),
        ([0.5, 0.0], True, Stats(drafted=3), checks.ALONE, ""),
        ([0.5, 0.0], False, Stats(drafted=3), checks.WRONG, "1 of 2 outputs, by 0.5 between two logits"),
    ],
)
def test_verdicts(gaps: list[float], alone: bool, stats: Stats, verdict: str, why: str) -> None:
    """Catches equal outputs that nobody speculated for, and plain decoding that is not counted."""
    cell = checks.judge([checks.Difference(gap, alone and gap > 0) for gap in gaps], stats)
    assert (cell.verdict, cell.why) == (verdict, why)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a class that this version of transformers lacks, and that counts as a crash or as served."""
    with pytest.raises(Missing, match="NoSuchConfig"):
        configure("NoSuch")
    monkeypatch.setitem(ROWS, "no such", Row("modes", "no such", lambda: as_target(configure("NoSuch"))))
    row = run_row("no such")
    assert "NoSuchConfig" in row["missing"]
    assert "no such" in support.served({"no such": row}, ["modes"]).splitlines()[-1]


@pytest.mark.parametrize(
    ("make", "seconds", "why"),
    [(lambda: time.sleep(60), 0.1, "no end within 0.1 seconds"), (lambda: os._exit(1), 60.0, "its process died")],
)
def test_a_row_that_hangs_or_dies_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch, make: Any, seconds: float, why: str
) -> None:
    """Catches a table that never ends, or ends with its worst row."""
    monkeypatch.setitem(ROWS, "bad", Row("modes", "bad", make))
    context = multiprocessing.get_context("fork")  # which sees the row
    assert run_apart(context, "bad", seconds) == {"group": "modes", "label": "bad", "failed": why}


def row(label: str, one: str, four: str, why: str = "", draft: str = "") -> dict[str, Any]:
    cells = {
        "batch 1, wrong draft": {"verdict": one},
        "batch 1, near draft": {"verdict": checks.PLAIN, "why": "draft: recurrent state"},
        "batch 4, wrong draft": {"verdict": four, "why": why},
    }
    if draft:
        cells |= {f"as draft, batch {batch}": {"verdict": draft, "why": "draft: recurrent state"} for batch in (1, 4)}
    return {"group": "recurrent and hybrid", "label": label, "cells": cells}


def test_rows_of_which_the_same_is_to_be_said_are_one_line() -> None:
    """Catches a draft's fault that is put on the target, reasons that are lost, and names of classes in them."""
    why = "UnsupportedModelError: the target AForCausalLM cannot decode in a batch"
    rows = {
        "A": row("A", checks.SPECULATIVE, checks.REFUSED, why),
        "B": row("B", checks.SPECULATIVE, checks.REFUSED, why.replace("AFor", "BFor")),
        "C": row("C", checks.PLAIN, checks.PLAIN, "beam search", draft=checks.PLAIN),
        "D": row("D", checks.WRONG, checks.SPECULATIVE),
    }
    assert support.served(rows, ["recurrent and hybrid"]).splitlines()[2:] == [
        "| **recurrent and hybrid**: A, B | speculative | refused | | the target cannot decode in a batch |",
        "| **recurrent and hybrid**: C | plain | plain | no | beam search; as draft: recurrent state |",
        "| **recurrent and hybrid**: D | **differs** | speculative | | |",
    ]


def test_prompts_are_padded_on_the_left() -> None:
    """Catches batches in which every row has the same length, and so no padding to get wrong."""
    mask = prompts(4)["attention_mask"]
    assert mask.sum(dim=1).tolist() == [12, 9, 6, 3]
    assert (mask.diff(dim=1) >= 0).all()
    assert not (prompts(4)["input_ids"][mask.bool()] == 0).any()
