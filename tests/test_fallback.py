"""Decisions after a request: alarms, earlier weights that go live again, and which ones are remembered."""

import pytest
from hf_osd.learning.watch import _LOSS_LIMIT
from world import EVERY, FOUR, World, published, table, visit


@pytest.mark.parametrize(
    ("loss", "most"), [(0.005, 0.4), (0.008, 0.4), (0.02, 0.2), (0.04, 0.2), (0.08, 0.2), (0.2, 0.2), (0.5, 0.2)]
)
def test_initial_weights_come_back_before_much_is_lost(
    monkeypatch: pytest.MonkeyPatch, loss: float, most: float
) -> None:
    """Catches live weights that stay although they lose against the initial ones: a little for ever, or much once."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.6 - loss)))
    before = len(world.journal.requests)
    world.take(2, 120)
    lost = sum(0.6 - judged.acceptance for judged in world.journal.requests[before:])
    assert world.version == 0
    assert lost <= most + loss + 1e-6  # the limit, and the request that makes it too much
    assert world.decisions.count("restored") == 1
    assert world.expected == pytest.approx(0.6)  # of the initial weights, not of those that left
    world.judged.clear()
    world.take(2, 1)
    assert world.judged == [(0, world.count)]  # once is enough, now that they are the live ones


@pytest.mark.parametrize("kinds", [(2, 3), (2, 2, 3), (2, 3, 3, 3), (2,) * 5 + (3,) * 95])
def test_drops_do_not_hide_a_loss(monkeypatch: pytest.MonkeyPatch, kinds: tuple[int, ...]) -> None:
    """Catches alarms that make each other start from zero: with changing traffic, the loss would never be noticed."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.9, 0.87), kind3=(0.1, 0.07)))
    before = len(world.journal.requests)
    for number in range(100):
        world.take(kinds[number % len(kinds)], 1)
    assert world.journal.drifts
    lost = [0.03 if round(judged.acceptance, 2) in (0.87, 0.07) else 0.0 for judged in world.journal.requests[before:]]
    assert sum(lost) <= 0.2 + 0.03 + 1e-6
    assert world.version == 0


def take_turns(world: World, turns: dict[int, int], rounds: int) -> None:
    """So many requests of each kind in turn."""
    for _ in range(rounds):
        for kind, count in turns.items():
            world.take(kind, count)


@pytest.mark.parametrize(("loss", "is_chance"), [(0.1, True), (0.15, False)])
def test_stretches_of_losses_in_mixed_traffic(monkeypatch: pytest.MonkeyPatch, loss: float, is_chance: bool) -> None:
    """Catches weights that win on the whole, and fall back whenever some requests in a row are of the other kind."""
    turns = {1: 6, 2: 3}
    assert turns[2] * loss > _LOSS_LIMIT
    assert is_chance == (turns[2] * loss < 2 * _LOSS_LIMIT)
    world = World(monkeypatch, table(kind1=(0.5, 0.5 + 2 * loss), kind2=(0.5, 0.5 - loss)))
    take_turns(world, turns, 6)
    world.train(1)
    take_turns(world, turns, 6)
    assert world.train(1) == "published"
    assert world.decisions == ["held", "published"]
    take_turns(world, turns, 20)
    assert world.version == is_chance
    assert world.decisions[2:] == ["restored"] * (not is_chance)
    assert world.journal.drifts == []


@pytest.mark.parametrize(("loss", "version"), [(0.04, 1), (0.06, 0)])
def test_losses_that_are_not_made_up_for_are_no_chance(
    monkeypatch: pytest.MonkeyPatch, loss: float, version: int
) -> None:
    """Catches weights that lose a little on the whole, and hide it among requests on which they gain."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.5, 0.5 - loss), kind3=(0.5, 0.55)))
    before = len(world.journal.requests)
    take_turns(world, {2: 1, 3: 1}, 60)
    assert world.version == version
    lost = sum(0.5 - judged.acceptance for judged in world.journal.requests[before:])
    assert lost <= 0.2 + loss + 1e-6


@pytest.mark.parametrize(("loss", "turns"), [(0.5, True), (0.04, True), (0.005, False)])
def test_a_page_is_turned_where_requests_are_unlike_those_before(
    monkeypatch: pytest.MonkeyPatch, loss: float, turns: bool
) -> None:
    """
    Catches tests and teaching of other traffic that outlive a change, and those of the same that weights fell back in.

    With so small a loss, it takes more requests than the watch remembers, so there are none that they could be unlike.
    """
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.6 - loss)))
    while world.version:
        world.take(2, 1)
    assert "past" not in _parts(world)
    world.take(2, 8)
    assert ("past" in _parts(world)) == turns
    assert all(int(request.prompt_ids[0]) == 2 for request in world.replay.held) == turns
    assert (world.supervisor.state()[1]["path"]["count"] == 0) == turns


def _parts(world: World) -> list[str]:
    """Of the replay buffer, which have something in them."""
    sizes = world.replay.state_dict()["parts"]
    return [name for name, size in zip(("past", "latest", "held"), sizes, strict=True) if size]


@pytest.mark.parametrize("archive_size", [0, 3])
def test_a_hiccup_does_not_cost_what_was_learned(monkeypatch: pytest.MonkeyPatch, archive_size: int) -> None:
    """Catches a training copy that is thrown away for a few requests, and weights that never come back."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.1)), archive_size=archive_size)
    world.take(1, 20)
    world.take(2, 2)
    assert (world.version, world.copy) == (0, 1)
    world.take(1, 64)
    world.learn(1, world.copy)
    assert world.version == 1


