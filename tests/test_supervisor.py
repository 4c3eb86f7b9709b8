"""Decisions about updates: what of it goes live, and when. By a table of scores, and with real tiny models."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from traffic import Live, request
from world import EVERY, FOUR, MARK, World, published, table, visit

from hf_osd.errors import LearningError
from hf_osd.learning.gate import _PRIOR_SPREAD
from hf_osd.learning.judge import Judge, Score, Weights
from hf_osd.learning.path import MIXING
from hf_osd.learning.supervisor import _FRESH
from hf_osd.records import Observation


def test_better_weights_go_live_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gate that never opens, an update that is not noted, and other weights than those trained."""
    world = World(monkeypatch, lambda kind, number, version, mixing: 0.5 + 0.2 * mixing)
    world.take(1, 48)
    rate = world.supervisor.rate.value
    assert world.learn(1, 1) == "published"
    assert world.version == world.copy == world.saved_version() == 1
    live = world.live.published[-1]
    assert all(torch.equal(weight, live[name]) for name, weight in world.supervisor.student.weights().items())
    assert world.expected == pytest.approx(0.7)  # not that of the weights that left
    assert world.supervisor.rate.value > rate
    (noted,) = world.journal.updates
    assert (noted.decision, noted.request, noted.loss, noted.seconds) == ("published", 48, 0.5, 0.1)
    assert noted.gain == pytest.approx(1.0)
    assert noted.uncertainty is not None
    assert noted.mixing == 1.0
    assert noted.learning_rate == rate  # of its own steps


@pytest.mark.parametrize(
    ("rates", "mixing"),
    [((0.5, 0.7, 0.5, 0.3), 1 / 3), ((0.5, 0.4, 0.7, 0.3), 2 / 3), ((0.5, 0.4, 0.3, 0.7), 1.0)],
)
def test_what_goes_live_lies_as_far_as_paid(
    monkeypatch: pytest.MonkeyPatch, rates: Sequence[float], mixing: float
) -> None:
    """Catches going all the way although the first third wins, or another place than the one that won."""
    world = World(monkeypatch, lambda kind, number, version, mixing: rates[round(3 * mixing)])
    world.take(1, 48)
    rate = world.supervisor.rate.value
    assert world.learn(1, 1) == "published"
    assert world.mixing == pytest.approx(mixing)
    noted = world.journal.updates[-1]
    assert noted.mixing == mixing
    assert noted.gain == pytest.approx(1.0)
    assert (world.supervisor.rate.value > rate, world.supervisor.rate.value < rate) == (mixing == 1.0, mixing < 0.5)


def test_no_further_than_what_pays_certainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that change more than they gain from: they lose more where requests are unlike these."""
    world = World(monkeypatch, lambda kind, number, version, mixing: 0.5 + 0.2 * (mixing > 0) + 0.001 * mixing)
    world.take(1, 48)
    assert world.learn(1, 1) == "published"
    assert world.mixing == pytest.approx(1 / 3)


def test_what_paid_has_to_do_so_on_requests_that_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gate that asks only one of the two: what the latest requests said, or what is held out."""

    def decision(fresh: float, held_out: float) -> str:
        world = World(monkeypatch, lambda kind, number, version, mixing: rates[number in held] if version else 0.5)
        rates, held = (fresh, held_out), set[int]()
        world.train(1)
        world.take(1, 4 * EVERY)
        world.supervisor.begin_update()
        held |= {int(observation.prompt_ids[1]) for observation in world.replay.held}
        return world.train(1)

    assert decision(0.7, 0.7) == "published"
    assert decision(0.7, 0.49) == "refused"
    assert decision(0.5, 0.7) == "held"


@pytest.mark.parametrize(("gain", "decision"), [(0.05, "held"), (0.0, "held"), (-0.05, "refused")])
def test_uncertain_weights_wait(monkeypatch: pytest.MonkeyPatch, gain: float, decision: str) -> None:
    """Catches luck that is published, and learning that is thrown away before it could show anything."""
    world = World(monkeypatch, table(kind1=(0.5, 0.5 + gain * _PRIOR_SPREAD / 5)))  # of five tokens
    world.take(1, 64)
    assert world.learn(1, 1) == decision
    assert (world.version, world.copy, world.live.published) == (0, 1, [])


def test_refusals_in_a_row_roll_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training copy that is a little worse for ever: nothing it learns will be published."""
    world = World(monkeypatch, table(kind1=(0.5, 0.5 - 0.05 * _PRIOR_SPREAD / 5)))
    world.take(1, 64)
    rate = world.supervisor.rate.value
    for _ in range(50):
        world.train(1)
        world.take(1, EVERY)
    first, second = [number for number, decision in enumerate(world.decisions) if decision == "rolled back"][:2]
    assert first > 1
    assert set(world.decisions[:first]) == {"refused"}
    assert second == 2 * first + 1  # counted anew
    lowered = world.journal.updates[first + 1].learning_rate
    assert lowered is not None
    assert lowered < rate


def test_weights_that_do_harm_are_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training copy that stays where it does harm, and a rate that leads there again."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7, 0.2)))
    rate = world.supervisor.rate.value
    assert world.train(2) == "rolled back"
    assert (world.version, world.copy) == (1, 1)
    assert world.supervisor.state()[1]["path"]["count"] == 0  # no part of it is in the next candidate
    assert len(world.live.published) == 1
    assert world.supervisor.rate.value < rate


def test_what_is_worse_than_the_live_weights_alone_is_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a step back that costs all that was learned since, although it is still better than the beginning."""
    world = published(monkeypatch, table(kind1=(0.3, 0.7, 0.5)))
    assert world.train(2) == "refused"
    assert (world.version, world.copy) == (1, 2)


