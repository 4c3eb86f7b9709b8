"""Saving a learner and going on: as if there had been no restart, or from a state directory; not from a bad state."""

import gc
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from traffic import Live, llama, request

from hf_osd.config import OnlineConfig
from hf_osd.errors import LearningError, StateError
from hf_osd.learning.background import OnlineLearner
from hf_osd.learning.storage import Snapshot, read_state, write_state
from hf_osd.records import Observation

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj"]}
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": LORA},
    "bfloat16": {},
    "no gate": {"gate": False, "positions": "rejected"},
    "archive": {"steps_per_update": 8},
}


def made(recipe: str = "full", draft: Mapping[str, torch.Tensor] | None = None, **settings: Any) -> tuple[Live, Any]:
    """A live draft, with weights of another where given, and its learner."""
    live = Live()
    if recipe == "bfloat16":
        live.draft.bfloat16()
    if draft is not None:
        live.draft.load_state_dict(draft)
    return live, live.learner(**{"steps_per_update": 2, **RECIPES[recipe], **settings})


def traffic(count: int, start: int = 0) -> list[Observation]:
    """Requests whose kind changes after the fortieth."""
    return [request(number, seed=1 if number < 40 else 2) for number in range(start, start + count)]


def observe(learner: OnlineLearner, observations: list[Observation]) -> None:
    for observation in observations:
        learner.observe(observation)


def same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_snapshots(one: Snapshot | None, other: Snapshot | None) -> bool:
    assert one is not None
    assert other is not None
    groups = one.tensors.keys() == other.tensors.keys() and all(
        same_weights(tensors, other.tensors[name]) for name, tensors in one.tensors.items()
    )
    return groups and without_times(one.numbers) == without_times(other.numbers)


def without_times(numbers: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(numbers))
    plain["counters"].pop("seconds")
    return plain


@pytest.mark.parametrize(
    ("recipe", "cut"), [("full", 12), ("bfloat16", 12), ("no gate", 10), ("archive", 36), ("lora", 36)]
)
def test_restart_goes_on_as_if_there_had_been_none(recipe: str, cut: int, tmp_path: Path) -> None:
    """Catches optimiser, replay, gate, archive, averages, rate, counters or precision that get lost between runs."""
    live, learner = made(recipe)
    observe(learner, traffic(cut))
    supervisor: Any = learner._loop._supervisor
    if recipe == "archive":
        supervisor.archive.add(supervisor._incumbent.live.on_cpu())
    if recipe != "no gate":  # an alarm that is being raised is raised anew: the requests that led to it are not saved
        supervisor._watch.clear()
    learner.save(tmp_path)
    published = len(live.published)
    again, restored = made(recipe, live.draft.state_dict())
    restored.load(tmp_path)
    for name in ("updates", "failures", "steps", "positions", "last_loss"):
        assert getattr(restored, name) == getattr(learner, name)
    assert same_weights(live.draft.state_dict(), again.draft.state_dict())
    for number in range(cut, cut + 14):
        for one in (learner, restored):
            one.observe(traffic(1, number)[0])
        assert same_weights(live.draft.state_dict(), again.draft.state_dict()), number
    for one in (learner, restored):
        one.close()
    assert learner.failures == 0
    assert learner.steps == restored.steps
    assert len(live.published) - published == len(again.published) - 1  # which went live at once
    assert same_snapshots(learner._loop.snapshot(), restored._loop.snapshot())


def test_a_restored_draft_is_expected_to_be_as_good_as_it_was(tmp_path: Path) -> None:
    """Catches serving that leaves a draft alone after a restart, because learning has not seen it yet."""
    _, learner = made()
    observe(learner, traffic(12))
    learner.save(tmp_path)
    _, restored = made()
    restored.load(tmp_path)
    assert restored.acceptance == learner.acceptance > 0.0
    learner.close()


def test_a_state_can_be_saved_before_learning_and_saved_again(tmp_path: Path) -> None:
    """Catches weights that are lost when a restored learner is saved before its first request."""
    _, learner = made()
    learner.save(tmp_path / "empty")
    made()[1].load(tmp_path / "empty")
    observe(learner, traffic(10))
    learner.close()
    learner.save(tmp_path / "one")
    _, middle = made()
    middle.load(tmp_path / "one")
    middle.save(tmp_path / "two")
    (one, first), (two, second) = read_state(tmp_path / "one"), read_state(tmp_path / "two")
    assert same_snapshots(one, two)
    assert len(first) == len(second) == 10
    assert all(torch.equal(a.output_ids, b.output_ids) for a, b in zip(first, second, strict=True))
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert suffixes == {".json", ".safetensors", ".parquet"}  # nothing that runs code when it is read


