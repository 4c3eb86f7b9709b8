"""What the requests after an alarm say of it, and what the supervisor makes of that."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from world import EVERY, World, published, table, visit

from hf_osd.learning.archive import Checkpoint
from hf_osd.learning.doubt import _AHEAD, _BEHIND, _ENOUGH, _MOST, Cause, Doubt, Drop, Suspension, Verdict
from hf_osd.learning.judge import Score
from hf_osd.records import Observation

RATE = st.floats(0.0, 1.0)
LENGTH = st.floats(0.1, 4.0)


def observation(number: int) -> Observation:
    ids, mass = torch.full((1,), number), torch.zeros(1)
    return Observation(ids, ids, ids[:, None], mass[:, None], mass, ids, ids.bool())


BEFORE = (0.5, 0.6, 0.4, 0.55, 0.45, 0.65, 0.35, 0.5)


def suspension() -> Suspension:
    return Suspension(Cause([observation(0)], BEFORE, None), Checkpoint({}, {}), Checkpoint({}, {}))


def drop(before: tuple[float, ...] = BEFORE) -> Drop:
    return Drop(Cause([observation(0)], before, None), Checkpoint({}, {}))


def add(doubt: Doubt, live: float, suspended: float = 0.0, length: float = 1.0) -> Verdict | None:
    scores = (Score(live, 0.0, 10), Score(suspended, 0.0, 10))
    return doubt.add(observation(len(doubt.requests)), *scores, length)


@given(st.lists(st.tuples(RATE, RATE, LENGTH), min_size=_MOST, max_size=_MOST))
def test_weights_come_back_where_they_are_ahead(requests: list[tuple[float, float, float]]) -> None:
    """Catches a lead that counts the wrong way or not by length, and a doubt that never ends."""
    doubt, lead = suspension(), 0.0
    for live, suspended, length in requests:
        lead += length * (suspended - live)
        verdict = add(doubt, live, suspended, length)
        if verdict is not None:
            break
        assert lead < _AHEAD
        assert lead > -_BEHIND or len(doubt.requests) <= _ENOUGH
    assert verdict == ("chance" if lead >= _AHEAD else "so")
    assert verdict == "chance" or len(doubt.requests) > (_ENOUGH if lead <= -_BEHIND else _MOST)


def test_weights_that_are_as_good_do_not_come_back() -> None:
    """Catches a swap for nothing, and learning that waits for ever."""
    doubt = suspension()
    assert [add(doubt, 0.5, 0.5) for _ in range(_MOST)] == [None] * (_MOST - 1) + ["so"]


@pytest.mark.parametrize(
    ("since", "verdict"), [((0.1,) * 4, "so"), ((0.1, 0.2, 0.1, 0.2), "so"), ((0.5,) * 4, "chance")]
)
def test_a_drop_is_believed_where_it_lasts(since: tuple[float, ...], verdict: Verdict) -> None:
    """Catches a few bad requests that make learning turn away from all that came before."""
    doubt = drop()
    assert len(since) == _ENOUGH
    assert [add(doubt, rate) for rate in since] == [None] * (_ENOUGH - 1) + [verdict]


def test_a_drop_is_measured_by_how_much_requests_differ() -> None:
    """Catches a drop that is believed although requests were as bad before, every other time."""
    doubt = drop((0.9, 0.1) * 8)
    assert [add(doubt, rate) for rate in (0.1, 0.1, 0.9, 0.1)][-1] == "chance"


def test_requests_of_a_doubt_are_kept() -> None:
    """Catches requests that go missing from what the traffic is believed to be now."""
    for doubt in (suspension(), drop()):
        for _ in range(3):
            add(doubt, 0.5)
        assert [int(one.prompt_ids[0]) for one in doubt.requests] == [0, 1, 2, 3]


# In the supervisor. Version 1 has learned kind 1; kind 2 makes it give way to the initial weights.
RARELY = 1000  # an update is due


def doubtful(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> World:
    """A world in which version 1 has just given way."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.1)), update_every=RARELY, **settings)
    world.take(1, 40)
    world.take(2, 1)
    assert world.version == 0
    return world


def _kinds(world: World) -> list[int]:
    """Of the requests that are held out."""
    return [int(request.prompt_ids[0]) for request in world.replay.held]


@pytest.mark.parametrize("loss", [0.1, 0.5])
def test_a_hiccup_is_over_at_once(monkeypatch: pytest.MonkeyPatch, loss: float) -> None:
    """Catches weights that two bad requests keep from serving, and learning that turns away from what it learned."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.6 - loss)))
    world.take(1, 20)
    while world.version:
        world.take(2, 1)
    world.take(1, 4)
    assert (world.version, world.saved_version()) == (1, 1)
    assert 1 in _kinds(world)
    assert world.supervisor.state()[1]["path"]["count"] > 0
    assert world.expected == pytest.approx(world.supervisor.acceptance)
    assert world.journal.drifts == []


def test_two_bad_requests_are_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an alarm that the next bad request confirms, however many good ones come then."""
    world = doubtful(monkeypatch)
    world.take(2, 1)
    world.take(1, 8)
    assert (world.version, world.journal.drifts) == (1, [])


