"""Saving a learner and going on: as if there had been no restart, and not from a bad state."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from restarts import made, observe, same_weights, traffic
from traffic import llama, request

from hf_osd.config import OnlineConfig
from hf_osd.errors import LearningError
from hf_osd.learning.online import OnlineLearner
from hf_osd.learning.resuming import snapshot_of
from hf_osd.storage import Snapshot, read_state, write_state


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
    if recipe == "archive":
        learner.learner._freeze(learner.learner.selector.leader, learner.learner.live)
    learner.save(tmp_path)
    published = len(live.published)
    again, restored = made(recipe, live.draft.state_dict())
    restored.load(tmp_path)
    for name in ("updates", "failures", "steps", "positions", "last_loss"):
        assert getattr(restored.counters, name) == getattr(learner.counters, name)
    assert same_weights(live.draft.state_dict(), again.draft.state_dict())
    for number in range(cut, cut + 14):
        for one in (learner, restored):
            one.observe(traffic(1, number)[0])
        assert same_weights(live.draft.state_dict(), again.draft.state_dict()), number
    for one in (learner, restored):
        one.close()
    assert learner.counters.failures == 0
    assert learner.counters.steps == restored.counters.steps
    assert len(live.published) - published == len(again.published) - 1  # which went live at once
    assert same_snapshots(snapshot_of(learner.learner), snapshot_of(restored.learner))


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
    assert len(live.published) == learner.counters.updates


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
        with pytest.raises(LearningError, match="holds the state of another draft"):
            fresh.load(tmp_path)
        publish.assert_not_called()
        assert same_weights(before, other.state_dict())


@pytest.mark.parametrize(
    "missing",
    ["updates", "learner", "live", "student", "static", "learned", "optimizer", "selector", "usual", "pace"],
)
def test_a_state_with_holes_is_refused_and_changes_nothing(missing: str, tmp_path: Path) -> None:
    """Catches a state of another version that is half loaded, and takes the first update down with it."""
    _, learner = made()
    observe(learner, traffic(4))
    learner.close()
    snapshot: Any = snapshot_of(learner.learner)
    numbers, tensors = json.loads(json.dumps(snapshot.numbers)), dict(snapshot.tensors)
    for holder in (numbers, tensors, numbers["counters"], numbers["learner"]):
        holder.pop(missing, None)
    write_state(tmp_path, Snapshot(tensors, numbers), [])
    live, fresh = made()
    with pytest.raises(LearningError, match=missing):
        fresh.load(tmp_path)
    assert (fresh.counters.updates, fresh.counters.steps, live.published) == (0, 0, [])
    observe(fresh, traffic(8))
    fresh.close()
    assert fresh.counters.failures == 0
    assert fresh.counters.steps == 4


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
    assert changed.counters.updates > learner.counters.updates
    first = again.published[1]
    for name, weight in live.draft.state_dict().items():  # it moved on from there, and not from the initial draft
        assert name not in first or (first[name] - weight).abs().max() < 0.2
