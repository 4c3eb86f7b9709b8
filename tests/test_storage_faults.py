"""Damage, refusals of the disk, and death at every single step: what is left is whole, and serving never notices."""

import contextlib
import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stored import Learner, Warnings, count_of, cuts, flips, numbers, observation, snapshot

from hf_osd.errors import ConfigError, HfOsdError, StateError
from hf_osd.learning.storage import StateDirectory, files, lock, read_state, snapshots, write_state
from hf_osd.learning.storage import directory as directory_module
from hf_osd.learning.storage.replay_log import ReplayLog
from hf_osd.learning.storage.rows import to_row
from hf_osd.learning.storage.shards import list_shards, read_observations
from hf_osd.learning.storage.store import Store

NEVER = 3600.0  # seconds until a flush that no test waits for
SYSTEM_CALLS = ("open", "write", "fsync", "mkdir", "replace", "rename", "unlink", "rmdir", "chmod", "fdopen")


def nothing() -> None:
    return None


@pytest.fixture(scope="module")
def aged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the next flush does everything: 15 small shards and 2 snapshots."""
    path = tmp_path_factory.mktemp("aged") / "state"
    learner = Learner()
    with StateDirectory(path, collect=learner.collect, flush_seconds=NEVER) as state:
        for number in range(15):
            state.add(observation(number))
            learner.count = number // 8 + 1
            state.flush()
    assert len(list_shards(path / "replay")) == 15
    return path


@pytest.fixture
def copied(aged: Path, tmp_path: Path) -> Callable[[], Path]:
    """A new copy of it at each call."""

    def copy() -> Path:
        shutil.rmtree(tmp_path / "state", ignore_errors=True)
        return Path(shutil.copytree(aged, tmp_path / "state"))

    return copy


class Interference:
    """Counts the calls that change a disk, and does something at one of them, or from one of them on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, under: Path, error: Callable[[], BaseException]) -> None:
        self.calls, self.at, self.lasts, self.armed = 0, -1, False, False
        self._under, self._error = str(under), error
        for name in SYSTEM_CALLS:
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))
        monkeypatch.setattr(snapshots, "save_file", self._wrap(snapshots.save_file))

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._meddle()
            return function(*args, **kwargs)

        return call

    def _meddle(self) -> None:
        if not self.armed:
            return
        self.calls += 1
        if self.calls == self.at or (self.lasts and self.calls >= self.at):
            raise self._error()

    @contextlib.contextmanager
    def starting(self, at: int, lasts: bool) -> Iterator[None]:
        self.calls, self.at, self.lasts, self.armed = 0, at, lasts, True
        try:
            yield
        finally:
            self.armed = False


class Killed(BaseException):
    """Stands for the end of the process: nothing reaches the disk from here on."""