def test_nothing_goes_live_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that are published because nothing speaks against them: neither kind of test may be missing."""
    world = World(monkeypatch, table(kind1=(0.5, 1.0)))
    world.take(1, 48)
    for _ in range(2):
        world.replay.turn_page(0)  # nothing is held out of what it is now
        assert world.train(1) == "held"
        world.take(1, 2 * EVERY)  # the next update has been tested by these
    assert {update.reason for update in world.journal.updates} == {"there is nothing to test it on yet"}
    assert (world.version, world.copy) == (0, 1)
    assert world.train(1) == "published"


def test_each_request_tests_the_way_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches certainty that comes from counting the same requests at each update."""
    world = World(monkeypatch, table(kind1=(0.5, 0.5)))
    world.take(1, 48)

    def tested() -> int:
        return len(world.supervisor.state()[1]["path"]["tested"])

    for _ in range(3):
        world.train(1)
        assert tested() == len(world.replay.held) > 0
    world.take(1, EVERY)
    world.train(1)
    assert tested() == len(world.replay.held) - 1 + EVERY  # one of these four is held out as well


def test_losses_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches live weights that lose, fall back, and are followed at once by the next ones that look better."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.9, 0.1)))
    world.take(2, 1)  # leaves about 0.2 of the credit, to which each request adds 0.005
    assert (world.decisions[-1], world.version) == ("restored", 0)
    world.take(1, 32)
    assert world.train(1) == "held"
    assert "too much lately" in world.journal.updates[-1].reason
    world.take(1, 16)
    world.train(1)
    assert world.version == 1


def test_requests_that_wait_to_test_an_update_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows while updates are slow, and an update that judges all of it before it begins."""
    world = World(monkeypatch, table(kind1=(0.5, 0.7)))
    world.take(1, 48)
    world.train(1)
    world.take(1, 300)
    world.judged.clear()
    world.supervisor.begin_update()
    latest = range(world.count - _FRESH + 1, world.count + 1)
    assert sorted(world.judged) == sorted([(1, number) for number in latest] * len(MIXING))
    world.judged.clear()
    world.supervisor.begin_update()
    assert world.judged == []  # each request tests once


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gate", [True, False])
def test_weights_that_are_not_finite(monkeypatch: pytest.MonkeyPatch, value: float, gate: bool) -> None:
    """Catches NaN that goes live, with the gate or without, or that stays in the training copy."""
    world = World(monkeypatch, table(kind1=(0.5, 0.7)), gate=gate)
    world.take(1, 48)
    world.supervisor.begin_update()
    world.supervisor.student.model.lm_head.weight.data[0, 0] = value
    with pytest.raises(LearningError, match=r"not finite after the update: lm_head\.weight"):
        world.supervisor.finish_update(0.5, 0.1)
    world.supervisor.failed(LearningError("not finite"))
    assert world.live.published == []
    assert all(weight.isfinite().all() for weight in world.supervisor.student.weights().values())
    assert world.decisions == ["failed"]
    world.learn(1, 1)
    assert world.decisions[-1] == "published"
    assert all(weight.isfinite().all() for weight in world.live.published[-1].values())


def test_without_a_gate_everything_is_published_and_nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `gate=False` that judges after all, changes the rate, or takes weights back."""
    world = World(monkeypatch, table(kind1=(0.5, 0.1)), gate=False)
    world.take(1, 8)
    assert world.train(1) == "published"
    world.take(1, 50)
    assert (world.version, world.decisions, world.journal.drifts) == (1, ["published"], [])
    assert world.supervisor.rate.scale == 1.0
    assert world.replay.held == []


