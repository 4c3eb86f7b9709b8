"""How learning keeps out of the way: the share of the time it takes, when it waits, and when it must not."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from fakes import VOCAB, prompts, tiny_model, wrong_draft
from served import Live, learner_of, request

import hf_osd
from hf_osd import ClosedError, ConfigError, OnlineAssistant, OnlineConfig
from hf_osd.drafts.feature_config import LEARNING
from hf_osd.drafts.features import FeatureDraft
from hf_osd.learning import OnlineLearner, reading
from hf_osd.learning.reading import BatchParts
from hf_osd.learning.throttle import Throttle
from hf_osd.team import Team


def learn(duty: Throttle, seconds: float, part: float = 0.004, is_over: Callable[[], bool] = lambda: False) -> float:
    """Work in parts for a while; the share of the time that was work."""
    began, worked = time.perf_counter(), 0.0
    duty.resume()
    while worked == 0.0 or time.perf_counter() - began < seconds:
        time.sleep(part)
        worked += duty.give_way(is_over)
    return worked / (time.perf_counter() - began)


def fail_in(context: AbstractContextManager[Any]) -> None:
    with context:
        raise ZeroDivisionError


def update_until_closed(learner: OnlineLearner) -> None:
    with pytest.raises(ClosedError):
        learner.update()


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < deadline:
        time.sleep(0.005)
    return condition()


def test_the_share_holds_while_a_request_is_in_flight() -> None:
    """Catches learning that ignores requests, and learning that starves while serving never ends."""
    duty = Throttle(0.2)
    with duty.serving(), duty.serving():
        assert 0.1 < learn(duty, 1.0) < 0.25


def test_gaps_between_requests_are_no_idle_time() -> None:
    """Catches a pause that is forgotten at each gap: under back-to-back requests learning would then hardly pause."""
    duty, over = Throttle(0.1), threading.Event()

    def serve() -> None:
        while not over.is_set():
            with duty.serving():
                time.sleep(0.01)

    server = threading.Thread(target=serve)
    server.start()
    try:
        assert learn(duty, 1.0) < 0.25
    finally:
        over.set()
        server.join()


def test_it_is_free_without_requests_also_after_some() -> None:
    """Catches learning that is slowed for nobody, and a request that fails and counts for ever."""
    duty = Throttle(0.05)
    with pytest.raises(ZeroDivisionError):
        fail_in(duty.serving())
    with duty.serving():
        assert learn(duty, 0.0) < 0.1
    assert learn(duty, 0.5) > 0.7  # all but the moment in which the next request might follow


def test_all_of_the_time_never_pauses() -> None:
    """Catches a duty cycle of 1 that still yields: inline learning, whose request waits, has it."""
    duty = Throttle(1.0)
    with duty.serving():
        assert learn(duty, 0.2) > 0.9


@pytest.mark.parametrize("wakes", ["the end of the last request", "stop"])
def test_a_pause_ends_early(wakes: str) -> None:
    """Catches a `close` that waits for a pause, idle time that is slept through, and a pause of the wrong request."""
    duty, over = Throttle(1e-4), threading.Event()
    first, second = duty.serving(), duty.serving()
    first.__enter__()
    second.__enter__()
    thread = threading.Thread(target=learn, args=(duty, 0.0, 0.004, over.is_set))
    thread.start()
    first.__exit__(None, None, None)
    thread.join(0.3)
    assert thread.is_alive()
    if wakes == "stop":
        over.set()
        duty.wake()
    else:
        second.__exit__(None, None, None)
    thread.join(5.0)
    assert not thread.is_alive()


def test_parts_fit_the_time() -> None:
    """Catches parts that stay large on a slow device or small on a fast one, and rows that are lost or come twice."""
    batch = {
        "input_ids": torch.arange(24).reshape(8, 3),
        "attention_mask": torch.ones(8, 3, dtype=torch.long),
        "position_ids": torch.zeros(8, 3, dtype=torch.long),
        "learn_mask": torch.ones(8, 2, dtype=torch.bool),
    }
    parts, sizes, seen = BatchParts(9, max_rows=4), [], []
    for seconds in (0.001, 0.007, 0.1):
        for part in parts.of(batch):
            sizes.append(len(part["input_ids"]))
            seen.append(part["input_ids"])
            parts.fit(seconds)
    assert sizes == [1, 2, 4, 1, 4, 4, 4, 2, 1, 1]
    assert torch.equal(torch.cat(seen), batch["input_ids"].repeat(3, 1))


def test_parts_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches logits of all positions by the whole vocabulary at once, which take gigabytes where it is large."""
    batch = {
        "input_ids": torch.arange(24).reshape(8, 3),
        "attention_mask": torch.ones(8, 3, dtype=torch.long),
        "position_ids": torch.zeros(8, 3, dtype=torch.long),
        "learn_mask": torch.ones(8, 2, dtype=torch.bool),
    }
    assert next(BatchParts(1000).of(batch)) is batch
    monkeypatch.setattr(reading, "LOGITS_BYTES", 3 * 2 * 1000 * 4)
    assert [len(part["input_ids"]) for part in BatchParts(1000).of(batch)] == [3, 3, 2]
    assert [len(part["input_ids"]) for part in BatchParts(10**9).of(batch)] == [1] * 8
    batch["vocabulary"] = torch.arange(1500)
    assert [len(part["input_ids"]) for part in BatchParts(10**9).of(batch)] == [2] * 4


