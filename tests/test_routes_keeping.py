"""Routes on disk: folders of other drafts, restarts with fewer and with more of them, and what a close waits for."""

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from routed import FAST, TARGET, kept, plain, same, serve, small, weights_of

from hf_osd import LearningError, OnlineAssistant, OnlineConfig, StateError
from hf_osd.routing import Bandit, ByKey, ByTopic, Prompt
from hf_osd.storage import read_state

KEYS = ["a", "b", "x", "x"]


def kept_in(folder: Path, **changes: Any) -> OnlineConfig:
    return replace(FAST, state_dir=folder, **changes)


def two(first: int = 5, second: int = 6) -> dict[str, Any]:
    return {"a": small(first), "b": small(second)}


def run(config: OnlineConfig, drafts: Any = None, keys: Any = KEYS, **options: Any) -> dict[str, list[torch.Tensor]]:
    """Serve, and return the weights of every route."""
    with OnlineAssistant(drafts=drafts or two(), target=TARGET, config=config, **options) as assistant:
        for seed in range(3):
            serve(assistant, seed=seed, osd_route=keys)
        return {name: weights_of(assistant, name) for name in assistant.routes}


# A folder of `save_pretrained`.


def test_a_single_draft_in_the_folder_of_routes(tmp_path: Path) -> None:
    """Catches a folder that still gives the drafts which were saved there before."""
    with OnlineAssistant(drafts=two(), target=TARGET, config=FAST) as assistant:
        serve(assistant, osd_route=KEYS)
        assistant.save_pretrained(tmp_path)
    with OnlineAssistant(small(7), TARGET, FAST) as assistant:
        serve(assistant)
        learned = weights_of(assistant, "default")
        assistant.save_pretrained(tmp_path)
    with OnlineAssistant.from_pretrained(tmp_path, TARGET) as again:
        assert again.routes.router is None
        assert same(learned, weights_of(again, "default"))
        assert torch.equal(serve(again), plain())


def test_a_folder_and_a_state_directory_together(tmp_path: Path) -> None:
    """Catches a second start that takes a draft without new requests for one that has none, and lost requests."""
    with OnlineAssistant(small(), TARGET, FAST) as assistant:
        serve(assistant)
        learned = weights_of(assistant, "default")
        assistant.save_pretrained(tmp_path / "saved")
    for _ in range(3):
        with OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET, kept_in(tmp_path / "state")) as again:
            assert same(learned, weights_of(again, "default"))
            assert len(kept(again, "default")) == 4


def test_routes_in_the_folder_of_a_single_draft(tmp_path: Path) -> None:
    """Catches a folder that gives the one draft of before, or a mix of both."""
    with OnlineAssistant(small(7), TARGET, FAST) as assistant:
        serve(assistant)
        assistant.save_pretrained(tmp_path)
    with OnlineAssistant(drafts=two(), target=TARGET, config=FAST) as assistant:
        serve(assistant, osd_route=KEYS)
        learned = {name: weights_of(assistant, name) for name in assistant.routes}
        assistant.save_pretrained(tmp_path)
    with OnlineAssistant.from_pretrained(tmp_path, TARGET) as again:
        assert list(again.routes) == ["a", "b", "x"]
        assert all(same(learned[name], weights_of(again, name)) for name in learned)


def test_fewer_routes_in_the_folder_of_more(tmp_path: Path) -> None:
    """Catches routes that come back although what was saved last has none of that name."""
    for keys in (KEYS, ["a", "b", "a", "b"]):
        with OnlineAssistant(drafts=two(), target=TARGET, config=FAST) as assistant:
            serve(assistant, osd_route=keys)
            assistant.save_pretrained(tmp_path)
    with OnlineAssistant.from_pretrained(tmp_path, TARGET) as again:
        assert list(again.routes) == ["a", "b"]


def test_a_state_directory_knows_more_of_the_router_than_the_folder(tmp_path: Path) -> None:
    """Catches a router that forgets what it has learned since it was saved."""
    with OnlineAssistant(drafts=two(), target=TARGET, config=FAST, router=Bandit()) as assistant:
        serve(assistant)
        assistant.save_pretrained(tmp_path / "saved")
    states = []
    for _ in range(2):
        router = Bandit()
        config = kept_in(tmp_path / "state")
        with OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET, config, router=router) as again:
            states.append(router.state())
            serve(again)
            states.append(router.state())
    assert states[1] == states[2] != states[0]


# A state directory.


@pytest.mark.parametrize("first", ["routes", "single"])
def test_a_state_directory_of_the_other_kind_is_refused(first: str, tmp_path: Path) -> None:
    """Catches drafts that begin anew in silence, beside a state of which the user believes that they go on from it."""
    config = kept_in(tmp_path)
    if first == "routes":
        run(config)
        with pytest.raises(StateError, match="holds the drafts of several routes"):
            OnlineAssistant(small(), TARGET, config)
        run(config)
    else:
        with OnlineAssistant(small(), TARGET, config) as assistant:
            serve(assistant)
        with pytest.raises(StateError, match="holds the state of a single draft"):
            OnlineAssistant(small(), TARGET, config, router=ByKey())
        OnlineAssistant(small(), TARGET, config).close()
        for name in ("snapshots", "replay"):  # as the message says
            (tmp_path / "route-default").mkdir(exist_ok=True)
            (tmp_path / name).rename(tmp_path / "route-default" / name)
        with OnlineAssistant(small(), TARGET, config, router=ByKey()) as assistant:
            assert assistant.stats().updates == 2


