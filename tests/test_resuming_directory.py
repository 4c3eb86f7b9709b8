"""A learner with a state directory: what is there after it was killed or closed, and threads that meet over it."""

import gc
import os
import shutil
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from restarts import made, observe, same_weights, traffic
from traffic import llama, request

from hf_osd.config import OnlineConfig
from hf_osd.errors import ClosedError, LearningError, StateError
from hf_osd.learning.online import OnlineLearner
from hf_osd.records import Observation
from hf_osd.storage import Snapshot, read_state

# A state directory.


def update_until_closed(learner: Any) -> None:
    with pytest.raises(ClosedError):
        learner.update()


def killed(learner: Any, directory: Path) -> Path:
    """What a process that is killed after a flush leaves behind: its files, and no lock."""
    learner._disk.flush()
    return Path(shutil.copytree(directory, directory.with_name(f"{directory.name}-left")))


@pytest.mark.parametrize("recipe", ["full", "lora", "no gate"])
def test_a_killed_learner_goes_on(recipe: str, tmp_path: Path) -> None:
    """Catches live weights, counters, averages or requests that a crash takes with it."""
    live, learner = made(recipe, state_dir=tmp_path / "state")
    observe(learner, traffic(18))
    left = killed(learner, tmp_path / "state")
    again, restored = made(recipe, state_dir=left)
    assert same_weights(live.draft.state_dict(), again.draft.state_dict())
    assert restored.acceptance == learner.acceptance
    for name in ("updates", "steps", "positions", "last_loss"):
        assert getattr(restored.counters, name) == getattr(learner.counters, name)
    assert len(restored.learner.replay.observations()) == 18
    observe(restored, traffic(10, 18))
    assert restored.counters.failures == 0
    assert restored.counters.steps > learner.counters.steps
    for one in (learner, restored):
        one.close()
    assert len(read_state(left)[1]) == 28


def test_what_is_newer_than_the_snapshot_is_there(tmp_path: Path) -> None:
    """Catches requests that are lost where the process died after they were written and before they were learned."""
    _, learner = made(state_dir=tmp_path / "state")
    observe(learner, traffic(6))
    learner._disk.flush()
    learner._disk._writer._collect = lambda: None
    observe(learner, traffic(3, 6))
    left = killed(learner, tmp_path / "state")
    _, restored = made(state_dir=left)
    assert restored.counters.steps == 2
    assert len(restored.learner.replay.observations()) == 9
    for one in (learner, restored):
        one.close()


def test_an_update_without_a_new_request_is_kept(tmp_path: Path) -> None:
    """Catches a snapshot that is taken between a request and the update it leads to, and is never taken again."""
    live, learner = made(state_dir=tmp_path, gate=False, update_every=100)
    observe(learner, traffic(3))
    learner._disk.flush()
    learner.update()
    learner.close()
    snapshot, _ = read_state(tmp_path)
    assert snapshot is not None
    assert snapshot.numbers["counters"]["updates"] == learner.counters.updates == 1
    assert same_weights(snapshot.tensors["live"], live.published[-1])


def test_nothing_new_is_not_written_again(tmp_path: Path) -> None:
    """Catches a disk that is written to every few seconds by an idle server."""
    _, learner = made(state_dir=tmp_path)
    observe(learner, traffic(4))
    learner._disk.flush()
    names = {path.name for path in (tmp_path / "snapshots").iterdir()}
    for _ in range(3):
        learner._disk.flush()
    learner.close()
    assert {path.name for path in (tmp_path / "snapshots").iterdir()} == names


@pytest.mark.parametrize("background", [False, True])
def test_closing_writes_everything(background: bool, tmp_path: Path) -> None:
    """Catches requests and updates that only a flush in time would have kept."""
    live, learner = made(state_dir=tmp_path, gate=False, background=background)
    observe(learner, traffic(9))
    learner.update()
    learner.close()
    snapshot, observations = read_state(tmp_path)
    assert snapshot is not None
    assert len(observations) == 9
    assert snapshot.numbers["counters"]["updates"] == learner.counters.updates
    assert same_weights(snapshot.tensors["live"], live.published[-1])


