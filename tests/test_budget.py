"""What learning may cost: earned by serving, spent by updates, and no request waits for long."""

import time

import pytest
import torch
from fakes import VOCAB, prompts, tiny_model, wrong_draft

import hf_osd
from hf_osd import ConfigError, OnlineAssistant, OnlineConfig
from hf_osd.drafts.feature_config import LEARNING
from hf_osd.drafts.features import FeatureDraft
from hf_osd.learning import budget
from hf_osd.learning.budget import LearningBudget


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(budget.time, "perf_counter", lambda: self.now)

    def serve(self, of, seconds):
        with of.serving():
            self.now += seconds


def test_updates_wait_until_they_are_earned(monkeypatch):
    """Catches learning that costs more than its share, and one that never begins again."""
    clock, of = Clock(monkeypatch), LearningBudget(0.1)
    assert not of.allows_update()
    spent = 0.0
    for served in range(1, 1001):
        clock.serve(of, 1.0)
        if of.allows_update():
            of.spend(1.5)
            spent += 1.5
        assert spent <= 0.1 * served + 1.5
    assert spent >= 0.1 * 1000 - 1.5


def test_an_update_takes_no_longer_than_the_request_that_waits(monkeypatch):
    """Catches a request that takes many times as long as its neighbours."""
    clock, of = Clock(monkeypatch), LearningBudget(0.1)
    clock.serve(of, 2.0)
    assert not of.is_used_up(1.9)
    assert of.is_used_up(2.0)


def test_without_a_limit_time_does_not_matter(monkeypatch):
    """Catches inline results that depend on the clock although nobody asked for a limit."""
    clock, of = Clock(monkeypatch), LearningBudget(None)
    of.spend(1e9)
    clock.serve(of, 1.0)
    assert of.allows_update()
    assert not of.is_used_up(1e9)


def test_settings_that_a_draft_recommends():
    """Catches a default that slows down drafts whose results are promised to repeat, and ignored recommendations."""
    target = tiny_model(layers=4)
    plain, feature = wrong_draft(target, "noisy"), FeatureDraft.of(target, general=torch.arange(VOCAB))
    assert OnlineAssistant(plain, target).config == OnlineConfig()
    assert OnlineAssistant(feature, target).config == OnlineConfig(**LEARNING)
    assert OnlineAssistant(feature, target, OnlineConfig()).config.learning_share is None
    assert OnlineConfig.for_draft(feature, learning_rate=0.5) == OnlineConfig(**{**LEARNING, "learning_rate": 0.5})


@pytest.mark.parametrize("value", [0, -1, "all", float("nan")])
def test_bad_shares_are_refused(value):
    """Catches a share that stops learning for ever, or means something else than it says."""
    with pytest.raises(ConfigError, match="learning_share must be in"):
        OnlineConfig(learning_share=value)


def test_learning_keeps_to_its_share():
    """Catches a budget that nobody asks: requests that are much faster than an update must not all wait for one."""
    target = tiny_model(layers=4, dtype=torch.float32)
    config = OnlineConfig(learning_share=0.5, update_every=1, steps_per_update=200)
    with OnlineAssistant(FeatureDraft.of(target, general=torch.arange(VOCAB)), target, config) as assistant:
        waits = []
        for seed in range(60):
            begun = time.perf_counter()
            hf_osd.generate(target, **prompts(1, seed=seed), online_assistant=assistant, max_new_tokens=24)
            waits.append(time.perf_counter() - begun)
        stats = assistant.stats()
    updates = assistant.journal.updates
    assert 0 < len(updates) < 60
    assert 0 < stats.learned_steps < 200 * len(updates)  # ended early
    assert stats.failed_updates == 0