def test_death_at_every_step(copied: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches any step of a flush, a merge or a clean-up whose interruption loses, doubles or damages something."""
    interference, warnings = Interference(monkeypatch, tmp_path, Killed), Warnings()
    at, merges_cut = 0, 0
    while True:
        at += 1
        path = copied()
        finished, done = _die_in_flush(path, interference, at)
        found, loaded = read_state(path)
        assert numbers(loaded) in ([list(range(15)), list(range(16))] if not done["rows"] else [list(range(16))])
        assert count_of(found) in ([2, 9] if not done["snapshot"] else [9])
        assert len(loaded) == 16 or count_of(found) == 2, "the snapshot knows more than there is"
        for _, folder in snapshots.list_snapshots(path / "snapshots"):
            snapshots._read(folder)  # old ones too: there or gone
        merges_cut += 1 < len(list_shards(path / "replay")) < 16
        with StateDirectory(path, collect=nothing, flush_seconds=NEVER) as state:  # the next life
            assert not list(path.rglob(f"{files.TEMPORARY}*"))
            expected = numbers(loaded)
            assert numbers(state.load()[1]) == expected
            state.add(observation(len(expected)))
            state.flush()
            assert numbers(state.load()[1]) == list(range(len(expected) + 1))
            left = list_shards(path / "replay")
            assert not any(one.covers(other) for one in left for other in left if one is not other)
        if finished:
            break
    assert at > 40
    assert merges_cut > 5
    assert warnings.messages == []  # nothing that is left looks damaged


def test_death_while_old_observations_leave(
    copied: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a hole in what is kept, where newer observations leave before older ones."""
    interference, kept = Interference(monkeypatch, tmp_path, Killed), set()
    for at in range(1, 30):
        folder = copied() / "replay"
        log = ReplayLog(folder, max_bytes=2 * max(shard.path.stat().st_size for shard in list_shards(folder)))
        with contextlib.suppress(Killed), interference.starting(at, lasts=True):
            log._remove_old()
        found = numbers(read_observations(folder))
        assert found == list(range(15 - len(found), 15))
        kept.add(len(found))
    assert len(kept) > 10  # it died between any two


def _die_in_flush(path: Path, interference: Interference, at: int) -> tuple[bool, dict[str, bool]]:
    """Open a state, append, merge, and write a snapshot, until the process dies at its n-th call."""
    done = {"rows": False, "snapshot": False}
    try:
        with interference.starting(at, lasts=True):
            store = Store(path)
            store.append([to_row(observation(15))])
            done["rows"] = True
            store.tidy()
            store.save(snapshot(9))
            done["snapshot"] = True
        return True, done
    except Killed:
        return False, done
    finally:
        lock._leave_to_parent()  # the operating system frees the lock of a dead process


def test_refusal_at_every_step(copied: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a refusal of the disk, once at any step, after which something is lost, doubled or never written."""
    interference = Interference(monkeypatch, tmp_path, lambda: OSError(errno.ENOSPC, "No space left on device"))
    at = failures = 0
    while True:
        at += 1
        learner, path = Learner(), copied()
        learner.count = 9
        with StateDirectory(path, collect=learner.collect, flush_seconds=NEVER) as state:
            state.add(observation(15))
            with interference.starting(at, lasts=False):
                with contextlib.suppress(StateError):
                    state.flush()
                finished = interference.calls < at
            state.add(observation(16))
            state.flush()
            found, loaded = state.load()
            assert (count_of(found), numbers(loaded)) == (9, list(range(17)))
            assert state.dropped == 0
            assert state.failures <= 1
            failures += state.failures
        if finished:
            break
    assert failures > 30


def test_a_failing_disk_is_said_once(
    copied: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a log that fills the disk which is full already, silence, and memory that grows while it is."""
    monkeypatch.setattr(directory_module, "_MAX_PENDING", 40 * to_row(observation(3)).nbytes)
    interference = Interference(monkeypatch, tmp_path, lambda: OSError(errno.ENOSPC, "No space left on device"))
    path = copied()
    with StateDirectory(path, collect=nothing, flush_seconds=0.001) as state, caplog.at_level(logging.WARNING):
        with interference.starting(1, lasts=True):
            for number in range(15, 15 + 12 * 40):
                state.add(observation(number))
            end = time.monotonic() + 60
            while state.failures < 12 and time.monotonic() < end:
                time.sleep(0.01)
        assert state.failures >= 12
        assert 300 < state.dropped < 480
        assert caplog.text.count("No space left on device; serving goes on, and every flush tries again") == 1
        state.flush()
        kept = numbers(state.load()[1])[15:]
        assert kept == list(range(kept[0], 15 + 12 * 40))
        assert len(kept) + state.dropped == 12 * 40


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_the_system_refuses_to_write(tmp_path: Path) -> None:
    """Catches refusals that only real writes meet, in the native code of safetensors too."""
    import resource

    import torch

    from hf_osd.learning.storage import Snapshot

    large = Snapshot({"weights": {"w": torch.zeros(100_000)}}, {"count": 1})
    made = [large]
    with StateDirectory(tmp_path, collect=nothing, flush_seconds=NEVER) as state:
        state._writer._collect = lambda: lambda: made.pop() if made else None
        state.add(observation(0))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(StateError, match="too large"):
                state.flush()
            assert state.load()[0] is None
            assert numbers(state.load()[1]) == [0]
            assert not list(tmp_path.rglob(f"{files.TEMPORARY}*"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        state.flush()  # the snapshot was not forgotten, though `collect` has nothing new
        assert state.load()[0] is not None


def test_a_failing_collect_costs_no_observation(tmp_path: Path) -> None:
    """Catches observations that are not written because the learner's state cannot be had."""

    def collect() -> None:
        raise RuntimeError("the learner is ill")

    with StateDirectory(tmp_path, collect=collect, flush_seconds=NEVER) as state:
        state.add(observation(0))
        with pytest.raises(StateError, match="the learner is ill"):
            state.flush()
        assert numbers(state.load()[1]) == [0]


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


def test_a_newer_format_is_refused(copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a state of a later version that is misread, or deleted as damaged."""
    path = copied()
    monkeypatch.setattr(snapshots, "FORMAT", 2)
    write_state(path, snapshot(5), [])
    monkeypatch.undo()
    before = sorted(path.rglob("*"))
    with pytest.raises(StateError, match="format 2"):
        StateDirectory(path, collect=nothing)
    with pytest.raises(StateError, match="update hf_osd"):
        read_state(path)
    assert sorted(path.rglob("*")) == before
    shutil.rmtree(path / "snapshots")
    StateDirectory(path, collect=nothing).close()  # the refusal left no lock


def test_a_path_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start that goes well though nothing can ever be written, and an error that does not say why."""
    (tmp_path / "file").write_text("a file")
    for use in (lambda p: StateDirectory(p, collect=nothing), read_state, lambda p: write_state(p, snapshot(1), [])):
        with pytest.raises(StateError, match="it is a file"):
            use(tmp_path / "file")
    with pytest.raises(StateError, match="file"):
        StateDirectory(tmp_path / "file/below", collect=nothing)
    refused = OSError(errno.EROFS, "Read-only file system")
    interference = Interference(monkeypatch, tmp_path, lambda: refused)
    with interference.starting(1, lasts=True), pytest.raises(StateError, match="Read-only file system") as caught:
        StateDirectory(tmp_path, collect=nothing)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, HfOsdError)
    assert not isinstance(caught.value, ConfigError)


def test_content_is_on_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a missing or late `fsync`: after a power cut a name would be there, and its content would not."""
    synced: set[int] = set()
    names: list[str] = []
    unsynced_folders: set[Path] = set()
    real_fsync, real_replace, real_rename = os.fsync, os.replace, os.rename

    def fsync(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        synced.add(inode)
        unsynced_folders.difference_update([f for f in unsynced_folders if f.exists() and f.stat().st_ino == inode])
        real_fsync(descriptor)

    def check(source: Path, target: Path) -> None:
        assert not unsynced_folders, "a name before this one is not on disk yet"
        if Path(target).name.startswith(files.TEMPORARY):
            return  # on its way out
        for path in [Path(source), *Path(source).rglob("*")]:
            assert path.stat().st_ino in synced, f"{path} is not on disk"
        names.append(Path(target).name)
        unsynced_folders.add(Path(target).parent)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (check(a, b), real_replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (check(a, b), real_rename(a, b)))
    learner = Learner()
    with StateDirectory(tmp_path, collect=learner.collect, flush_seconds=NEVER) as state:
        for learner.count in range(1, 18):
            state.add(observation(learner.count))
            state.flush()
            assert not unsynced_folders
    assert {"manifest.json", "numbers.json", "snapshot-000017"} <= set(names)
    assert sum(name.endswith(".parquet") for name in names) == 18  # a merge among them