def test_the_rest_of_a_batch_is_judged_by_the_weights_that_went_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches requests that are judged by weights which are no longer live, and requests that get lost."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.1)))
    before = len(world.journal.requests)
    world.take(2, 30, at_once=True)
    judged = [entry.acceptance for entry in world.journal.requests[before:]]
    switch = judged.index(0.6)
    assert judged == [0.1] * switch + [0.6] * (30 - switch)
    assert 0 < switch < 5
    assert [entry.request for entry in world.journal.requests] == list(range(1, world.count + 1))
    assert world.decisions.count("restored") == 1
    assert world.version == 0


def test_a_change_of_the_traffic_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a drop that goes unnoticed, or is noticed again and again, and a rate that stays low."""
    world = World(monkeypatch, table(kind1=(0.8, 0.1, 0.1), kind2=(0.2, 0.1, 0.1)))
    world.take(1, 48)
    assert world.learn(1, 1) == "rolled back"
    assert world.supervisor.rate.scale < 0.5
    before = world.count
    world.take(2, 30)
    (drift,) = world.journal.drifts
    assert before < drift.request < before + 8
    assert drift.short < drift.long
    assert world.supervisor.rate.scale == 1.0
    assert world.supervisor.acceptance == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("rates", [(0.55, 0.65, 0.45, 0.6), (0.95, 0.95, 0.05, 0.95)])
def test_usual_traffic_is_no_drift(monkeypatch: pytest.MonkeyPatch, rates: tuple[float, ...]) -> None:
    """Catches an alarm at every bad request, one where they differ as much as ever, and one where acceptance rises."""
    world = World(monkeypatch, lambda kind, number, *weights: rates[number % 4] if kind == 1 else 0.95)
    world.take(1, 100)
    world.take(2, 50)
    assert world.journal.drifts == []
    assert world.decisions == []


def test_old_weights_come_back_with_old_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches forgetting: what was learned of the first domain has to be live again within a few requests."""
    world = World(monkeypatch, FOUR)
    visit(world, 1)
    visit(world, 2)
    assert (world.version, world.archived()) == (2, [0, 1])
    before, trained = len(world.journal.requests), world.decisions.count("published")
    world.take(1, 8)
    assert (world.version, world.copy, world.saved_version()) == (1, 1, 1)  # the training copy goes on from there
    assert world.decisions.count("published") == trained
    assert world.decisions[-1] == "restored"
    assert [entry.acceptance for entry in world.journal.requests[before:]].count(0.9) >= 4
    assert world.supervisor.acceptance == pytest.approx(0.9)
    assert world.archived() == [0, 1, 2]


def test_going_back_and_forth_fills_no_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an archive of one draft many times, for which all others had to leave."""
    world = World(monkeypatch, FOUR, archive_size=3)
    for kind in (1, 2, 3, 1, 2, 1, 2, 1, 2):
        visit(world, kind)
        assert len(world.archived()) == len(set(world.archived()))
    trained = world.decisions.count("published")
    visit(world, 3)
    assert world.version == 3
    assert world.decisions.count("published") == trained


def test_weights_that_are_used_stay_in_the_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the oldest entry that leaves although it serves right now, instead of the one nobody needs."""
    world = World(monkeypatch, FOUR, archive_size=2)
    for kind in (1, 2, 3, 1):
        visit(world, kind)
    assert world.archived() == [0, 1, 3]


def test_a_drift_that_older_weights_do_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that go live although they are no better: each swap costs the requests in flight."""
    world = published(monkeypatch, table(kind1=(0.5, 0.9), kind2=(0.2, 0.2)))
    world.take(1, 48)
    world.take(2, 30)
    assert world.journal.drifts
    assert (world.version, world.decisions) == (1, ["published"])
    assert world.archived() == [0, 1]  # remembered for when the old traffic comes back
    world.take(2, 60)
    assert len({id(one) for one in world.supervisor.archive.all()}) == len(world.archived()) == 2


def test_weights_that_hardly_served_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an archive full of drafts of a few requests each."""
    world = World(monkeypatch, FOUR)
    visit(world, 1)
    world.take(2, 8)
    assert world.archived() == [0, 1]
    assert world.learn(2, 2, tested=EVERY) == "published"
    drifts = len(world.journal.drifts)
    world.take(2, 12)
    world.take(3, 7)
    assert len(world.journal.drifts) > drifts
    assert world.archived() == [0, 1]


