"""The state directory where nothing goes wrong: what it keeps, in which form, and what leaves."""

import dataclasses
import gc
import json
import math
import os
import stat
import sys
import threading
import time
import weakref
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import FIELDS, Learner, count_of, numbers, observation, snapshot

from hf_osd.errors import ClosedError, ConfigError, StateError
from hf_osd.learning.storage import Snapshot, StateDirectory, read_state, write_state
from hf_osd.learning.storage import directory as directory_module
from hf_osd.learning.storage.replay_log import ReplayLog
from hf_osd.learning.storage.rows import from_table, to_row, to_table
from hf_osd.learning.storage.shards import list_shards, read_observations
from hf_osd.records import Observation

NEVER = 3600.0  # seconds until a flush that no test waits for


def nothing() -> None:
    return None


def replay_of(path: Path) -> list[Path]:
    return [shard.path for shard in list_shards(path / "replay")]


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    prompt, output, k = draw(st.integers(0, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    ids = st.integers(-1, 2**31 - 1)
    floats = st.floats(width=32)

    def tensor(values: st.SearchStrategy, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype).reshape(shape)

    return Observation(
        prompt_ids=tensor(ids, torch.long, prompt),
        output_ids=tensor(ids, torch.long, output),
        teacher_ids=tensor(ids, torch.long, output, k),
        teacher_log_probs=tensor(floats, torch.float32, output, k),
        teacher_tail=tensor(floats, torch.float32, output),
        draft_ids=tensor(ids, torch.long, output),
        accepted=tensor(st.booleans(), torch.bool, output),
    )


@given(st.lists(observations(), min_size=1, max_size=4), st.data())
@settings(deadline=None, max_examples=60)
def test_rows_are_exact(made: list[Observation], data: st.DataObject) -> None:
    """Catches lost bits, swapped fields, and shapes confused by requests of other lengths or other `k`."""
    start = data.draw(st.integers(0, len(made) - 1))
    loaded = from_table(to_table([to_row(one) for one in made], first=7).slice(start))
    assert len(loaded) == len(made) - start
    for before, after in zip(made[start:], loaded, strict=True):
        for name in FIELDS:
            left, right = getattr(before, name), getattr(after, name)
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert left.numpy().tobytes() == right.numpy().tobytes()  # NaN and -0.0 included


def test_datasets_reads_the_replay(tmp_path: Path) -> None:
    """Catches a layout or column types that `datasets` cannot load."""
    write_state(tmp_path / "state", snapshot(1), [observation(number) for number in range(9)])
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "state/replay/*.parquet"), cache_dir=str(tmp_path), split="train"
    )
    files = [str(path) for path in replay_of(tmp_path / "state")]
    assert loaded.to_list() == datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path)).to_list()
    assert set(loaded.column_names) == {*FIELDS, "number", "recorded_at"}
    for number, row in enumerate(loaded):
        assert all(row[name] == getattr(observation(number), name).tolist() for name in FIELDS)
    assert abs(loaded[0]["recorded_at"].timestamp() - time.time()) < 3600


def test_state_survives(tmp_path: Path) -> None:
    """Catches observations lost, doubled or out of order over several lives of a directory, and stale snapshots."""
    learner = Learner()
    for life in range(3):
        with StateDirectory(tmp_path / "state", collect=learner.collect, flush_seconds=NEVER) as state:
            found, loaded = state.load()
            assert count_of(found) == 10 * life
            assert numbers(loaded) == list(range(4 * life))
            for number in range(4 * life, 4 * life + 4):
                state.add(observation(number))
                if number % 2:
                    state.flush()
            learner.count += 10
    found, loaded = read_state(tmp_path / "state", limit=5)
    assert count_of(found) == 30
    assert numbers(loaded) == list(range(7, 12))


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


