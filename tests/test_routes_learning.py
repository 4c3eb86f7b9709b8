"""What each draft of several learns, from which requests and in whose time."""

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from fakes import prompts
from routed import FAST, TARGET, kept, same, serve, small, weights_of

from hf_osd import OnlineAssistant
from hf_osd.routing import ByKey

KEYS = ["a", "b", "a", "b"]


def test_each_draft_learns_from_its_own_requests() -> None:
    """Catches requests that teach another route's draft, and drafts that are changed by what others learn."""
    drafts = {"a": small(5), "b": small(6)}
    with OnlineAssistant(drafts=drafts, target=TARGET, config=FAST) as assistant:
        before = {name: weights_of(assistant, name) for name in drafts}
        serve(assistant, batch=2, osd_route="a")
        assert not same(before["a"], weights_of(assistant, "a"))
        assert same(before["b"], weights_of(assistant, "b"))
        serve(assistant, osd_route=KEYS)
        assert not same(before["b"], weights_of(assistant, "b"))
        replayed = {name: [one.prompt_ids for one in kept(assistant, name)] for name in drafts}
        inputs = prompts(4)
        rows = [ids[mask.bool()] for ids, mask in zip(*inputs.values(), strict=True)]
        assert same(replayed["b"], [rows[1], rows[3]])
        assert same(replayed["a"][2:], [rows[0], rows[2]])
        stats = assistant.stats()
        assert (stats.routes["a"].updates, stats.routes["b"].updates, stats.updates) == (2, 1, 3)
        assert stats.failed_updates == 0


def test_a_new_route_begins_with_what_the_nearest_has_learned() -> None:
    """Catches a new route that starts cold, that forgets the static draft, or that shares what it learns."""
    with OnlineAssistant(small(), TARGET, FAST, router=ByKey(), max_routes=2) as assistant:
        static = weights_of(assistant, "default")
        serve(assistant)
        learned = weights_of(assistant, "default")
        assert not same(static, learned)
        serve(assistant, batch=1, osd_route="new")
        assert list(assistant.routes) == ["default", "new"]
        assert same(learned, weights_of(assistant, "new"))
        candidates = assistant.routes["new"].learner.learner.candidates
        named = dict(assistant.routes["new"].draft.named_parameters())
        assert same(static, [candidates.static.weights[name] for name in named])
        serve(assistant, osd_route="new")
        assert same(learned, weights_of(assistant, "default"))
        assert not same(learned, weights_of(assistant, "new"))
        serve(assistant, batch=1, osd_route="no room")
        assert list(assistant.routes) == ["default", "new"]
        assert assistant.stats().routes["default"].requests == 5


def test_one_learner_works_at_a_time() -> None:
    """Catches routes that each take the core that was meant for all of them."""
    with OnlineAssistant(drafts={"a": small(5), "b": small(6)}, target=TARGET, config=FAST) as assistant:
        one, other = (assistant.routes[name].learner for name in "ab")
        assert one.throttle is other.throttle
        assert one.at_rest() is other.at_rest()
        assert assistant.routes["a"].experience.target_costs is assistant.routes["b"].experience.target_costs


def test_each_draft_learns_by_its_own_evidence_in_the_time_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Catches routes that each take the share of time that was meant for all of them, and a draft with nothing left to
    gain that slows another one down, or is as eager as that.
    """
    config = replace(FAST, learning_share=0.1, update_every=100)
    with OnlineAssistant(drafts={"a": small(5), "b": small(6)}, target=TARGET, config=config) as assistant:
        learners = {name: assistant.routes[name].learner.learner for name in "ab"}
        learners["a"]._pace.eagerness = 0.25
        earned: dict[str, list[tuple[float, float]]] = {"a": [], "b": []}
        for name, learner in learners.items():
            monkeypatch.setattr(learner.budget, "earn", lambda *both, name=name: earned[name].append(both))
        serve(assistant, osd_route=["a", "b", "b", "b"])
        serve(assistant, osd_route="b")
        decode_seconds = assistant.stats().decode_seconds
    (first, eagerness), *others = earned["a"]
    assert others == []
    assert eagerness == 0.25
    assert [eager for _, eager in earned["b"]] == [1.0, 1.0]
    assert earned["b"][0][0] == pytest.approx(3 * first)
    assert first + sum(seconds for seconds, _ in earned["b"]) == pytest.approx(decode_seconds)


def test_a_new_route_finds_out_for_itself_what_there_is_to_gain() -> None:
    """Catches a fork that is as slow to learn other traffic as its parent has become on its own."""
    with OnlineAssistant(small(), TARGET, FAST, router=ByKey()) as assistant:
        for seed in range(8):
            serve(assistant, seed=seed)
        serve(assistant, osd_route="new")
        paces = {name: one.learner.learner._pace.state_dict() for name, one in assistant.routes.items()}
        assert (paces["default"]["updates"], paces["new"]["updates"]) == (16, 2)
        assert paces["default"]["eagerness"] < 1.0 == paces["new"]["eagerness"]


def test_a_route_that_fails_leaves_the_pauses_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a draft that is given up, and with it the duty cycle of all that learn beside requests."""
    config = replace(FAST, background=True, duty_cycle=1e-6)

    def fail(*_: Any) -> None:
        raise MemoryError("full")

    monkeypatch.setattr("hf_osd.routes.resume", fail)
    with OnlineAssistant(small(), TARGET, config, router=ByKey()) as assistant:
        serve(assistant, osd_route="new")
        assert list(assistant.routes) == ["default"]
        throttle, waited = assistant.routes.first.learner.throttle, threading.Event()
        with throttle.serving():
            throttle.resume()
            thread = threading.Thread(target=lambda: (throttle.give_way(waited.is_set), waited.set()))
            time.sleep(0.01)
            thread.start()
            assert not waited.wait(0.2)
            waited.set()
            throttle.wake()
            thread.join()