@pytest.mark.parametrize(("gain", "archived"), [(0.03, [0]), (0.1, [0, 1])])
def test_weights_that_gained_little_are_not_remembered(
    monkeypatch: pytest.MonkeyPatch, gain: float, archived: list[int]
) -> None:
    """Catches an archive full of drafts that are as good as the initial one, for which better ones had to leave."""
    world = World(monkeypatch, table(kind1=(0.7, 0.7 + gain), kind2=(0.1, 0.1)))
    world.take(1, 48)
    assert world.learn(1, 1, tested=48) == "published"
    world.take(1, 48)
    world.take(2, 8)
    assert world.journal.drifts
    assert world.archived() == archived


def test_archive_of_size_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a setting that is ignored, and initial weights that are lost with it."""
    world = World(monkeypatch, FOUR, archive_size=0)
    visit(world, 1)
    visit(world, 2)
    assert world.archived() == [0]


def test_archived_weights_are_tried_where_no_alarm_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches traffic that comes back so slowly that acceptance never drops: better weights would stay in a drawer."""
    rates = table(kind1=(0.1, 0.9, 0.2), kind2=(0.1, 0.2, 0.5), kind3=(0.1, 0.8, 0.5))
    world = World(monkeypatch, rates)
    visit(world, 1)
    visit(world, 2)
    drifts = len(world.journal.drifts)
    for _ in range(16):
        world.take(3, EVERY)
        world.supervisor.begin_update()
    assert len(world.journal.drifts) == drifts
    assert (world.version, world.copy) == (1, 1)  # and learning goes on from there
    assert world.decisions.count("restored") == 1
    assert world.archived() == [0, 1, 2]  # what gave way is remembered
    assert {int(one.prompt_ids[0]) for one in world.replay.held} <= {3}  # others would hold back what is learned now
    assert world.supervisor.rate.scale == 1.0


def test_what_gives_way_does_not_push_out_what_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an archive without the weights that serve: they could not come back a second time."""
    kinds = {"kind1": (0.1, 0.9, 0.2, 0.2), "kind2": (0.1, 0.2, 0.9, 0.2), "kind3": (0.1, 0.1, 0.1, 0.7)}
    rates = table(**kinds, kind4=(0.1, 0.9, 0.2, 0.7))
    world = World(monkeypatch, rates, archive_size=2)
    for kind in (1, 2, 3):
        visit(world, kind)
    assert world.archived() == [0, 1, 2]
    world.take(4, 40)
    world.supervisor.begin_update()
    assert (world.version, world.archived()) == (1, [0, 1, 3])


def test_the_weights_before_the_last_update_are_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an update that turns out bad and can only be undone as far as the initial weights."""
    world = published(monkeypatch, table(kind1=(0.1, 0.7, 0.8), kind2=(0.1, 0.7, 0.2)))
    world.take(1, 48)
    assert world.train(2) == "published"
    world.take(2, 8)
    assert world.version == world.saved_version() == 1


def test_weights_that_came_back_can_be_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that were live before the last update, serve for long, and are forgotten at the next change."""
    rates = table(kind1=(0.1, 0.7, 0.8), kind2=(0.1, 0.7, 0.2), kind3=(0.1, 0.1, 0.1))
    world = published(monkeypatch, rates)
    world.take(1, 48)
    assert world.train(2) == "published"
    world.take(2, 8)
    assert world.version == 1
    world.take(2, 64)
    world.take(3, 8)
    assert 1 in world.archived()


def test_weights_that_could_not_be_restored_are_restored_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a fall back that is believed to have happened: the bad weights would serve for ever."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.3)))
    world.refuses_to_publish = True
    with pytest.raises(RuntimeError, match="no room"):
        world.take(2, 20)
    world.supervisor.failed(RuntimeError("no room"))
    assert (world.version, world.saved_version()) == (1, 1)
    assert "restored" not in world.decisions
    world.refuses_to_publish = False
    world.take(2, 20)
    assert (world.version, world.saved_version()) == (0, 0)


def test_requests_behind_a_fall_back_that_failed_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches requests of the background's queue that nobody learns from because one before them raised an alarm."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.3)))
    before = len(world.replay.observations())
    world.refuses_to_publish = True
    with pytest.raises(RuntimeError, match="no room"):
        world.take(2, 20, at_once=True)
    assert len(world.replay.observations()) == before + 20


def test_without_credit_only_the_initial_weights_are_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches losses that add up: other weights, which may lose as well, in the place of those that lost."""
    world = World(monkeypatch, FOUR)
    visit(world, 1)
    visit(world, 2)
    world.supervisor._watch._credit = 0.1
    world.take(1, 8)
    assert world.version == 2
    world.supervisor._watch._credit = 1.0
    world.supervisor.begin_update()
    assert world.version == 1
