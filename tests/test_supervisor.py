"""Decisions about weights: with a judge that reads its scores from a table, and with real tiny models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from traffic import Live, request

from hf_osd.config import OnlineConfig
from hf_osd.errors import LearningError
from hf_osd.learning.gate import _PRIOR_SPREAD
from hf_osd.learning.journal import Journal
from hf_osd.learning.judge import Judge, Score, Weights
from hf_osd.learning.replay import ReplayBuffer
from hf_osd.learning.student import Student
from hf_osd.learning.supervisor import Supervisor
from hf_osd.records import Observation

MARK = "model.norm.weight"  # its first value names a version of the weights; the initial ones are version 0
EVERY = 4
Table = Callable[[int, int, int], float]  # acceptance by kind of request, version of the weights, and request


class World:
    """A supervisor whose judge looks acceptances up, and whose training is a change of version."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, table: Table, **settings: Any) -> None:
        self.table = table
        self.live = Live()
        self._marks(self.live.draft)[0] = 0.0
        self.refuses_to_publish = False
        self.count = 0
        self.judged: list[int] = []
        config = OnlineConfig(**{"update_every": EVERY, **settings})
        self.replay = ReplayBuffer(config.replay_size, holds_out=config.gate)
        self.journal = Journal()
        self.supervisor = Supervisor(
            self.live.draft,
            Student(self.live.draft),
            config,
            self.replay,
            self.journal,
            self.publish,
            lambda: None,
        )
        monkeypatch.setattr(Judge, "scores", lambda judge, weights, requests: self.scores(weights, requests))

    @staticmethod
    def _marks(model: torch.nn.Module) -> torch.Tensor:
        return dict(model.named_parameters())[MARK].data

    def scores(self, weights: Weights, requests: Sequence[Observation]) -> list[Score]:
        version = int(weights[MARK][0]) if weights else self.version
        self.judged.append(version)
        rates = [self.table(*map(int, request.prompt_ids), version) for request in requests]
        return [Score(rate, 5 * rate, 12) for rate in rates]

    def publish(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self.refuses_to_publish:
            raise RuntimeError("no room")
        self.live.publish(weights)

    @property
    def version(self) -> int:
        """Of the live draft."""
        return int(self._marks(self.live.draft)[0])

    @property
    def copy(self) -> int:
        """Version of the training copy."""
        return int(self._marks(self.supervisor.student.model)[0])

    @property
    def decisions(self) -> list[str]:
        return [update.decision for update in self.journal.updates]

    def take(self, kind: int, count: int, at_once: bool = False) -> None:
        made = []
        for _ in range(count):
            self.count += 1
            made.append(replace(request(0), prompt_ids=torch.tensor([kind, self.count])))
        for part in [made] if at_once else [[one] for one in made]:
            self.supervisor.take(part)

    def train(self, version: int) -> str:
        """An update that makes the training copy another version."""
        self.supervisor.begin_update()
        self._marks(self.supervisor.student.model)[0] = version
        return self.supervisor.finish_update(0.5, 0.1)

    def archived(self) -> list[int]:
        return [int(one.weights[MARK][0]) for one in self.supervisor.archive.all()]

    def saved_version(self) -> int:
        """Of what a restart would take for the live weights."""
        groups, _ = self.supervisor.state()
        return int(groups["live"][MARK][0])


def table(**rates: Sequence[float]) -> Table:
    """Acceptance by kind (`kind1=...`) and version."""
    return lambda kind, number, version: rates[f"kind{kind}"][version]


def test_better_weights_go_live_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gate that never opens, an update that is not noted, and other weights than those trained."""
    world = World(monkeypatch, table(kind1=(0.5, 0.7)))
    world.take(1, 48)
    rate = world.supervisor.rate.value
    assert world.train(1) == "published"
    assert world.version == world.copy == world.saved_version() == 1
    published = world.live.published[-1]
    assert all(torch.equal(weight, published[name]) for name, weight in world.supervisor.student.weights().items())
    assert world.supervisor.rate.value > rate
    (noted,) = world.journal.updates
    assert (noted.decision, noted.request, noted.loss, noted.seconds) == ("published", 48, 0.5, 0.1)
    assert noted.gain == pytest.approx(1.0)
    assert noted.uncertainty is not None
    assert noted.learning_rate == pytest.approx(world.supervisor.rate.value)


@pytest.mark.parametrize(("gain", "decision"), [(0.05, "held"), (0.0, "held"), (-0.05, "refused")])
def test_uncertain_weights_wait(monkeypatch: pytest.MonkeyPatch, gain: float, decision: str) -> None:
    """Catches luck that is published, and learning that is thrown away before it could show anything."""
    world = World(monkeypatch, table(kind1=(0.5, 0.5 + gain * _PRIOR_SPREAD / 5)))  # of five tokens
    world.take(1, 64)
    assert world.train(1) == decision
    assert (world.version, world.copy, world.live.published) == (0, 1, [])


def test_refusals_in_a_row_roll_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training copy that is a little worse for ever: nothing it learns will be published."""
    world = World(monkeypatch, table(kind1=(0.5, 0.5 - 0.05 * _PRIOR_SPREAD / 5)))
    world.take(1, 64)
    rate = world.supervisor.rate.value
    decisions = [world.train(1) for _ in range(50)]
    end = decisions.index("rolled back")
    assert decisions[:end] == ["refused"] * end
    assert end > 1
    assert decisions[end + 1] == "refused"  # counted anew
    lowered = world.journal.updates[end].learning_rate
    assert lowered is not None
    assert lowered < rate


def test_weights_that_do_harm_are_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training copy that stays where it does harm, and a rate that leads there again."""
    world = World(monkeypatch, table(kind1=(0.5, 0.7, 0.2)))
    world.take(1, 48)
    world.train(1)
    rate = world.supervisor.rate.value
    assert world.train(2) == "rolled back"
    assert (world.version, world.copy) == (1, 1)
    assert len(world.live.published) == 1
    assert world.supervisor.rate.value < rate


def test_nothing_goes_live_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that are published because nothing speaks against them."""
    world = World(monkeypatch, table(kind1=(0.5, 1.0)))
    world.take(1, 48)
    world.replay.turn_page(0)  # nothing is held out of what it is now
    assert world.train(1) == "held"
    assert (world.version, world.copy) == (0, 1)
    world.take(1, 48)
    assert world.train(1) == "published"


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
    assert world.train(1) == "published"


def test_without_a_gate_everything_is_published_and_nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `gate=False` that judges after all, changes the rate, or takes weights back."""
    world = World(monkeypatch, table(kind1=(0.5, 0.1)), gate=False)
    world.take(1, 8)
    assert world.train(1) == "published"
    world.take(1, 50)
    assert (world.version, world.decisions, world.journal.drifts) == (1, ["published"], [])
    assert world.supervisor.rate.scale == 1.0
    assert world.replay.held == []


def published(monkeypatch: pytest.MonkeyPatch, rates: Table, **settings: Any) -> World:
    """A world in which version 1 was published for requests of kind 1."""
    world = World(monkeypatch, rates, **settings)
    world.take(1, 48)
    assert world.train(1) == "published"
    return world


@pytest.mark.parametrize("loss", [0.02, 0.04, 0.08, 0.2, 0.5])
def test_initial_weights_come_back_before_much_is_lost(monkeypatch: pytest.MonkeyPatch, loss: float) -> None:
    """Catches live weights that stay although they lose against the initial ones: a little for ever, or much once."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.6 - loss)))
    before = len(world.journal.requests)
    world.take(2, 100)
    lost = sum(0.6 - judged.acceptance for judged in world.journal.requests[before:])
    assert world.version == 0
    assert lost <= 0.5 + loss  # 0.005 a request over a hundred, and the request that makes it too much
    assert world.decisions[-1] == "restored"
    world.judged.clear()
    world.take(2, 1)
    assert world.judged == [0]  # once is enough, now that they are the live ones


@pytest.mark.parametrize("kinds", [(2, 3), (2, 2, 3), (2, 3, 3, 3)])
def test_drops_do_not_hide_a_loss(monkeypatch: pytest.MonkeyPatch, kinds: tuple[int, ...]) -> None:
    """Catches alarms that make each other start from zero: with changing traffic, the loss would never be noticed."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.9, 0.87), kind3=(0.1, 0.07)))
    before = len(world.journal.requests)
    for number in range(100):
        world.take(kinds[number % len(kinds)], 1)
    lost = [0.03 if round(judged.acceptance, 2) in (0.87, 0.07) else 0.0 for judged in world.journal.requests[before:]]
    assert sum(lost) <= 0.5 + 0.03
    assert world.version == 0


def test_a_hiccup_does_not_cost_what_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training copy that is thrown away for a few requests, and weights that never come back."""
    world = published(monkeypatch, table(kind1=(0.5, 0.7), kind2=(0.6, 0.1)))
    world.take(1, 20)
    world.take(2, 2)
    assert (world.version, world.copy) == (0, 1)
    world.take(1, 64)
    world.train(world.copy)
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
    assert [entry.request for entry in world.journal.requests] == list(range(1, 79))
    assert world.decisions.count("restored") == 1
    assert world.version == 0


def test_a_change_of_the_traffic_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a drop that goes unnoticed, or is noticed again and again, and a rate that stays low."""
    world = World(monkeypatch, table(kind1=(0.8, 0.1, 0.1), kind2=(0.2, 0.1, 0.1)))
    world.take(1, 48)
    world.train(1)
    world.train(2)
    assert world.supervisor.rate.scale < 0.5
    world.take(2, 30)
    (drift,) = world.journal.drifts
    assert 48 < drift.request < 56
    assert drift.short < drift.long
    assert world.supervisor.rate.scale == 1.0
    assert world.supervisor.acceptance == pytest.approx(0.2, abs=0.01)


def test_usual_traffic_is_no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an alarm at every bad request, and one where acceptance rises."""
    world = World(
        monkeypatch, lambda kind, number, version: (0.55, 0.65, 0.45, 0.6)[number % 4] if kind == 1 else 0.95
    )
    world.take(1, 100)
    world.take(2, 50)
    assert world.journal.drifts == []
    assert world.decisions == []


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


FOUR = table(
    kind1=(0.2, 0.9, 0.2, 0.2), kind2=(0.2, 0.2, 0.9, 0.2), kind3=(0.2, 0.2, 0.2, 0.9), kind4=(0.2, 0.8, 0.2, 0.2)
)


def visit(world: World, kind: int, requests: int = 48) -> None:
    """Traffic of a kind until its version of the weights is live, trained if it is not known, and then some more."""
    world.take(kind, requests)
    if world.version != kind:
        assert world.train(kind) == "published"
        world.take(kind, requests)


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
    assert world.train(2) == "published"
    drifts = len(world.journal.drifts)
    world.take(2, 14)
    world.take(3, 4)
    assert len(world.journal.drifts) > drifts
    assert world.archived() == [0, 1]


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
    for _ in range(10):
        world.take(3, EVERY)
        world.supervisor.begin_update()
    assert len(world.journal.drifts) == drifts
    assert (world.version, world.copy) == (1, 1)
    assert world.decisions.count("restored") == 1


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


def test_weights_that_could_not_be_published_are_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a supervisor that believes in weights the live draft never got, and goes on training from them."""
    world = World(monkeypatch, table(kind1=(0.5, 0.7, 0.6), kind2=(0.5, 0.1, 0.1)))
    world.take(1, 48)
    rate = world.supervisor.rate.value
    world.refuses_to_publish = True
    with pytest.raises(RuntimeError, match="no room"):
        world.train(1)
    world.supervisor.failed(RuntimeError("no room"))
    assert (world.version, world.copy, world.saved_version()) == (0, 0, 0)
    assert world.supervisor.rate.value == rate
    world.refuses_to_publish = False
    world.take(2, 50)  # the initial weights cannot lose against themselves
    assert "restored" not in world.decisions
    world.take(1, 60)
    assert world.train(2) == "published"


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


def test_state_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an archive, live weights, averages or a rate that a restart forgets."""
    world = World(monkeypatch, FOUR)
    visit(world, 1)
    visit(world, 2)
    groups, numbers = world.supervisor.state()
    again = World(monkeypatch, FOUR)
    again.supervisor.load_state(groups, numbers)
    again.live.publish(groups["live"])
    assert again.supervisor.state()[1] == numbers
    assert (again.copy, again.saved_version(), again.archived()) == (2, 2, [0, 1])
    assert again.supervisor.acceptance == world.supervisor.acceptance
    assert again.supervisor.rate.value == world.supervisor.rate.value
    again.take(1, 8)
    assert again.version == 1


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
    for seed, count in ((1, 60), (2, 60), (1, 12)):
        for number in range(count):
            learner.observe(request(number % 5, seed))
    learner.close()
    judged = [entry.acceptance for entry in learner.journal.requests]

    def mean(first: int, last: int) -> float:
        return sum(judged[first:last]) / (last - first)

    assert mean(0, 5) < 0.2 < 0.6 < mean(50, 60)
    assert 60 < learner.journal.drifts[0].request < 68
    assert mean(110, 120) > 0.5
    assert mean(126, 132) > mean(50, 60) - 0.05
    assert "restored" in [update.decision for update in learner.journal.updates if update.request > 120]
    assert learner.failures == 0