def test_a_change_begins_with_the_requests_that_raised_the_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches requests of the old kind that test what is learned of the new one, and new ones that get lost."""
    world = doubtful(monkeypatch)
    world.take(2, 8)
    (drift,) = world.journal.drifts
    assert (drift.short, drift.long) == (pytest.approx(0.1), pytest.approx(0.7))
    sizes = dict(zip(("past", "latest", "held"), world.replay.state_dict()["parts"], strict=True))
    assert sizes["latest"] + sizes["held"] == 9
    assert set(_kinds(world)) <= {2}
    world.supervisor.begin_update()
    assert {int(one.prompt_ids[0]) for one in world.supervisor._latest} == {2}


def test_learning_waits_until_a_change_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches updates towards traffic that is over, and updates that never come again."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.1)))
    world.take(1, EVERY)
    assert world.supervisor.is_due()
    world.take(2, 1)
    assert (world.version, world.supervisor.is_due()) == (0, False)
    world.take(2, 8)
    assert world.journal.drifts
    assert world.supervisor.is_due()


def test_learning_goes_on_where_there_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches updates that wait whenever weights give way: mixed traffic would hardly learn."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.595)))
    while world.version:
        world.take(2, 1)
    assert world.supervisor._doubt is None
    assert world.supervisor.is_due()


def test_weights_that_are_live_again_are_not_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a verdict on weights that do no better than themselves: good traffic would count as a change."""
    world = doubtful(monkeypatch)
    world.take(1, 1)
    world.supervisor.archive.add(world.supervisor._doubt.suspended)  # type: ignore[union-attr,arg-type]
    world.supervisor._latest.extend([world.supervisor._latest[-1]] * 20)
    world.supervisor.fresh = 20
    world.supervisor.begin_update()
    assert world.version == 1
    world.take(1, 10)
    assert (world.version, world.journal.drifts) == (1, [])


def test_a_second_alarm_that_takes_the_first_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights on trial for requests that others served."""
    rates = table(kind1=(0.05, 0.9), kind2=(0.6, 0.48), kind3=(0.05, 0.15))
    world = World(monkeypatch, rates, update_every=RARELY)
    visit(world, 1)
    world.take(2, 90)
    assert world.version == 0
    world.learn(2, 0)
    drifts = len(world.journal.drifts)
    while world.version == 0:
        world.take(3, 1)
    world.take(2, 16)
    assert world.version == 0
    assert len(world.journal.drifts) <= drifts + 1


def test_a_second_alarm_does_not_hide_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a change, its first requests, and what was learned before it, that the next alarm makes forgotten."""
    rates = table(kind1=(0.2, 0.9, 0.2), kind2=(0.2, 0.2, 0.9), kind3=(0.3, 0.36, 0.1), kind4=(0.6, 0.2, 0.2))
    world = World(monkeypatch, rates, update_every=RARELY)
    visit(world, 1)
    visit(world, 2)
    drifts = len(world.journal.drifts)
    world.take(3, 2)
    assert world.version == 1
    world.take(4, 1)
    assert (world.version, world.archived()) == (0, [0, 1])
    world.take(4, 8)
    assert len(world.journal.drifts) == drifts + 1
    assert world.journal.drifts[-1].long == pytest.approx(0.9)
    assert world.archived() == [0, 1, 2]
    kinds = [int(one.prompt_ids[0]) for one in world.supervisor._latest]
    assert kinds == [3] * 2 + [4] * 9


def test_weights_that_could_not_come_back_do_so_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that are lost because making them live failed once."""
    world = doubtful(monkeypatch, archive_size=0)
    world.refuses_to_publish = True
    with pytest.raises(RuntimeError, match="no room"):
        world.take(1, 4)
    world.supervisor.failed(RuntimeError("no room"))
    assert world.copy == 1
    world.refuses_to_publish = False
    world.take(1, 1)
    assert (world.version, world.copy) == (1, 1)


def test_training_goes_on_from_what_came_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training copy that an update which failed in between has taken back to the initial weights."""
    world = doubtful(monkeypatch)
    world.supervisor.begin_update()
    world.supervisor.failed(RuntimeError("no memory"))
    assert world.copy == 0
    world.take(1, 4)
    assert (world.version, world.copy) == (1, 1)


def test_no_return_on_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that come back again and again although they have lost too much lately."""
    world = doubtful(monkeypatch)
    world.supervisor._watch._credit = 0.1
    world.take(1, 4)
    assert (world.version, world.supervisor._doubt) == (0, None)
    assert 1 in _kinds(world)


def test_initial_weights_need_no_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the safest weights of all that may not come back, because others have lost too much."""
    rates = table(kind1=(0.05, 0.9), kind2=(0.6, 0.44))
    world = World(monkeypatch, rates, update_every=RARELY)
    visit(world, 1)
    world.take(2, 50)
    while world.version == 0:
        world.take(1, 1)
    world.supervisor._watch._credit = 0.3
    world.take(2, 2)
    assert world.version == 0
    assert "chance" in world.journal.updates[-1].reason


def test_hiccups_fill_no_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that are remembered although they come back at once, and others that have to leave for them."""
    world = doubtful(monkeypatch)
    for _ in range(3):
        world.take(1, 40)
        world.take(2, 1)
        assert world.version == 0
    world.take(1, 4)
    assert (world.version, world.archived()) == (1, [0])


def test_weights_that_do_not_come_back_are_remembered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an archive without what was learned of the traffic that is over, or with many copies of it."""
    world = doubtful(monkeypatch)
    for _ in range(3):
        world.take(2, 40)
        world.take(1, 40)
        world.supervisor.begin_update()  # which tries them
        assert world.version == 1
    assert world.archived() == [0, 1]