def test_snapshots_of_any_tensors(tmp_path: Path) -> None:
    """Catches what safetensors refuses: shared memory, other strides, no elements, no tensors."""
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": shared,
        "b": shared,
        "t": shared.T,
        "row": shared[1],
        "empty": torch.empty(0, 3),
        "s": shared.sum(),
    }
    write_state(tmp_path, Snapshot({"weights": tensors, "none": {}}, {"nan": math.nan, "text": "ä"}), [])
    found, loaded = read_state(tmp_path)
    assert found is not None
    assert loaded == []
    assert found.tensors["none"] == {}
    assert found.numbers["text"] == "ä"
    assert math.isnan(found.numbers["nan"])
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors["weights"][name], tensor)


def test_loaded_tensors_do_not_depend_on_the_disk(tmp_path: Path) -> None:
    """Catches tensors that are mapped files: they change with the file, or kill the process when it is cut."""
    write_state(tmp_path, snapshot(5), [])
    found, _ = read_state(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        with path.open("rb+") as file:
            file.write(bytes(path.stat().st_size))
    assert count_of(found) == 5


def test_last_two_snapshots_stay(tmp_path: Path) -> None:
    """Catches a disk that fills with snapshots, and a single one, whose damage would lose everything."""
    learner = Learner()
    with StateDirectory(tmp_path, collect=learner.collect, flush_seconds=NEVER) as state:
        for learner.count in range(1, 6):
            state.flush()
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["snapshot-000004", "snapshot-000005"]


def test_manifest_says_what_is_there(tmp_path: Path) -> None:
    """Catches a manifest that others cannot check files against."""
    write_state(tmp_path, snapshot(1), [])
    folder = next((tmp_path / "snapshots").iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert set(manifest["files"]) == {"weights.safetensors", "optimizer.safetensors", "numbers.json"}
    assert {"hf_osd_version", "created_at", "sha256"} < set(manifest)
    for name, entry in manifest["files"].items():
        assert entry["size"] == (folder / name).stat().st_size


def test_small_shards_become_few(tmp_path: Path) -> None:
    """Catches thousands of tiny files, and a merge that loses or reorders rows."""
    log = ReplayLog(tmp_path)
    for number in range(100):
        log.append([to_row(observation(number))])
        log.tidy()
        assert len(list_shards(tmp_path)) <= 17
    assert numbers(log.read()) == list(range(100))


def test_oldest_leave_where_the_disk_is_bounded(tmp_path: Path) -> None:
    """Catches an unbounded replay, and one that forgets the newest instead of the oldest."""
    bound = 40_000
    log = ReplayLog(tmp_path, max_bytes=bound)
    for number in range(60):
        log.append([to_row(observation(number))])
        assert sum(shard.path.stat().st_size for shard in list_shards(tmp_path)) < 1.25 * bound
        log.tidy()
        assert sum(shard.path.stat().st_size for shard in list_shards(tmp_path)) <= bound
    kept = numbers(log.read())
    assert kept == list(range(60 - len(kept), 60))
    assert 5 <= len(kept) < 60


def test_large_flushes_are_cut(tmp_path: Path) -> None:
    """Catches one shard larger than the bound, which would leave at once and take everything with it."""
    with StateDirectory(tmp_path, collect=nothing, flush_seconds=NEVER, max_bytes=50_000) as state:
        for number in range(200):
            state.add(observation(number))
        state.flush()
        kept = numbers(state.load()[1])
    assert kept == list(range(200 - len(kept), 200))
    assert len(kept) > 5


def test_time_to_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that are loaded, or files that stay, after their time; and merges that keep old rows alive."""
    now, log = time.time_ns(), ReplayLog(tmp_path, time_to_live=1000.0)
    for number in range(100):  # 1500 to 510 seconds ago
        monkeypatch.setattr(time, "time_ns", lambda number=number: now - (1500 - 10 * number) * 10**9)
        log.append([to_row(observation(number))])
        log.tidy()
    assert numbers(log.read()) == list(range(51, 100))
    on_disk = numbers(read_observations(tmp_path))
    assert min(on_disk) >= 51 - 13  # an eighth of the time to live
    assert len(list_shards(tmp_path)) <= 25


def test_redaction_comes_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches content that reaches the disk though `redact` removed it, refused it, or failed."""

    def redact(made: Observation) -> Observation | None:
        number = int(made.prompt_ids[0])
        if number == 1:
            return None
        if number == 2:
            raise RuntimeError("no rule for this")
        return dataclasses.replace(made, prompt_ids=torch.tensor([90 + number])) if number == 3 else made

    with StateDirectory(tmp_path, collect=nothing, flush_seconds=NEVER, redact=redact) as state:
        for number in range(5):
            state.add(observation(number))
        assert state.dropped == 1
    loaded = read_state(tmp_path)[1]
    assert [one.prompt_ids[0].item() for one in loaded] == [0, 93, 4]
    assert len(loaded[1].prompt_ids) == 1
    assert caplog.text.count("not kept on disk") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"draft_ids": torch.zeros(9, dtype=torch.long)},
        {"teacher_ids": torch.zeros(3, 5, dtype=torch.long)},
        {"teacher_tail": torch.zeros(3, 1)},
        {"prompt_ids": torch.tensor([2**31])},
        {"prompt_ids": None},
    ],
)
def test_unsound_observations_harm_nothing(tmp_path: Path, change: dict[str, object]) -> None:
    """Catches one bad observation that raises into serving, or that makes every later flush fail."""
    with StateDirectory(tmp_path, collect=nothing, flush_seconds=NEVER) as state:
        state.add(dataclasses.replace(observation(2), **change))
        state.add(observation(5))
        state.flush()
        assert state.dropped == 1
    assert numbers(read_state(tmp_path)[1]) == [5]


