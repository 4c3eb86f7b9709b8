"""Fixtures of more than one file."""

import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from stored import age, copier
from transformers.utils.logging import enable_propagation

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for what only developers run, which is not installed
if not (ROOT / "benchmarks").is_dir():  # a source distribution has the tests, and not the benchmarks
    collect_ignore_glob = [f"test_{name}*.py" for name in ("laboratory", "suites", "support", "tables")]

# The same examples in every run: a run that fails can be repeated, and no other one fails by chance.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

enable_propagation()  # else caplog sees nothing of transformers, nor of hf_osd, which logs as transformers does


@pytest.fixture(autouse=True)
def no_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's real target may be installed; tests serve the embedded pair."""
    monkeypatch.setattr("hf_osd.demo.smollm2.find_target", lambda: None)


@pytest.fixture(scope="module")
def aged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the next flush does everything: 15 small shards and 2 snapshots."""
    return age(tmp_path_factory.mktemp("aged") / "state")


@pytest.fixture
def copied(aged: Path, tmp_path: Path) -> Callable[[], Path]:
    """A new copy of it at each call."""
    return copier(aged, tmp_path / "state")