def blank(observation: Observation) -> Observation | None:
    """Drops short prompts' requests by their first token, and hides the prompts of the others."""
    if int(observation.prompt_ids[0]) % 2:
        return None
    hidden = {name: getattr(observation, name) for name in Observation.__slots__}
    return Observation(**{**hidden, "prompt_ids": torch.full_like(observation.prompt_ids, 7)})


@pytest.mark.parametrize("where", ["state_dir", "save"])
def test_redaction_comes_before_the_disk(where: str, tmp_path: Path) -> None:
    """Catches prompts on disk that somebody took care to hide, and a learner that learns without them."""
    place = {"state_dir": tmp_path} if where == "state_dir" else {}
    _, learner = made(redact=blank, **place)
    requests = traffic(12)
    observe(learner, requests)
    if where == "save":
        learner.save(tmp_path)
    learner.close()
    _, observations = read_state(tmp_path)
    kept = [one for one in requests if int(one.prompt_ids[0]) % 2 == 0]
    assert 0 < len(observations) == len(kept) < 12
    assert all(bool((one.prompt_ids == 7).all()) for one in observations)
    in_memory = learner.learner.replay.observations()
    assert len(in_memory) == 12
    assert not any(bool((one.prompt_ids == 7).all()) for one in in_memory)
    _, restored = made()
    restored.load(tmp_path)
    assert len(restored.learner.replay.observations()) == len(kept)
    observe(restored, traffic(4))
    assert restored.counters.failures == 0
    restored.close()


def test_one_learner_a_directory(tmp_path: Path) -> None:
    """Catches two learners that write over each other's state."""
    _, learner = made(state_dir=tmp_path)
    with pytest.raises(StateError, match="in use by process"):
        made(state_dir=tmp_path)
    learner.close()
    made(state_dir=tmp_path)[1].close()


def test_a_directory_of_another_draft_is_let_go(tmp_path: Path) -> None:
    """Catches a directory that stays locked by an assistant that was never made."""
    _, learner = made(state_dir=tmp_path)
    observe(learner, traffic(4))
    learner.close()
    with pytest.raises(LearningError, match="holds the state of another draft"):
        OnlineLearner(llama(hidden_size=16), OnlineConfig(state_dir=tmp_path), lambda weights, acceptance: None)
    made(state_dir=tmp_path)[1].close()


def test_only_rejected_positions_come_back(tmp_path: Path) -> None:
    """Catches requests with nothing to learn from, which were kept on disk, in the replay buffer."""
    perfect = request(0)
    perfect = Observation(
        **{name: getattr(perfect, name) for name in Observation.__slots__}
        | {"draft_ids": perfect.output_ids, "accepted": torch.ones_like(perfect.accepted)}
    )
    _, learner = made(state_dir=tmp_path, positions="rejected")
    observe(learner, [perfect, request(1)])
    assert len(learner.learner.replay.observations()) == 1
    learner.close()
    _, restored = made(state_dir=tmp_path, positions="rejected")
    assert len(restored.learner.replay.observations()) == 1
    restored.close()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    """Catches a server that finds out after days that it has kept nothing."""
    tmp_path.chmod(0o500)
    with pytest.raises(StateError, match="cannot be used"):
        made(state_dir=tmp_path / "state")


# Threads.


def test_snapshots_while_learning_never_ends(tmp_path: Path) -> None:
    """Catches a state that is never written because updates follow each other, and a deadlock between the threads."""
    before = threading.enumerate()
    _, learner = made(state_dir=tmp_path, background=True, update_every=1, gate=False, flush_seconds=0.05)
    over = threading.Event()

    def serve() -> None:
        number = 0
        while not over.is_set():
            learner.observe(request(number))
            number += 1
            time.sleep(0.002)

    server = threading.Thread(target=serve)
    server.start()
    try:
        deadline = time.perf_counter() + 60.0
        seen: set[str] = set()
        while len(seen) < 4 and time.perf_counter() < deadline:
            seen |= {path.name for path in (tmp_path / "snapshots").glob("snapshot-*")}
            time.sleep(0.01)
    finally:
        over.set()
        server.join()
    assert len(seen) >= 4
    learner.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("hf_osd") and one not in before]
    assert learner._disk.failures == 0