def test_without_a_gate_only_the_live_weights_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches forward passes whose outcome decides nothing: of initial weights, or of the way to what was learned."""
    world = World(monkeypatch, table(kind1=(0.5, 0.6, 0.7)), gate=False)
    world.take(1, 8)
    world.train(1)
    world.take(1, 40)
    world.train(2)
    world.take(1, 4)
    assert world.judged == [(0 if number <= 8 else 1 if number <= 48 else 2, number) for number in range(1, 53)]
    assert [round(entry.acceptance, 1) for entry in world.journal.requests] == [0.5] * 8 + [0.6] * 40 + [0.7] * 4
    assert world.supervisor.acceptance == pytest.approx((28 * 0.6 + 4 * 0.7) / 32)
    assert world.mixing == 1.0


def test_updates_are_due_sooner_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the full interval where acceptance has collapsed, and a short one for ever."""

    def interval(world: World, kind: int) -> int:
        world.supervisor.begin_update()
        taken = 0
        while not world.supervisor.is_due():
            world.take(kind, 1)
            taken += 1
        return taken

    world = World(monkeypatch, table(kind1=(0.8,), kind2=(0.2,)), update_every=8)
    assert not world.supervisor.is_due()
    world.take(1, 40)
    assert interval(world, 1) == 8
    while not world.journal.drifts:
        world.take(2, 1)
    assert interval(world, 2) < 8
    world.take(2, 30)
    assert interval(world, 2) == 8


def test_nothing_is_due_where_nothing_can_be_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an update on an empty buffer, where only rejected positions count and there are none."""
    world = World(monkeypatch, table(kind1=(1.0,)), positions="rejected")
    right = request(0).output_ids
    perfect = replace(request(0), prompt_ids=torch.tensor([1, 0]), draft_ids=right, accepted=right >= 0)
    world.supervisor.take([perfect] * (2 * EVERY))
    assert not world.supervisor.is_due()
    world.take(1, 1)
    assert world.supervisor.is_due()


def test_weights_that_could_not_be_published_are_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a supervisor that believes in weights the live draft never got, and goes on training from them."""
    world = World(monkeypatch, table(kind1=(0.5, 0.7, 0.6), kind2=(0.5, 0.1, 0.1)))
    world.take(1, 48)
    rate = world.supervisor.rate.value
    world.refuses_to_publish = True
    with pytest.raises(RuntimeError, match="no room"):
        world.learn(1, 1)
    world.supervisor.failed(RuntimeError("no room"))
    assert (world.version, world.copy, world.saved_version()) == (0, 0, 0)
    assert world.supervisor.rate.value == rate
    world.refuses_to_publish = False
    world.take(2, 50)  # the initial weights cannot lose against themselves
    assert "restored" not in world.decisions
    world.take(1, 60)
    assert world.learn(1, 2) == "published"


def test_state_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an archive, live weights, averages or a rate that a restart forgets."""
    world = World(monkeypatch, FOUR)
    visit(world, 1)
    visit(world, 2)
    groups, numbers = world.supervisor.state()
    again = World(monkeypatch, FOUR, seed=3)
    again.supervisor.load_state(groups, numbers)
    again.live.publish(groups["live"], numbers["acceptance"])
    saved, known = again.supervisor.state()
    assert known == numbers
    assert torch.equal(saved["average"][MARK], groups["average"][MARK])
    assert (again.copy, again.saved_version(), again.archived()) == (2, 2, [0, 1])
    assert again.supervisor.acceptance == world.supervisor.acceptance
    assert again.supervisor.rate.value == world.supervisor.rate.value
    again.take(1, 8)
    assert again.version == 1
    visit(again, 3)
    assert again.mixing == pytest.approx(1 / 3)  # from the saved initial weights
    untrained = "lm_head.weight"
    assert torch.equal(again.live.published[-1][untrained], groups["archive-0"][untrained])


def test_what_goes_live_is_what_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that change between the gate and the live draft, with real training."""
    live = Live()
    judged: list[dict[str, torch.Tensor]] = []
    scores = Judge.scores

    def spy(judge: Judge, weights: Weights, requests: Sequence[Observation]) -> list[Score]:
        if weights and requests:
            judged.append({name: weight.clone() for name, weight in weights.items()})
        return scores(judge, weights, requests)

    monkeypatch.setattr(Judge, "scores", spy)
    learner = live.learner()
    for number in range(60):
        learner.observe(request(number % 5))
    learner.close()
    assert learner.updates > 1
    assert len(live.published) >= learner.updates
    for weights in live.published:
        assert any(all(torch.equal(weights[name], one[name]) for name in weights) for one in judged)
    (values,) = {name: dict(live.draft.named_parameters())[name] for name in [MARK]}.values()
    assert torch.equal(values, live.published[-1][MARK])


def test_real_drafts_learn_forget_nothing_and_go_back() -> None:
    """Catches, with real models: nothing learned, no drift noted, and old traffic that has to be learned again."""
    live = Live()
    learner = live.learner()
    for seed, count in ((1, 60), (2, 60), (1, 16)):
        for number in range(count):
            learner.observe(request(number % 5, seed))
    learner.close()
    judged = [entry.acceptance for entry in learner.journal.requests]

    def mean(first: int, last: int) -> float:
        return sum(judged[first:last]) / (last - first)

    assert mean(0, 5) < 0.2 < 0.6 < mean(50, 60)
    assert 60 < learner.journal.drifts[0].request < 68
    assert mean(110, 120) > 0.5
    assert mean(120, 126) > 0.5
    assert mean(130, 136) > mean(50, 60) - 0.05
    assert "restored" in [update.decision for update in learner.journal.updates if update.request > 120]
    assert learner.failures == 0
