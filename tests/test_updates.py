"""Updates of a learner: when they are due, what they learn from, what they publish, and how they fail."""

import logging
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from served import TARGET, Live, Weights, learner_of, request
from stored import FIELDS
from traffic import VOCAB, llama

from hf_osd.config import OnlineConfig
from hf_osd.errors import ConfigError, LearningError
from hf_osd.learning.online import OnlineLearner
from hf_osd.records import Observation


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_inline_learning_raises_acceptance() -> None:
    """Catches a learner that publishes, and learns nothing: the draft starts at chance."""
    live = Live()
    learner = learner_of(live, learning_rate=1e-2)
    rates = []
    for number in range(60):
        observation = request(live.draft, number)
        rates.append(observation.accepted.float().mean().item())
        learner.observe(observation)
        assert learner.counters.updates == (number + 1) // 4
    learner.close()
    assert sum(rates[:4]) / 4 < 0.2
    assert sum(rates[-12:]) / 12 > 0.5
    assert learner.acceptance > 0.4
    assert learner.counters.last_loss is not None
    assert learner.counters.seconds > 0.0
    assert learner.counters.failures == 0


def test_an_inline_request_is_scored_at_once() -> None:
    """Catches a request that is looked at only where it makes an update due: new traffic would be noticed late."""
    live = Live()
    learner = learner_of(live, update_every=100)
    for number in range(3):
        learner.observe(request(live.draft, number))
        assert [entry.request for entry in learner.journal.requests] == list(range(1, number + 2))
    assert (learner.counters.updates, learner.counters.steps, learner.counters.seconds > 0.0) == (0, 0, True)
    learner.close()