def test_saving_waits_for_no_request_and_an_update_in_progress(tmp_path: Path) -> None:
    """Catches a state that is half before and half after an update, and a deadlock between the two."""
    live, learner = made(background=True, gate=False)
    errors: list[BaseException] = []

    def save() -> None:
        try:
            for number in range(4):
                learner.save(tmp_path / str(number))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=save)
    learner.observe(request(0))
    thread.start()
    observe(learner, traffic(30))
    thread.join(30.0)
    assert not thread.is_alive()
    assert not errors
    learner.close()
    for number in range(4):
        snapshot, _ = read_state(tmp_path / str(number))
        if snapshot is not None and "counters" in snapshot.numbers:
            assert snapshot.numbers["counters"]["steps"] == 2 * snapshot.numbers["counters"]["updates"]
    assert len(live.published) == learner.updates


# What must not be loaded.


def test_missing_states_and_late_loading_are_refused(tmp_path: Path) -> None:
    """Catches a learner that starts from nothing in silence, and a state under a running update."""
    with pytest.raises(LearningError, match="does not hold the state"):
        made()[1].load(tmp_path / "nowhere")
    _, learner = made()
    learner.observe(request(0))
    learner.save(tmp_path)
    with pytest.raises(LearningError, match="before the first request"):
        learner.load(tmp_path)
    learner.close()


def test_the_state_of_another_draft_is_refused(tmp_path: Path) -> None:
    """Catches weights of another shape or another architecture that reach a live draft."""
    _, learner = made()
    observe(learner, traffic(4))
    learner.close()
    learner.save(tmp_path)
    for other in (llama(hidden_size=16), llama(vocab_size=32), llama(num_key_value_heads=2)):
        before = {name: weight.clone() for name, weight in other.state_dict().items()}
        publish = Mock()
        fresh = OnlineLearner(other, OnlineConfig(), publish)
        with pytest.raises(LearningError, match=r"has shape .*, the draft has"):
            fresh.load(tmp_path)
        publish.assert_not_called()
        assert same_weights(before, other.state_dict())


@pytest.mark.parametrize(
    "missing", ["updates", "supervisor", "live", "optimizer", "average", "path", "watch", "acceptance"]
)
def test_a_state_with_holes_is_refused_and_changes_nothing(missing: str, tmp_path: Path) -> None:
    """Catches a state of another version that is half loaded, and takes the first update down with it."""
    _, learner = made()
    observe(learner, traffic(4))
    learner.close()
    snapshot: Any = learner._loop.snapshot()
    numbers, tensors = json.loads(json.dumps(snapshot.numbers)), dict(snapshot.tensors)
    for holder in (numbers, tensors, numbers["counters"], numbers["supervisor"]):
        holder.pop(missing, None)
    write_state(tmp_path, Snapshot(tensors, numbers), [])
    live, fresh = made()
    with pytest.raises(LearningError, match=missing):
        fresh.load(tmp_path)
    assert (fresh.updates, fresh.steps, live.published) == (0, 0, [])
    observe(fresh, traffic(8))
    fresh.close()
    assert fresh.failures == 0
    assert fresh.steps == 4


@pytest.mark.parametrize(("before", "after"), [("full", "lora"), ("lora", "full")])
def test_another_recipe_goes_on_from_the_live_weights(before: str, after: str, tmp_path: Path) -> None:
    """Catches a learner that never learns again once its settings have changed, and a draft that starts anew."""
    live, learner = made(before, gate=False)
    observe(learner, traffic(12))
    learner.close()
    learner.save(tmp_path)
    again, changed = made(after, gate=False)
    changed.load(tmp_path)
    assert same_weights(live.draft.state_dict(), again.draft.state_dict())
    observe(changed, traffic(12, 12))
    changed.close()
    assert changed.updates > learner.updates
    first = again.published[1]
    for name, weight in live.draft.state_dict().items():  # it moved on from there, and not from the initial draft
        assert name not in first or (first[name] - weight).abs().max() < 0.2


# A state directory.


def killed(learner: Any, directory: Path) -> Path:
    """What a process that is killed after a flush leaves behind: its files, and no lock."""
    learner._loop.disk.flush()
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
        assert getattr(restored, name) == getattr(learner, name)
    assert len(restored._loop.replay.observations()) == 18
    observe(restored, traffic(10, 18))
    assert restored.failures == 0
    assert restored.steps > learner.steps
    for one in (learner, restored):
        one.close()
    assert len(read_state(left)[1]) == 28