def test_a_part_needs_no_columns_of_other_rows() -> None:
    """Catches padding that is computed, a cut through tokens or teacher, and rows with nothing to learn from."""
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4], [0, 7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),
        "position_ids": torch.zeros(3, 4, dtype=torch.long),
        "teacher_tail": torch.tensor([[0.0, 0.0, 0.3], [0.1, 0.2, 0.3], [0.0, 0.0, 0.0]]),
        "learn_mask": torch.tensor([[False, False, True], [True, True, False], [False, False, False]]),
    }
    first, second = BatchParts(9, max_rows=1).of(batch)
    assert first["input_ids"].tolist() == [[5, 6]]
    assert first["teacher_tail"].tolist() == [[pytest.approx(0.3)]]
    assert all(torch.equal(second[name], batch[name][1:2]) for name in batch)


def test_learning_goes_on_under_load_and_its_pauses_are_not_learning() -> None:
    """Catches an update that waits for the traffic to end, and `learn_seconds` that count waiting."""
    live = Live()
    learner = learner_of(live, update_every=100, background=True, steps_per_update=2, duty_cycle=0.2)
    learner.observe(request(live.draft, 0))
    learner.update()  # starts the trainer
    before, began = learner.counters.seconds, time.perf_counter()
    with learner.throttle.serving():  # a request of another thread
        learner.update()
    passed = time.perf_counter() - began
    assert (learner.counters.updates, learner.counters.steps) == (2, 4)
    assert learner.counters.positions == 4 * 12
    assert 0.0 < learner.counters.seconds - before < 0.5 * passed
    learner.close()


def test_inline_learning_never_pauses() -> None:
    """Catches a deadlock or a slow request: inline, another request may be in flight while this one waits."""
    live = Live()
    learner = learner_of(live, update_every=1, duty_cycle=1e-6)
    with learner.throttle.serving():  # that of another thread
        learner.observe(request(live.draft, 0))
        learner.observe(request(live.draft, 1))
    assert learner.counters.updates == 2
    learner.close()


@pytest.mark.parametrize("pauses_while", ["judging", "training"])
def test_close_is_prompt_in_a_pause(pauses_while: str) -> None:
    """Catches a close that waits until the duty cycle lets the work go on."""
    before = threading.enumerate()
    live = Live()
    learner = learner_of(live, update_every=100, background=True, duty_cycle=1e-6)
    learner.observe(request(live.draft, 0))
    assert eventually(lambda: len(learner.journal.requests) == 1)
    with learner.serving():
        if pauses_while == "judging":
            learner.observe(request(live.draft, 1))
        else:
            threading.Thread(target=update_until_closed, args=[learner], daemon=True).start()
            assert eventually(lambda: learner.learner._trainer is not None)
        time.sleep(0.5)
        began = time.perf_counter()
        learner.close()
        assert time.perf_counter() - began < 3.0
    assert not [one for one in threading.enumerate() if one.name == "hf_osd-learner" and one not in before]
    assert learner.counters.updates == 0
    assert learner.counters.steps <= 1  # the one in progress


def test_the_assistant_tells_when_requests_are_in_flight() -> None:
    """Catches a policy that never hears of a request, or not of its end where it fails."""
    target = tiny_model()
    config = OnlineConfig(background=True, duty_cycle=1e-6)
    with OnlineAssistant(tiny_model(seed=1), target, config) as assistant:
        duty: Any = assistant._learner.throttle
        team = Team(["default"], assistant.routes, assistant.experience)
        with team.request([True], None), team.request([True], None):
            assert duty._in_flight == 2
        with pytest.raises(ZeroDivisionError):
            fail_in(team.request([True], None))
        assert duty._in_flight == 0


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1])
def test_a_duty_cycle_is_a_share(value: float) -> None:
    """Catches a division by zero in the training thread, and a share in percent."""
    with pytest.raises(ConfigError, match="duty_cycle must be in"):
        OnlineConfig(duty_cycle=value)


def test_the_clock_of_work_stands_still_during_pauses():
    """Catches pauses that count as scoring: beside requests, hardly any would be scored any more."""
    of, over = Throttle(0.1), threading.Event()
    with of.serving():
        of.resume()
        began = of.now()
        over.wait(0.02)
        worked = of.give_way()
        assert abs(of.now() - began - worked) < 0.005


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


def test_nothing_is_recorded_while_there_is_no_time_to_learn():
    """Catches a recording that costs a percent of each request, and is thrown away."""
    target = tiny_model(layers=4)
    with OnlineAssistant(wrong_draft(target, "noisy"), target, OnlineConfig(learning_share=0.1)) as assistant:
        hf_osd.generate(target, **prompts(1), online_assistant=assistant, max_new_tokens=8)
        assert len(assistant._learner.learner.replay) == 1
        assistant._learner.learner.budget.spend(1e6, scoring=1e6)
        hf_osd.generate(target, **prompts(1), online_assistant=assistant, max_new_tokens=8)
        assert len(assistant._learner.learner.replay) == 1


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