def test_inline_is_deterministic_and_leaves_the_global_random_state() -> None:
    """Catches a batch drawn while requests arrive, global seeds, and an import that draws from `random`."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    runs = []
    for _ in range(2):
        live = Live()
        learner = learner_of(live)
        for number in range(16):
            learner.observe(request(live.draft, number))
        learner.close()
        runs.append(live.published)
    assert len(runs[0]) == 4
    assert all(same(one, other) for one, other in zip(*runs, strict=True))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_update_sees_the_requests_that_made_it_due() -> None:
    """Catches a batch that was drawn before them: the first buffer holds one request, the second another."""
    live = Live()
    learner = learner_of(live, update_every=1, replay_size=1)
    seen: list[list[list[int]]] = []
    learner.observe(request(live.draft, 0))
    trainer: Any = learner.learner._trainer
    sample = trainer._sample

    def spy(size: int) -> list[Observation]:
        drawn = sample(size)
        seen.append([o.prompt_ids.tolist() for o in drawn])
        return drawn

    trainer._sample = spy
    for number in (1, 2):
        seen.clear()
        observation = request(live.draft, number)
        learner.observe(observation)
        assert seen == [[observation.prompt_ids.tolist()]] * OnlineConfig().steps_per_update
    learner.close()


def test_the_live_draft_changes_only_by_publishing() -> None:
    """Catches training on the live draft itself, and one that is left in train mode, frozen or with gradients."""
    live = Live()
    live.draft.requires_grad_(False)
    before = {name: weight.clone() for name, weight in live.draft.named_parameters()}
    learner = OnlineLearner(live.draft, OnlineConfig(update_every=2, gate=False), lambda weights, acceptance: None)
    for number in range(4):
        learner.observe(request(live.draft, number))
    assert learner.counters.updates == 2
    assert same(before, dict(live.draft.named_parameters()))
    assert not live.draft.training
    assert all(weight.grad is None and not weight.requires_grad for weight in live.draft.parameters())
    learner.close()


def test_bfloat16_and_tied_weights() -> None:
    """Catches a master copy in bf16, which loses small steps, and tied weights that come apart."""
    live = Live()
    live.draft = llama(tie_word_embeddings=True).bfloat16()
    learner = learner_of(live, update_every=2)
    for number in range(4):
        learner.observe(request(live.draft, number))
    learner.close()
    assert {weight.dtype for weight in live.published[-1].values()} == {torch.float32}
    assert live.published[-1].keys() == dict(live.draft.named_parameters()).keys()
    assert "lm_head.weight" not in live.published[-1]
    assert live.draft.dtype == torch.bfloat16


def test_a_failing_update_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    """Catches an exception that reaches the request or kills the thread, and a failure that is not told."""
    live = Live()
    learner = learner_of(live, update_every=1)
    sample = learner.learner.replay.sample
    learner.learner.replay.sample = lambda size: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    with caplog.at_level(logging.WARNING, logger="hf_osd.learning"):
        learner.observe(request(live.draft, 0))
    assert (learner.counters.updates, learner.counters.failures, live.published) == (0, 1, [])
    assert "serving goes on" in caplog.text
    with pytest.raises(LearningError, match="division by zero"):
        learner.update()
    learner.learner.replay.sample = sample  # type: ignore[method-assign]
    learner.observe(request(live.draft, 1))
    assert (learner.counters.updates, learner.counters.failures) == (1, 2)
    learner.close()


def poisoned(observation: Observation) -> Observation:
    return replace(observation, teacher_log_probs=torch.full_like(observation.teacher_log_probs, float("nan")))


def test_poisoned_weights_are_not_published() -> None:
    """Catches NaN in the live draft, and a training copy that stays poisoned."""
    live = Live()
    learner = learner_of(live, update_every=1)
    sample, poison = learner.learner.replay.sample, []
    learner.learner.replay.sample = lambda size: poison or sample(size)  # type: ignore[method-assign]
    good = request(live.draft, 0)
    learner.observe(good)
    poison.append(poisoned(good))
    learner.observe(good)
    assert (learner.counters.updates, learner.counters.failures) == (1, 1)
    assert all(weight.isfinite().all() for weight in live.draft.parameters())
    poison.clear()
    learner.observe(good)
    assert (learner.counters.updates, learner.counters.failures) == (2, 1)
    assert all(weight.isfinite().all() for weight in live.draft.parameters())
    learner.close()


@pytest.mark.parametrize("gate", [False, True])
def test_a_poisoned_recording_costs_only_itself(gate: bool) -> None:
    """Catches a recording that stays in the buffer and fails every update, and an average that stays NaN for ever."""
    live = Live()
    learner = learner_of(live, gate=gate, batch_size=8)
    sampled = request(live.draft, 1)  # a token that is not the likeliest: then the shared mass is what is judged
    sampled = replace(sampled, output_ids=(sampled.output_ids + 1) % VOCAB)
    for number in range(8):
        learner.observe(poisoned(sampled) if number % 4 == 3 else request(live.draft, number))
    assert learner.counters.failures == 0
    assert learner.counters.steps > 0
    assert 0.0 <= learner.acceptance <= 1.0
    assert all(0.0 <= entry.acceptance <= 1.0 for entry in learner.journal.requests)
    learner.close()


def test_a_publish_that_raises_is_a_failed_update() -> None:
    """Catches an update that counts although the live draft never got it."""
    calls = []

    def publish(weights: Mapping[str, torch.Tensor], acceptance: float) -> None:
        calls.append(len(weights))
        raise RuntimeError("no room")

    draft = llama()
    learner = OnlineLearner(draft, OnlineConfig(update_every=1, gate=False), publish)
    learner.observe(request(draft, 0))
    assert (learner.counters.updates, learner.counters.failures, len(calls)) == (0, 1, 1)
    learner.close()


def test_requests_without_rejections_or_output() -> None:
    """Catches an update on nothing, where only rejected positions are learned from."""
    live = Live()
    learner = learner_of(live, update_every=1, positions="rejected")
    o = request(live.draft, 0)
    perfect = Observation(
        o.prompt_ids, o.output_ids, o.teacher_ids, o.teacher_log_probs, o.teacher_tail,
        o.output_ids, torch.ones_like(o.accepted),
    )  # fmt: skip
    learner.observe(perfect)
    learner.observe(Observation(*(getattr(o, name)[:0] for name in FIELDS)))
    assert (learner.counters.updates, learner.counters.failures) == (0, 0)
    learner.observe(o)
    assert learner.counters.updates == 1
    learner.close()


def test_bad_settings_are_refused_before_any_work() -> None:
    """Catches an unknown training argument, or an adapter that does not fit, that only shows at the first update."""
    live = Live()
    with pytest.raises(ConfigError, match="no field 'warmup'"):
        learner_of(live, training_arguments={"warmup": 1})
    for settings in ({"full_teacher": True}, {"lmbda": 0.5}):
        with pytest.raises(LearningError, match="need the target, got None"):
            learner_of(live, **settings)
    with pytest.raises(ConfigError, match="peft_config"):
        learner_of(live, peft_config={"target_modules": ["no_such_module"]})


@pytest.mark.parametrize("settings", [{"full_teacher": True}, {"lmbda": 1.0}])
def test_updates_that_run_the_target_succeed(settings: dict[str, Any]) -> None:
    """Catches batches that the target cannot take, which failed every update with `full_teacher`."""
    live = Live()
    config = OnlineConfig(update_every=2, batch_size=2, gate=False, **settings)
    learner = OnlineLearner(live.draft, config, live.publish, TARGET)
    for number in range(4):
        learner.observe(request(live.draft, number))
    learner.close()
    assert (learner.counters.updates, learner.counters.failures) == (2, 0)
