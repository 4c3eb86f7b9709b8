"""The thread that writes a state directory: when it does, beside which others, and until when."""

import gc
import math
import os
import threading
import time
import weakref
from pathlib import Path

import pytest
from stored import NEVER, Learner, count_of, nothing, numbers, observation, replay_of, snapshot

from hf_osd.errors import ClosedError, ConfigError, StateError
from hf_osd.records import Observation
from hf_osd.storage import Snapshot, StateDirectory, read_state, write_state
from hf_osd.storage import directory as directory_module
from hf_osd.storage.rows import to_row


def test_the_thread_flushes(tmp_path: Path) -> None:
    """Catches a thread that only writes when it is asked to."""
    learner = Learner()
    with StateDirectory(tmp_path, collect=learner.collect, flush_seconds=0.01) as state:
        learner.count = 3
        state.add(observation(0))
        end = time.monotonic() + 60
        while (not replay_of(tmp_path) or read_state(tmp_path)[0] is None) and time.monotonic() < end:
            time.sleep(0.01)
        found, loaded = read_state(tmp_path)  # beside the writer, without its lock
        assert (count_of(found), numbers(loaded)) == (3, [0])


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    """Catches empty shards, and snapshots that are written again though nothing has been learned."""
    learner = Learner()
    learner.count = 1
    with StateDirectory(tmp_path, collect=learner.collect, flush_seconds=NEVER) as state:
        state.flush()
        before = sorted(tmp_path.rglob("*"))
        state.flush()
        assert sorted(tmp_path.rglob("*")) == before


def test_half_of_the_memory_wakes_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches busy serving that loses observations between two flushes though the disk is fast enough."""
    monkeypatch.setattr(directory_module, "_MAX_PENDING", 4 * to_row(observation(3)).nbytes)
    with StateDirectory(tmp_path, collect=nothing, flush_seconds=NEVER) as state:
        for number in (3, 15, 27):  # of one size
            state.add(observation(number))
        end = time.monotonic() + 60
        while not replay_of(tmp_path) and time.monotonic() < end:
            time.sleep(0.01)
        assert replay_of(tmp_path)


def test_a_snapshot_never_knows_more_than_there_is(tmp_path: Path) -> None:
    """Catches a snapshot that counts requests which come between its making and the writing of observations."""
    learner = Learner()

    def collect() -> Snapshot | None:
        for number in range(1, 3):  # served just before the learner's state is taken
            state.add(observation(number))
            learner.count = number + 1
        return learner.collect()

    state = StateDirectory(tmp_path, collect=collect, flush_seconds=NEVER)
    state.add(observation(0))
    state.flush()
    found, loaded = state.load()
    assert len(numbers(loaded)) >= count_of(found) == 3
    state.close()


def test_closed(tmp_path: Path) -> None:
    """Catches writes after the lock is gone, and a second `close` that fails."""
    state = StateDirectory(tmp_path, collect=nothing)
    state.add(observation(0))
    state.close()
    state.close()
    state.add(observation(1))
    with pytest.raises(ClosedError):
        state.flush()
    assert numbers(state.load()[1]) == [0]


def test_the_thread_keeps_no_owner(tmp_path: Path) -> None:
    """Catches an assistant that lives on, with all its weights, because the writing thread holds it."""

    class Owner:
        def __init__(self) -> None:
            self.state = StateDirectory(tmp_path, collect=self.collect, flush_seconds=0.001, redact=self.redact)

        def collect(self) -> Snapshot | None:
            return None

        def redact(self, made: Observation) -> Observation:
            return made

    owner = Owner()
    owner.state.add(observation(0))
    thread, alive = owner.state._writer._thread, weakref.ref(owner)
    assert thread.name == "hf_osd-writer"
    assert thread.daemon
    del owner
    end = time.monotonic() + 60
    while alive() is not None and time.monotonic() < end:
        gc.collect()
    assert alive() is None
    thread.join(60)
    assert not thread.is_alive()
    assert numbers(read_state(tmp_path)[1]) == [0]
    StateDirectory(tmp_path, collect=nothing).close()  # the lock is free


@pytest.mark.parametrize("setting", [{"flush_seconds": 0}, {"max_bytes": 0}, {"time_to_live": math.nan}])
def test_settings_are_checked(tmp_path: Path, setting: dict[str, float]) -> None:
    """Catches a thread that spins, or a replay that keeps nothing, because of a setting."""
    with pytest.raises(ConfigError, match=next(iter(setting))):
        StateDirectory(tmp_path / "state", collect=nothing, **setting)
    assert not (tmp_path / "state").exists()


def test_one_writer(tmp_path: Path) -> None:
    """Catches two assistants that overwrite each other's state; another process: see `test_storage_kill.py`."""
    with StateDirectory(tmp_path, collect=nothing):
        with pytest.raises(StateError, match=f"in use by process {os.getpid()}"):
            StateDirectory(tmp_path, collect=nothing)
        with pytest.raises(StateError, match="in use"):
            write_state(tmp_path, snapshot(1), [])
    StateDirectory(tmp_path, collect=nothing).close()


def test_many_threads_add(tmp_path: Path) -> None:
    """Catches observations that get lost between threads that serve and the one that writes."""
    with StateDirectory(tmp_path, collect=nothing, flush_seconds=0.001) as state:
        adders = [
            threading.Thread(target=lambda start=start: [state.add(observation(n)) for n in range(start, 100, 4)])
            for start in range(4)
        ]
        for adder in adders:
            adder.start()
        for adder in adders:
            adder.join()
    assert sorted(numbers(read_state(tmp_path)[1])) == list(range(100))


def test_nothing_ends_the_thread_in_silence(tmp_path: Path) -> None:
    """Catches a writer that ends where somebody's code calls `sys.exit`, so that nothing is written any more."""
    calls: list[int] = []

    def collect() -> Snapshot | None:
        calls.append(1)
        if len(calls) == 1:
            raise SystemExit(3)
        return None

    with StateDirectory(tmp_path, collect=collect, flush_seconds=0.01) as state:
        end = time.monotonic() + 60
        while len(calls) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert (len(calls) >= 3, state.failures) == (True, 1)