def test_what_is_newer_than_the_snapshot_is_there(tmp_path: Path) -> None:
    """Catches requests that are lost where the process died after they were written and before they were learned."""
    _, learner = made(state_dir=tmp_path / "state")
    observe(learner, traffic(6))
    learner._loop.disk.flush()
    learner._loop.collect = lambda: None  # type: ignore[method-assign, union-attr]
    learner._loop.disk._writer._collect = lambda: None
    observe(learner, traffic(3, 6))
    left = killed(learner, tmp_path / "state")
    _, restored = made(state_dir=left)
    assert restored.steps == 2
    assert len(restored._loop.replay.observations()) == 9
    for one in (learner, restored):
        one.close()


def test_an_update_without_a_new_request_is_kept(tmp_path: Path) -> None:
    """Catches a snapshot that is taken between a request and the update it leads to, and is never taken again."""
    live, learner = made(state_dir=tmp_path, gate=False, update_every=100)
    observe(learner, traffic(3))
    learner._loop.disk.flush()
    learner.update()
    learner.close()
    snapshot, _ = read_state(tmp_path)
    assert snapshot is not None
    assert snapshot.numbers["counters"]["updates"] == learner.updates == 1
    assert same_weights(snapshot.tensors["live"], live.published[-1])


def test_nothing_new_is_not_written_again(tmp_path: Path) -> None:
    """Catches a disk that is written to every few seconds by an idle server."""
    _, learner = made(state_dir=tmp_path)
    observe(learner, traffic(4))
    learner._loop.disk.flush()
    names = {path.name for path in (tmp_path / "snapshots").iterdir()}
    for _ in range(3):
        learner._loop.disk.flush()
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
    assert snapshot.numbers["counters"]["updates"] == learner.updates
    assert same_weights(snapshot.tensors["live"], live.published[-1])


def test_held_out_requests_of_a_directory_have_not_been_learned_from(tmp_path: Path) -> None:
    """Catches a gate that is asked about requests which the draft it tests has seen before the restart."""
    _, learner = made(state_dir=tmp_path / "state", replay_size=10)
    observe(learner, traffic(23))
    learned = {tuple(o.output_ids.tolist()) for o in learner._loop.replay.sample(99)}
    left = killed(learner, tmp_path / "state")
    _, restored = made(state_dir=left, replay_size=10)
    held = {tuple(o.output_ids.tolist()) for o in restored._loop.replay.held}
    assert not held & learned
    for one in (learner, restored):
        one.close()


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
    in_memory = learner._loop.replay.observations()
    assert len(in_memory) == 12
    assert not any(bool((one.prompt_ids == 7).all()) for one in in_memory)
    _, restored = made()
    restored.load(tmp_path)
    assert len(restored._loop.replay.observations()) == len(kept)
    observe(restored, traffic(4))
    assert restored.failures == 0
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
    with pytest.raises(LearningError, match="has shape"):
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
    assert len(learner._loop.replay.observations()) == 1
    learner.close()
    _, restored = made(state_dir=tmp_path, positions="rejected")
    assert len(restored._loop.replay.observations()) == 1
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
    assert learner._loop.disk.failures == 0


def test_a_long_update_does_not_keep_requests_from_the_disk(tmp_path: Path) -> None:
    """Catches a crash that costs as much as the longest update, rather than one flush interval."""
    _, learner = made(state_dir=tmp_path, background=True, update_every=100, gate=False, duty_cycle=1e-6)
    observe(learner, traffic(1))
    learner.update()
    with learner.serving():  # so this update takes hours
        learner._loop.ask()
        deadline = time.perf_counter() + 60.0
        while not learner._loop._working and time.perf_counter() < deadline:
            time.sleep(0.01)
        observe(learner, traffic(3, 1))
        flusher = threading.Thread(target=learner._loop.disk.flush)
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
    save = learner._loop.disk._writer._store.save

    def slow(snapshot: Snapshot) -> None:
        entered.set()
        assert go_on.wait(60.0)
        save(snapshot)

    monkeypatch.setattr(learner._loop.disk._writer._store, "save", slow)
    flusher = threading.Thread(target=learner._loop.disk.flush)
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
    monkeypatch.setattr("hf_osd.learning.storage.directory._PATIENCE", 60.0)
    live, learner = made(state_dir=tmp_path, background=True, update_every=4, gate=False)
    publish, closed = live.publish, threading.Event()

    def last(weights: Mapping[str, torch.Tensor], acceptance: float) -> None:
        publish(weights, acceptance)
        learner.close()
        closed.set()

    learner._loop._publish = lambda: last  # type: ignore[assignment]
    observe(learner, traffic(4))
    assert closed.wait(60.0)
    thread = learner._loop._thread
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
    del live, learner
    gc.collect()
    made(state_dir=tmp_path)[1].close()
