"""The journal: what it keeps, in which order, and for whom."""

import json

import pytest

from hf_osd import journal as journal_module
from hf_osd.journal import Drift, Journal, JudgedRequest, UpdateRecord


def judged(number: int) -> JudgedRequest:
    return JudgedRequest(number, 0.5, 10, 1.5)


def test_entries_by_kind_oldest_first() -> None:
    """Catches entries that end up among others, and callers that get hold of the journal's own list."""
    journal = Journal()
    entries = [judged(1), UpdateRecord(1, "published", "better"), Drift(2, 0.1, 0.6), judged(2)]
    for entry in entries:
        journal.add(entry)
    assert journal.requests == [entries[0], entries[3]]
    assert (journal.updates, journal.drifts) == ([entries[1]], [entries[2]])
    journal.requests.clear()
    assert len(journal.requests) == 2


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that runs out of memory after some months, and new entries that are dropped."""
    monkeypatch.setattr(journal_module, "_ENTRIES", 3)
    journal = Journal()
    journal.add(Drift(1, 0.1, 0.6))
    for number in range(10):
        journal.add(judged(number))
    assert [entry.request for entry in journal.requests] == [7, 8, 9]
    assert len(journal.drifts) == 1


def test_it_is_ready_for_json() -> None:
    """Catches objects in the report, and fields that are lost."""
    journal = Journal()
    journal.add(judged(1))
    journal.add(UpdateRecord(1, "restored", "better", 0.7, 1e-3, -0.2, 1.0, 0.5))
    journal.add(Drift(1, 0.1, 0.6))
    assert json.loads(json.dumps(journal.to_dict())) == {
        "requests": [{"request": 1, "acceptance": 0.5, "positions": 10, "accepted": 1.5, "initially": None}],
        "updates": [
            {
                "request": 1,
                "decision": "restored",
                "reason": "better",
                "loss": 0.7,
                "learning_rate": 1e-3,
                "gain": -0.2,
                "mixing": 1.0,
                "seconds": 0.5,
            }
        ],
        "drifts": [{"request": 1, "short": 0.1, "long": 0.6}],
    }


def test_what_is_owed_to_learning():
    """Catches a share that counts requests alike, however long, or those that were not compared."""
    journal = Journal()
    assert journal.learned_share == 0.0
    journal.add(JudgedRequest(1, 0.5, 10, 2.0, initially=1.0))
    journal.add(JudgedRequest(2, 0.5, 30, 2.0, initially=2.0))
    journal.add(JudgedRequest(3, 0.5, 99, 2.0))
    assert journal.learned_share == pytest.approx(1 - 70 / 80)
    journal.add(JudgedRequest(4, 0.5, 10, 1.0, initially=9.0))
    assert journal.learned_share == 0.0  # it costs more than it has won, which is told by the acceptance