def test_a_long_update_does_not_keep_requests_from_the_disk(tmp_path: Path) -> None:
    """Catches a crash that costs as much as the longest update, rather than one flush interval."""
    _, learner = made(state_dir=tmp_path, background=True, update_every=100, gate=False, duty_cycle=1e-6)
    observe(learner, traffic(1))
    learner.update()
    with learner.serving():  # so this update takes hours
        threading.Thread(target=update_until_closed, args=[learner], daemon=True).start()
        deadline = time.perf_counter() + 60.0
        while learner.counters.steps < 3 and time.perf_counter() < deadline:
            time.sleep(0.01)
        observe(learner, traffic(3, 1))
        flusher = threading.Thread(target=learner._disk.flush)
        flusher.start()
        flusher.join(60.0)
        written = len(read_state(tmp_path)[1])
        learner.close()
    flusher.join(60.0)
    assert not flusher.is_alive()
    assert written == 4
    assert len(read_state(tmp_path)[1]) == 4


def test_closing_while_a_flush_is_in_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a deadlock between a close, an update and a flush, and a flush that is cut in two."""
    _, learner = made(state_dir=tmp_path, background=True, update_every=1, gate=False)
    observe(learner, traffic(3))
    entered, go_on = threading.Event(), threading.Event()
    save = learner._disk._writer._store.save

    def slow(snapshot: Snapshot) -> None:
        entered.set()
        assert go_on.wait(60.0)
        save(snapshot)

    monkeypatch.setattr(learner._disk._writer._store, "save", slow)
    flusher = threading.Thread(target=learner._disk.flush)
    flusher.start()
    assert entered.wait(60.0)
    closer = threading.Thread(target=learner.close)
    closer.start()
    observe(learner, traffic(3))  # serving goes on
    closer.join(0.2)
    assert closer.is_alive()
    go_on.set()
    for thread in (flusher, closer):
        thread.join(60.0)
        assert not thread.is_alive()
    snapshot, _ = read_state(tmp_path)
    assert snapshot is not None


def test_a_close_in_the_training_thread_keeps_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a deadlock where the owner is dropped, and so closed, by the thread that trains for it."""
    monkeypatch.setattr("hf_osd.storage.directory._PATIENCE", 60.0)
    live, learner = made(state_dir=tmp_path, background=True, update_every=4, gate=False)
    publish, closed = live.publish, threading.Event()

    def last(weights: Mapping[str, torch.Tensor], acceptance: float) -> None:
        publish(weights, acceptance)
        learner.close()
        closed.set()

    learner.learner._publish = last  # type: ignore[union-attr]
    observe(learner, traffic(4))
    assert closed.wait(60.0)
    thread = learner._worker._thread
    assert thread is not None
    thread.join(60.0)
    assert not thread.is_alive()
    snapshot, observations = read_state(tmp_path)
    assert snapshot is not None
    assert len(observations) == 4
    made(state_dir=tmp_path)[1].close()  # and the directory is free


def test_a_loop_is_collected_with_its_directory(tmp_path: Path) -> None:
    """Catches a directory that stays locked for ever once its learner has been dropped."""
    live, learner = made(state_dir=tmp_path)
    observe(learner, traffic(2))
    live.learner_of = learner  # type: ignore[attr-defined] # as in the assistant: a cycle
    gone, deadline = weakref.ref(learner), time.perf_counter() + 60.0
    del live, learner
    while gone() is not None and time.perf_counter() < deadline:
        gc.collect()
        time.sleep(0.01)  # the writing thread may be asking it for its state
    made(state_dir=tmp_path)[1].close()