def test_a_restart_with_room_for_fewer_routes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches more drafts in memory than `max_routes`, and those without room that are lost for good."""
    learned = run(kept_in(tmp_path), keys=["b", "x", "x", "y"])
    assert list(learned) == ["a", "b", "x", "y"]
    with OnlineAssistant(drafts=two(), target=TARGET, config=kept_in(tmp_path), max_routes=3) as fewer:
        assert list(fewer.routes) == ["a", "b", "x"]
        assert torch.equal(serve(fewer, osd_route="y"), plain())
        assert fewer.stats().routes["a"].requests == 4
    assert caplog.text.count("no room for the drafts of routes ['y']") == 1
    with OnlineAssistant(drafts=two(), target=TARGET, config=kept_in(tmp_path), max_routes=4) as again:
        assert list(again.routes) == ["a", "b", "x", "y"]
        assert same(learned["y"], weights_of(again, "y"))


def test_a_restart_without_a_draft_that_was_passed(tmp_path: Path) -> None:
    """Catches another draft that takes the place of one whose state is there, and a directory that stays locked."""
    learned = run(kept_in(tmp_path))
    with pytest.raises(LearningError, match="keeps the draft of route 'b', which was passed: pass it again") as held:
        OnlineAssistant(drafts={"a": small(5)}, target=TARGET, config=kept_in(tmp_path))
    with OnlineAssistant(drafts=two(), target=TARGET, config=kept_in(tmp_path)) as again:
        assert all(same(learned[name], weights_of(again, name)) for name in learned)
    del held


def test_a_restart_with_another_draft_for_a_route(tmp_path: Path) -> None:
    """Catches the drafts before the one that is refused: they would hold their directories while the error lives."""
    learned = run(kept_in(tmp_path))
    for drafts in (two(5, 7), {**two(), "x": small(7)}):
        with pytest.raises(LearningError, match="holds the state of another draft") as held:
            OnlineAssistant(drafts=drafts, target=TARGET, config=kept_in(tmp_path))
    with OnlineAssistant(drafts={**two(), "new": small(7)}, target=TARGET, config=kept_in(tmp_path)) as again:
        assert list(again.routes) == ["a", "b", "new", "x"]
        assert all(same(learned[name], weights_of(again, name)) for name in learned)
    del held


class Forgetful(Bandit):
    """A router that lacks something in every state."""

    def load_state(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        raise KeyError("trials")


def test_a_router_that_cannot_go_on(tmp_path: Path) -> None:
    """Catches an error that names nothing, and directories that stay locked."""
    config, message = kept_in(tmp_path / "state"), "a Forgetful cannot go on from what was saved of it: KeyError"
    with OnlineAssistant(drafts=two(), target=TARGET, config=config, router=Forgetful()) as assistant:
        serve(assistant)
        assistant.save_pretrained(tmp_path / "saved")
    with pytest.raises(LearningError, match=message) as held:
        OnlineAssistant(drafts=two(), target=TARGET, config=config, router=Forgetful())
    run(config, router=Bandit())
    config = kept_in(tmp_path / "other")
    with pytest.raises(LearningError, match=message) as also_held:
        OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET, config, router=Forgetful())
    OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET, config, router=Bandit()).close()
    del held, also_held


def test_topics_beyond_the_bound_are_not_gone_on_with() -> None:
    """Catches a bound on topics that holds for new ones alone."""
    four = {"mean": torch.zeros(8), "centroids": torch.eye(8)[:4]}, {"topics": ["first", "two", "three", "four"]}
    router = ByTopic(2)
    router.load_state(*four)
    assert router.state()[1] == {"topics": ["first", "two"]}


# Closing.


def test_no_route_waits_for_the_update_of_another(tmp_path: Path) -> None:
    """
    Catches a close that ends one route after the other: the first one's last state is lost, since the update of
    another, which nobody has told to end, keeps it from being collected.
    """
    config = kept_in(tmp_path, background=True, update_every=100)
    assistant = OnlineAssistant(drafts=two(), target=TARGET, config=config)
    serve(assistant, osd_route=["a", "a", "b", "b"])
    first, last = (assistant.routes[name].learner for name in "ab")
    while not first.learner.requests == last.learner.requests == 2:
        time.sleep(0.01)
    begun, deadline = threading.Event(), time.perf_counter() + 20.0

    def update() -> None:
        with last.at_rest():
            begun.set()
            while last.takes_requests and time.perf_counter() < deadline:
                time.sleep(0.01)

    thread = threading.Thread(target=update)
    thread.start()
    begun.wait()
    assistant.close()
    thread.join()
    for name in "ab":
        snapshot, observations = read_state(tmp_path / f"route-{name}")
        assert snapshot is not None
        assert snapshot.numbers["learner"]["requests"] == len(observations) == 2


def test_a_request_in_flight_begins_no_route_after_the_close(tmp_path: Path) -> None:
    """Catches a draft that nobody closes, and that holds its directory."""
    assistant = OnlineAssistant(drafts=two(), target=TARGET, config=kept_in(tmp_path))
    assistant.close()
    assert assistant.routes.route(Prompt(torch.tensor([3, 4]), TARGET), "new") == "a"
    assert list(assistant.routes) == ["a", "b"]
    run(kept_in(tmp_path), keys="new")
