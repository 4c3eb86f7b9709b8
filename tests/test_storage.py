"""The state directory where nothing goes wrong: what it keeps, in which form, and what leaves."""

import dataclasses
import json
import math
import os
import stat
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import FIELDS, NEVER, Learner, count_of, nothing, numbers, observation, replay_of, snapshot

from hf_osd.records import Observation
from hf_osd.storage import Snapshot, StateDirectory, read_state, write_state
from hf_osd.storage.replay_log import ReplayLog
from hf_osd.storage.rows import from_table, to_row, to_table
from hf_osd.storage.shards import list_shards, read_observations, write_shard


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
        source_ids=draw(st.none() | st.integers(0, 3).map(lambda size: torch.arange(size))),
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
        assert (before.source_ids is None) == (after.source_ids is None)
        assert before.source_ids is None or torch.equal(before.source_ids, after.source_ids)


def test_shards_of_before_there_were_encoders(tmp_path: Path) -> None:
    """Catches a replay that an update of hf_osd throws away, because a column is missing in its files."""
    table = to_table([to_row(observation(number)) for number in range(4)], first=0)
    write_shard(tmp_path, table.drop_columns("source_ids"))
    assert numbers(read_observations(tmp_path)) == [0, 1, 2, 3]


def test_datasets_reads_the_replay(tmp_path: Path) -> None:
    """Catches a layout or column types that `datasets` cannot load."""
    write_state(tmp_path / "state", snapshot(1), [observation(number) for number in range(9)])
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "state/replay/*.parquet"), cache_dir=str(tmp_path), split="train"
    )
    files = [str(path) for path in replay_of(tmp_path / "state")]
    assert loaded.to_list() == datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path)).to_list()
    assert set(loaded.column_names) == {*FIELDS, "source_ids", "number", "recorded_at"}
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
    assert manifest["format"] == 3
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
