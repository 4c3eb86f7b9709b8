"""Refusals of the disk, and death at every single step: what is left is whole, and serving never notices."""

import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stored import NEVER, Learner, Warnings, count_of, nothing, numbers, observation, snapshot

from hf_osd.errors import ConfigError, HfOsdError, StateError
from hf_osd.storage import StateDirectory, files, lock, read_state, snapshots, write_state
from hf_osd.storage import directory as directory_module
from hf_osd.storage.replay_log import ReplayLog
from hf_osd.storage.rows import to_row
from hf_osd.storage.shards import list_shards, read_observations
from hf_osd.storage.store import Store

SYSTEM_CALLS = ("open", "write", "fsync", "mkdir", "replace", "rename", "unlink", "rmdir", "chmod", "fdopen")


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

    from hf_osd.storage import Snapshot

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
