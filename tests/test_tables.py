"""Tables in the documentation, filled from results."""

from typing import Any

import pytest

from benchmarks import tables


def test_the_documentation_has_the_figures_of_the_results() -> None:
    """Catches results that were measured again, and tables that still tell the old ones or were edited by hand."""
    texts = [document.read_text(encoding="utf-8") for document in tables.DOCUMENTS]
    assert sum(text.count("<!-- table: ") for text in texts) == len(tables.TABLES)
    assert all(text.count("<!-- table: ") == text.count("<!-- end -->") for text in texts)
    assert all(tables.filled(text) == text for text in texts)


def test_what_is_not_a_table_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a text that a table swallows, up to the end of the next one."""
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| 1 |", "two": lambda: "| 2 |"})
    text = "a\n<!-- table: one -->\nold\n\n<!-- end -->\nb\n<!-- table: two -->\n<!-- end -->\nc\n"
    new = tables.filled(text)
    assert new == (
        "a\n<!-- table: one -->\n\n| 1 |\n\n<!-- end -->\nb\n<!-- table: two -->\n\n| 2 |\n\n<!-- end -->\nc\n"
    )
    assert tables.filled(new) == new


def stream(kind: str = "alone", **finals: float) -> dict[str, Any]:
    """A stream of 400 requests, as the laboratory writes it."""
    goals = {"share_to_reach_algorithm_1": 0.125, "worst_window_above_static": -0.004}
    recipes = {
        name.replace("__", "@").replace("_1e3", "0.001"): {
            "final_acceptance": value,
            "final_accepted_per_round": 10 * value,
            "acceptance_by_quarter": [value] * 4,
            "acceptance_by_segment": [value, 1.0],
            "goals": goals if name == "defaults" else None,
        }
        for name, value in finals.items()
    }
    return {"kind": kind, "requests": 400, "segments": [["a", 0, 200], ["b", 200, 400]], "recipes": recipes}


def test_a_table_of_domains() -> None:
    """Catches figures in the wrong row, a static draft that counts as learned, and rates that look like others."""
    found = {"spider": stream(static=0.7, algorithm_1___1e3=0.5, defaults=0.612)}
    assert tables.domains(found).splitlines() == [
        "| | text to SQL |",
        "| --- | --- |",
        "| static draft | .700 |",
        "| Algorithm 1, 1e-3 | .500 |",
        "| **defaults** | **.612** |",
        "| requests until Algorithm 1's best final rate | 50 (12%) |",
        "| worst window of 100 against static | -.0040 |",
    ]


def test_a_table_of_parts_and_one_of_seeds() -> None:
    """Catches a mean over the wrong recipes, and parts without their names."""
    assert tables.segments(stream("shift", static=0.25, defaults=0.5)).splitlines()[0::2] == [
        "| | a | b | worst window of 100 against static |",
        "| static draft | .250 | 1.000 | |",
    ]
    found = {"python": stream(static=0.3, seeds__0=0.4, seeds__1=0.5, lora=0.1)}
    for number, worst in enumerate((-0.004, -0.002)):
        found["python"]["recipes"][f"seeds@{number}"]["goals"] = {"worst_window_above_static": worst}
    assert tables.seeds(found).splitlines()[2:] == [
        "| static draft | .300 |",
        "| **defaults** | .450 (.400 to .500) |",
        "| worst window of 100 against static | -.0030 (-.0040 to -.0020) |",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, ".250"), (-0.25, "-.250"), (10.0, "10.000"), (1.0, "1.000"), (None, "")]
)
def test_rates(value: float | None, text: str) -> None:
    """Catches a zero that is taken out of the middle of a number."""
    assert tables.rate(value) == text