def test_observations_without_output_are_ignored(tmp_path: Path) -> None:
    """Catches rows that nothing can be learned from, or warnings about them."""
    empty = {name: getattr(observation(3), name)[:0] for name in FIELDS if name != "prompt_ids"}
    with StateDirectory(tmp_path, collect=nothing, flush_seconds=NEVER) as state:
        state.add(dataclasses.replace(observation(3), **empty))
        state.flush()
        assert state.dropped == 0
        assert not replay_of(tmp_path)


def test_pending_observations_are_copies(tmp_path: Path) -> None:
    """Catches rows that change on their way to disk, because someone else writes into their tensors."""
    with StateDirectory(tmp_path, collect=nothing, flush_seconds=NEVER) as state:
        made = observation(6)
        state.add(made)
        made.output_ids.zero_()
        made.teacher_log_probs.zero_()
    assert numbers(read_state(tmp_path)[1]) == [6]


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


def test_write_state_replaces(tmp_path: Path) -> None:
    """Catches observations or snapshots of an earlier save that come back after a later one."""
    write_state(tmp_path, snapshot(1), [observation(number) for number in range(5)])
    write_state(tmp_path, snapshot(2), [observation(number) for number in range(7, 9)])
    found, loaded = read_state(tmp_path)
    assert (count_of(found), numbers(loaded)) == (2, [7, 8])
    assert len(list((tmp_path / "snapshots").iterdir())) == len(replay_of(tmp_path)) == 1
    with StateDirectory(tmp_path, collect=nothing) as state:
        assert numbers(state.load()[1]) == [7, 8]


def test_nothing_there_is_a_clean_start(tmp_path: Path) -> None:
    """Catches an error, or a folder made, where there is no state yet."""
    assert read_state(tmp_path / "missing") == (None, [])
    assert not (tmp_path / "missing").exists()
    with StateDirectory(tmp_path / "deep/new", collect=nothing) as state:
        assert state.load() == (None, [])


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX permissions")
def test_everything_is_private(tmp_path: Path) -> None:
    """Catches prompts of users that other users of the machine can read."""
    old = os.umask(0)
    try:
        write_state(tmp_path / "state", snapshot(1), [observation(0)])
    finally:
        os.umask(old)
    for path in [tmp_path / "state", *(tmp_path / "state").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


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
