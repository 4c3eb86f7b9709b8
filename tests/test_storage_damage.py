"""Files that are damaged, deleted, foreign or of a later version: what is intact is found, and nothing stops."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from stored import (
    NEVER,
    Learner,
    Warnings,
    count_of,
    cuts,
    flips,
    nothing,
    numbers,
    observation,
    snapshot,
)

from hf_osd.errors import StateError
from hf_osd.storage import StateDirectory, read_state, snapshots, write_state
from hf_osd.storage.shards import list_shards


def test_a_deleted_directory_comes_back(copied: Callable[[], Path]) -> None:
    """Catches a directory, deleted while in use, that is never written again, or written without its lock."""
    path, learner = copied(), Learner()
    with StateDirectory(path, collect=learner.collect, flush_seconds=NEVER) as state:
        shutil.rmtree(path)
        learner.count = 4
        state.add(observation(15))
        state.flush()
        found, loaded = read_state(path)
        assert (count_of(found), numbers(loaded)) == (4, [15])
        with pytest.raises(StateError, match="in use"):
            StateDirectory(path, collect=nothing)
        shutil.rmtree(path)
        with StateDirectory(path, collect=nothing), pytest.raises(StateError, match="in use"):
            state.flush()


def test_damaged_shards_are_skipped(copied: Callable[[], Path]) -> None:
    """Catches damaged observations that are loaded, that hide intact ones, or that stop everything."""
    path, warnings = copied(), Warnings()
    shard = list_shards(path / "replay")[7]
    data = shard.path.read_bytes()
    for count, damage in enumerate([*flips(len(data), 60), *cuts(len(data), 20)], start=1):
        shard.path.write_bytes(damage(data))
        assert numbers(read_state(path)[1]) == [*range(7), *range(8, 15)]
        assert len(warnings.messages) == count
    with StateDirectory(path, collect=nothing, flush_seconds=NEVER) as state:
        for number in range(15, 60):
            state.add(observation(number))
            state.flush()  # merges go round it
        assert numbers(state.load()[1]) == [*range(7), *range(8, 60)]
        assert state.failures == 0
    assert len(list_shards(path / "replay")) < 25


def test_a_shard_that_was_away_comes_back(copied: Callable[[], Path], tmp_path: Path) -> None:
    """Catches a merge that claims rows which it does not have, so that they are taken for old copies and removed."""
    path = copied()
    away = list_shards(path / "replay")[7].path
    away.rename(tmp_path / away.name)
    with StateDirectory(path, collect=nothing, flush_seconds=NEVER) as state:
        for number in range(15, 40):
            state.add(observation(number))
            state.flush()
        (tmp_path / away.name).rename(away)
        state.flush()
        assert numbers(state.load()[1]) == list(range(40))


def test_damaged_snapshots_are_skipped(copied: Callable[[], Path]) -> None:
    """Catches a snapshot that is loaded with wrong bytes in any of its files, and one that hides the one before it."""
    path, warnings = copied(), Warnings()
    newest = max((path / "snapshots").iterdir())
    assert {count_of(read_state(path)[0])} == {2}
    for file in sorted(newest.iterdir()):
        data = file.read_bytes()
        for damage in [*flips(len(data), 60), *cuts(len(data), 20)]:
            file.write_bytes(damage(data))
            before = len(warnings.messages)
            assert count_of(snapshots.read_newest_snapshot(path / "snapshots")) == 1
            assert len(warnings.messages) == before + 1
        file.unlink()
        assert count_of(read_state(path)[0]) == 1
        file.write_bytes(data)
    assert count_of(read_state(path)[0]) == 2


def test_everything_damaged_is_a_clean_start(copied: Callable[[], Path]) -> None:
    """Catches a process that cannot start, or cannot save again, because of what it finds."""
    path = copied()
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"not what it was")
    learner = Learner()
    with StateDirectory(path, collect=learner.collect, flush_seconds=NEVER) as state:
        assert state.load() == (None, [])
        learner.count = 3
        state.add(observation(0))
        state.flush()
        found, loaded = state.load()
        assert (count_of(found), numbers(loaded)) == (3, [0])


def test_foreign_files_stay(copied: Callable[[], Path]) -> None:
    """Catches files of others that are read, deleted, or in the way."""
    path = copied()
    foreign = [path / "notes.txt", path / "replay/other.parquet", path / "snapshots/snapshot-old", path / ".hidden"]
    foreign.append(path / "snapshots/snapshot-000077")  # a file, where snapshots are folders
    for file in foreign:
        file.write_text("mine")
    (path / "snapshots/more").mkdir()
    with StateDirectory(path, collect=nothing, flush_seconds=NEVER) as state:
        state.add(observation(15))
        state.flush()
        found, loaded = state.load()
        assert (count_of(found), numbers(loaded)) == (2, list(range(16)))
    assert all(file.read_text() == "mine" for file in foreign)
    assert (path / "snapshots/more").is_dir()


def test_a_foreign_parquet_file_under_a_shards_name(tmp_path: Path) -> None:
    """Catches other columns that are read as observations, with whatever is missing made up."""
    import hashlib
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    write_state(tmp_path, snapshot(1), [observation(0)])
    sink = io.BytesIO()
    pq.write_table(pa.table({"number": [2], "text": ["a"]}), sink)
    name = hashlib.sha256(sink.getvalue()).hexdigest()[:16]
    (tmp_path / f"replay/replay-{2:012d}-{2:012d}-{name}.parquet").write_bytes(sink.getvalue())
    assert numbers(read_state(tmp_path)[1]) == [0]


@pytest.mark.parametrize(("version", "what_to_do"), [(2, "delete it"), (4, "update hf_osd")])
def test_another_format_is_refused(
    version: int, what_to_do: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a state of another version that is misread, or deleted as damaged."""
    path = tmp_path / "state"
    monkeypatch.setattr(snapshots, "FORMAT", version)
    write_state(path, snapshot(5), [observation(0)])
    monkeypatch.undo()
    before = sorted(path.rglob("*"))
    with pytest.raises(StateError, match=f"format {version}, written by hf_osd .*: {what_to_do}, or use another"):
        StateDirectory(path, collect=nothing)
    with pytest.raises(StateError, match=what_to_do):
        read_state(path)
    assert sorted(path.rglob("*")) == before
    shutil.rmtree(path / "snapshots")
    StateDirectory(path, collect=nothing).close()  # the refusal left no lock
