"""A disk that fills up and is freed again: a real one, where mounting is allowed, and refusals amid writes."""

import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import NEVER, Learner, count_of, nothing, numbers, observation

from hf_osd.storage import Snapshot, StateDirectory, files, snapshots


class Large(Learner):
    """Its snapshots have 200 kB."""

    def collect(self) -> Snapshot | None:
        small = super().collect()
        return small and Snapshot({"weights": {"w": torch.full((50_000,), float(self.count))}}, small.numbers)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    if sys.platform != "linux":
        pytest.skip("tmpfs is of Linux")
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mounting is not allowed: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(path: Path) -> Path:
    """Take all the room that there is."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < end, "nothing comes of it"
        time.sleep(0.005)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = (record.getMessage() for record in caplog.records)
    return [message for message in messages if "serving goes on, and every flush tries again" in message]


def left_over(path: Path) -> list[Path]:
    return list(path.rglob(f"{files.TEMPORARY}*"))


def test_a_real_disk_that_fills_up(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches what is lost, doubled, left over or never written again after a disk was full, and a log without end."""
    learner, made = Large(), 0
    with (
        caplog.at_level(logging.WARNING),
        StateDirectory(disk / "state", collect=learner.collect, flush_seconds=0.01) as state,
    ):
        for outage in range(1, 4):
            ballast, failures = fill(disk / "ballast"), state.failures
            for _ in range(6):
                learner.count += 1
                state.add(observation(made))
                made += 1
                time.sleep(0.01)
            wait(lambda failures=failures: state.failures > failures + 4)
            assert [message.count("No space left on device") for message in said(caplog)] == [1] * outage
            assert len(state.load()[1]) < made
            ballast.unlink()
            wait(lambda made=made: len(state.load()[1]) == made)
            state.flush()
            assert not left_over(disk)
            found, loaded = state.load()
            assert numbers(loaded) == list(range(made))
            assert found is not None
            assert found.numbers["count"] == learner.count
        assert state.dropped == 0
    assert len(said(caplog)) == len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 3


def test_a_real_disk_that_is_full_until_the_end(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a damaged state, or one that stays locked, where there was no room any more."""
    learner = Learner()
    with StateDirectory(disk / "state", collect=learner.collect, flush_seconds=NEVER) as state:
        learner.count = 3
        state.add(observation(0))
        state.flush()
        ballast = fill(disk / "ballast")
        learner.count = 4
        state.add(observation(1))
    assert "what came since the last flush is lost" in caplog.text
    assert not left_over(disk)
    with StateDirectory(disk / "state", collect=nothing, flush_seconds=NEVER) as state:  # as full as it is
        found, loaded = state.load()
        assert (count_of(found), numbers(loaded)) == (3, [0])
        ballast.unlink()
        state.add(observation(1))
        state.flush()
        assert numbers(state.load()[1]) == [0, 1]


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


class FullDisk:
    """Refuses content: nothing of it, half of it, or all of it once it is to be synced. Names cost nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        self.is_full = False
        fdopen, fsync, save_file = os.fdopen, os.fsync, snapshots.save_file

        def full_fdopen(*args: Any, **kwargs: Any) -> Any:
            file = fdopen(*args, **kwargs)
            if self.is_full and where != "sync" and file.writable():
                file = _Refusing(file, where == "half")
            return file

        def full_fsync(descriptor: int) -> None:
            if self.is_full:
                raise no_space()
            fsync(descriptor)

        def full_save_file(tensors: Any, path: Path) -> None:
            save_file(tensors, path)
            if self.is_full and where != "sync":
                os.truncate(path, path.stat().st_size // 2 if where == "half" else 0)
                raise no_space()

        monkeypatch.setattr(os, "fdopen", full_fdopen)
        monkeypatch.setattr(os, "fsync", full_fsync)
        monkeypatch.setattr(snapshots, "save_file", full_save_file)


class _Refusing:
    def __init__(self, file: Any, takes_half: bool) -> None:
        self._file, self._takes_half = file, takes_half

    def __enter__(self) -> "_Refusing":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        if self._takes_half:
            self._file.write(data[: len(data) // 2])
        raise no_space()


@pytest.mark.parametrize("where", ["nothing", "half", "sync"])
def test_a_disk_that_refuses_content(
    where: str,
    copied: Callable[[], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches the same where nobody may mount: in a state that is about to merge its files."""
    disk, path, learner, made = FullDisk(monkeypatch, where), copied(), Learner(), 15
    with (
        caplog.at_level(logging.WARNING),
        StateDirectory(path, collect=learner.collect, flush_seconds=0.01) as state,
    ):
        for outage in range(1, 4):
            disk.is_full = True
            failures = state.failures
            for _ in range(5):
                learner.count += 1
                state.add(observation(made))
                made += 1
            wait(lambda failures=failures: state.failures > failures + 3)
            assert len(said(caplog)) == outage
            disk.is_full = False
            wait(lambda made=made: len(state.load()[1]) == made)
            state.flush()
            assert not left_over(path)
            found, loaded = state.load()
            assert (count_of(found), numbers(loaded)) == (learner.count, list(range(made)))
        assert state.dropped == 0
    assert len(said(caplog)) == 3
