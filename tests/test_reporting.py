"""The report: what is in its JSON, its picture, and what happens where it cannot be drawn or written."""

import json
import logging
import math
import random
from typing import get_args

import pytest

from hf_osd import InputError, OnlineStats, reporting
from hf_osd.journal import Decision, Drift, Journal, JudgedRequest, UpdateRecord
from hf_osd.reporting import moving_acceptance, to_json, write_report

STATS = OnlineStats(requests=6, accepted_tokens=3, draft_tokens=4)


def journal() -> Journal:
    """A journal with every decision, an update without figures, one that is not finite, and a drift."""
    made = Journal()
    for number in range(1, 7):
        made.add(JudgedRequest(request=number, acceptance=number / 10, positions=10 * number, accepted=1.0))
    for number, decision in enumerate(get_args(Decision), 1):
        made.add(UpdateRecord(number, decision, "because", 1.5, 1e-3, 0.1, 0.02, 0.3))
    made.add(UpdateRecord(6, "failed", "weights are not finite", math.nan))
    made.add(Drift(request=5, short=0.2, long=0.5))
    return made


def test_report_holds_the_journal_and_the_counters(tmp_path):
    """Catches entries that are dropped or renamed on the way, and a summary that counts something else."""
    made = journal()
    paths = write_report(made, STATS, tmp_path / "new" / "folder", window=2)
    assert [path.name for path in paths] == ["report.json", "report.png"]
    document = json.loads(paths[0].read_text())
    assert document["stats"] == STATS.to_dict()
    assert document["requests"] == made.to_dict()["requests"]
    assert [update["decision"] for update in document["updates"]] == [*get_args(Decision), "failed"]
    assert document["drifts"] == [{"request": 5, "short": 0.2, "long": 0.5}]
    summary = document["summary"]
    assert summary["decisions"] == dict.fromkeys(get_args(Decision), 1) | {"failed": 2}
    assert summary["acceptance_first"] == pytest.approx((0.1 * 10 + 0.2 * 20) / 30)
    assert summary["acceptance_last"] == pytest.approx((0.5 * 50 + 0.6 * 60) / 110)


def test_numbers_that_json_does_not_know_become_null():
    """Catches `NaN` in the file, which Python reads back and no other JSON parser does."""
    document = to_json(journal(), STATS)
    assert document["updates"][-1]["loss"] is None
    json.dumps(document, allow_nan=False)


def test_moving_average_weighs_positions():
    """Catches a window that is off by one, or in which a request of one position counts as much as one of sixty."""
    source = random.Random(0)
    requests = [JudgedRequest(n, source.random(), source.randint(0, 60), 0.0) for n in range(40)]
    for number, found in enumerate(moving_acceptance(requests, 7)):
        last = requests[max(0, number - 6) : number + 1]
        positions = [(one.acceptance, one.positions) for one in last]
        assert found == pytest.approx(sum(a * n for a, n in positions) / sum(n for _, n in positions))


def test_picture_shows_every_decision(tmp_path):
    """Catches a decision without a marker, and a picture that fails on missing figures or an empty journal."""
    assert tuple(reporting._STYLES) == get_args(Decision)
    whole, empty = (write_report(made, STATS, tmp_path / name)[1].read_bytes() for made, name in PICTURES)
    assert whole[:8] == empty[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(whole) > len(empty)


PICTURES = ((journal(), "whole"), (Journal(), "empty"))


def test_next_report_replaces_the_last(tmp_path):
    """Catches half-written files left beside the report, and figures of an earlier one that survive."""
    write_report(journal(), STATS, tmp_path)
    write_report(Journal(), OnlineStats(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]
    assert json.loads((tmp_path / "report.json").read_text())["requests"] == []


def test_without_matplotlib_the_json_is_written(tmp_path, monkeypatch, caplog):
    """Catches a report lost for want of a picture, and a picture missing without a word."""
    monkeypatch.setattr(reporting, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in write_report(journal(), STATS, tmp_path)] == ["report.json"]
    assert "hf-osd[plot]" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        write_report(journal(), STATS, tmp_path, plot=False)
    assert caplog.text == ""


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path):
    """Catches a folder made, or half a report written, for a call that cannot succeed."""
    with pytest.raises(InputError, match="window must be an integer of at least 1, got 0"):
        write_report(journal(), STATS, tmp_path / "folder", window=0)
    assert not (tmp_path / "folder").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        write_report(journal(), STATS, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_fell_back_and_why(tmp_path):
    """Catches a report of a run that hardly speculated, and does not say so."""
    reasons = {"beam search": 1, "stateful logits processor": 4}
    stats = OnlineStats(requests=9, fallbacks=5, fallback_reasons=reasons)
    assert to_json(Journal(), stats)["stats"]["fallback_reasons"] == reasons
    line = "5 of 9 prompts without draft or speculation: stateful logits processor (4), beam search (1)"
    assert reporting._fallbacks(stats) == line
    assert reporting._fallbacks(OnlineStats()) == ""
    titled = write_report(Journal(), stats, tmp_path)[1].read_bytes()
    assert len(titled) > len(write_report(Journal(), OnlineStats(), tmp_path)[1].read_bytes())
