"""What learning does to serving when something is wrong: recordings, gradients, streams, and its own parts."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from traffic import VOCAB, Live, llama, request, target

import hf_osd
from hf_osd.learning.learner import Learner
from hf_osd.learning.online import OnlineLearner
from hf_osd.learning.replay import ReplayBuffer
from hf_osd.learning.scoring import Score, Scorer
from hf_osd.learning.selector import LEAD, STATIC_MEMORY
from hf_osd.learning.student import Student
from hf_osd.records import Observation

# What live weights may lose against the initial ones before they give way, and the request that makes it too much.
TOLERANCE = STATIC_MEMORY + LEAD + 1.0
KINDS = 5  # requests of a domain
Stream = Sequence[tuple[bool, Observation]]  # whether a request is honest, and what is recorded


@cache
def good_weights() -> Mapping[str, torch.Tensor]:
    """A draft that knows its domain: there is something to lose."""
    live = Live()
    learner = live.learner(gate=False, learning_rate=5e-3)
    for number in range(36):
        learner.observe(request(number % KINDS))
    learner.close()
    return {name: weight.clone() for name, weight in live.draft.state_dict().items()}


def good_draft() -> Live:
    live = Live()
    live.draft.load_state_dict(good_weights())
    return live


def poisoned(observation: Observation, how: str, number: int) -> Observation:
    """The tokens that were served, with a teacher that says something else."""
    generator = torch.Generator().manual_seed(number)
    top = observation.teacher_ids
    if how == "random":
        top = torch.stack([torch.randperm(VOCAB, generator=generator)[: top.shape[1]] for _ in top])
    elif how == "shifted":
        top = (top + 1) % VOCAB
    else:
        assert how == "adversarial", how
        top = top.flip(-1)
    return replace(observation, teacher_ids=top)


def spam(number: int) -> Observation:
    """The same request, again and again: an output of one token."""
    honest = request(0)
    output = torch.full_like(honest.output_ids, 7)
    top = torch.arange(honest.teacher_ids.shape[1]).expand_as(honest.teacher_ids) + 7
    return replace(honest, output_ids=output, teacher_ids=top, draft_ids=output, accepted=output == 7)


def noise(number: int) -> Observation:
    """Tokens that nobody can foresee."""
    generator = torch.Generator().manual_seed(number)
    honest = request(0)
    top = torch.stack([torch.randperm(VOCAB, generator=generator)[: honest.teacher_ids.shape[1]] for _ in range(12)])
    prompt = torch.randint(0, VOCAB, (4,), generator=generator)
    return replace(honest, prompt_ids=prompt, output_ids=top[:, 0], teacher_ids=top)


def honest(count: int) -> Stream:
    return [(True, request(number % KINDS)) for number in range(count)]


def broken(observation: Observation, value: float) -> Observation:
    """What a target whose logits overflowed leaves behind; drawn tokens, so that probabilities count."""
    log_probs, tail = observation.teacher_log_probs.clone(), observation.teacher_tail.clone()
    log_probs[3], tail[3] = value, value
    return replace(
        observation, output_ids=observation.teacher_ids[:, 1], teacher_log_probs=log_probs, teacher_tail=tail
    )


def acceptance(scorer: Scorer, observation: Observation) -> float:
    (found,) = scorer.scores({"one": {}}, [observation])
    return found["one"].acceptance


def race(live: Live, learner: OnlineLearner, stream: Stream) -> tuple[list[float], list[float]]:
    """Acceptance of honest requests: with the draft as it was, and with the live one before each was learned from."""
    static, moving = Live(), Scorer(live.draft, 1000, 8)
    static.draft.to(live.draft.dtype).load_state_dict(live.draft.state_dict())
    still = Scorer(static.draft, 1000, 8)
    pairs = []
    for is_honest, observation in stream:
        if is_honest:
            pairs.append((acceptance(still, observation), acceptance(moving, observation)))
        learner.observe(observation)
    learner.close()
    return [before for before, _ in pairs], [now for _, now in pairs]


def largest_loss(static: Sequence[float], live: Sequence[float]) -> float:
    """Of all stretches of requests, in acceptance times requests."""
    worst = total = 0.0
    for before, now in zip(static, live, strict=True):
        total = max(0.0, total + before - now)
        worst = max(worst, total)
    return worst


def all_finite(live: Live) -> bool:
    tensors = [weight for weights in live.published for weight in weights.values()]
    return all(bool(weight.isfinite().all()) for weight in [*tensors, *live.draft.parameters()])


def within(seconds: float, function: Callable[[], object]) -> None:
    """Fail where a request waits for ever."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "a request waits for ever"


@pytest.mark.parametrize(("how", "share"), [("random", 1), ("shifted", 1), ("adversarial", 1), ("adversarial", 4)])
def test_poisoned_recordings(how: str, share: int) -> None:
    """Catches lies that are learned, published, and believed once honest requests tell otherwise."""
    live = good_draft()
    learner = live.learner(steps_per_update=4)
    stream = [
        (False, poisoned(request(number % KINDS), how, number))
        if number % share == 0
        else (True, request(number % KINDS))
        for number in range(24)
    ]
    static, now = race(live, learner, [*stream, *honest(10)])
    assert sum(static) / len(static) > 0.5
    assert largest_loss(static, now) <= TOLERANCE
    assert sum(now[-5:]) >= sum(static[-5:]) - 0.25
    assert learner.journal.updates
    assert all_finite(live)


@pytest.mark.parametrize("hostile", [spam, noise])
def test_a_hostile_stream(hostile: Callable[[int], Observation]) -> None:
    """Catches a draft that is spoilt by what attackers send, for them or for those who come after them."""
    live = good_draft()
    learner = live.learner(steps_per_update=4)
    attack = [(True, hostile(number)) for number in range(24)]  # counts as well: nobody may be served worse
    static, now = race(live, learner, [*honest(4), *attack, *honest(10)])
    assert largest_loss(static, now) <= TOLERANCE
    assert sum(now[-5:]) >= sum(static[-5:]) - 0.25
    assert learner.counters.failures == 0


def test_a_learning_rate_that_explodes() -> None:
    """Catches weights that are destroyed and go live, or not finite, and a rate that stays where it was."""
    live = good_draft()
    learner = live.learner(learning_rate=1e3, steps_per_update=2)
    static, now = race(live, learner, honest(24))
    assert largest_loss(static, now) <= TOLERANCE
    assert all_finite(live)
    decisions = [update.decision for update in learner.journal.updates]
    assert {"rolled back", "failed"} & set(decisions)
    assert learner.counters.failures == decisions.count("failed")
    assert learner.journal.updates[-1].learning_rate < 1e3


@pytest.mark.parametrize(("value", "gate"), [(math.nan, True), (math.inf, False)])
def test_gradients_that_are_not_finite(value: float, gate: bool) -> None:
    """Catches one bad step that poisons the live draft, the training copy or the optimiser for good."""
    live = Live()
    learner = live.learner(gate=gate, steps_per_update=4)
    for number in range(8):
        learner.observe(request(number % KINDS))
    before = learner.counters.updates
    hook = learner.learner.student.model.lm_head.weight.register_hook(lambda gradient: gradient * value)
    for number in range(8):
        learner.observe(request(number % KINDS))
    assert (learner.counters.updates, learner.counters.failures) == (before, 2)
    hook.remove()
    for number in range(24):
        learner.observe(request(number % KINDS))
    learner.close()
    assert learner.counters.failures == 2
    assert learner.counters.updates > before
    assert all_finite(live)


def test_a_roll_back_takes_the_moments_back() -> None:
    """Catches an optimiser that goes on in the direction that did harm, from weights that never went there."""
    live = Live()
    learner = live.learner(steps_per_update=2)
    for number in range(4):
        learner.observe(request(number))
    trainer: Any = learner.learner._trainer
    assert trainer.optimizer.state
    learner.learner.go_on_from_live()
    assert not trainer.optimizer.state
    learner.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_recordings_that_are_not_finite(value: float) -> None:
    """Catches one of them that fails every update which draws it, stands among the tests, or makes averages NaN."""
    live = Live()
    learner = live.learner(steps_per_update=4)
    for number in range(28):
        learner.observe(request(number % KINDS))
        if number < 2:
            learner.observe(broken(request(number), value))
    learner.close()
    assert learner.counters.failures == 0
    assert learner.counters.updates > 0
    assert 0.3 < learner.acceptance <= 1.0
    assert all(math.isfinite(entry.acceptance) for entry in learner.journal.requests)
    assert all_finite(live)


def test_tokens_without_any_probability_are_no_fault() -> None:
    """Catches recordings of a target that masks a part of its vocabulary with -inf, thrown away as broken."""
    live = Live()
    learner = live.learner(steps_per_update=4)
    for number in range(28):
        observation = request(number % KINDS)
        log_probs = observation.teacher_log_probs.clone()
        log_probs[:, -3:] = -math.inf
        learner.observe(replace(observation, teacher_log_probs=log_probs))
    learner.close()
    assert len(learner.journal.requests) == 28
    assert (learner.counters.failures, learner.acceptance > 0.3) == (0, True)


def test_a_bfloat16_draft_comes_back_bit_by_bit() -> None:
    """Catches initial weights that have been rounded on their way through learning."""
    live = good_draft()
    live.draft.bfloat16()
    initial = {name: weight.clone() for name, weight in live.draft.named_parameters()}
    learner = live.learner(steps_per_update=4)
    stream = [(False, poisoned(request(number % KINDS), "shifted", number)) for number in range(24)]
    static, now = race(live, learner, [*stream, *honest(5)])
    assert largest_loss(static, now) <= TOLERANCE
    assert learner.journal.updates[0].decision != "restored"
    assert "restored" in [update.decision for update in learner.journal.updates]
    assert all(torch.equal(weight, initial[name]) for name, weight in live.draft.named_parameters())
    assert {weight.dtype for weight in live.draft.parameters()} == {torch.bfloat16}


def test_a_bfloat16_draft_learns() -> None:
    """Catches gains that are judged in float32 and rounded away where they serve."""
    live = Live()
    live.draft.bfloat16()
    learner = live.learner(steps_per_update=4)
    for number in range(28):
        learner.observe(request(number % KINDS))
    learner.close()
    assert (learner.counters.updates > 0, learner.counters.failures) == (True, 0)
    assert learner.acceptance > 0.3


def test_publishing_fails_for_a_while() -> None:
    """Catches a supervisor that takes weights for live which are not, and one that gives up."""
    live = Live()
    publish, refuses = live.publish, True

    def sometimes(weights: Mapping[str, torch.Tensor], acceptance: float) -> None:
        if refuses:
            raise RuntimeError("no room")
        publish(weights, acceptance)

    live.publish = sometimes  # type: ignore[method-assign]
    learner = live.learner(steps_per_update=4)
    for number in range(20):
        learner.observe(request(number % KINDS))
    assert (learner.counters.updates, live.published) == (0, [])
    assert learner.counters.failures > 0
    failures, refuses = learner.counters.failures, False
    for number in range(24):
        learner.observe(request(number % KINDS))
    learner.close()
    assert learner.counters.failures == failures
    assert learner.counters.updates > 0
    assert learner.acceptance > 0.3


@pytest.mark.parametrize(
    ("kind", "name", "background"),
    [
        (Scorer, "scores", False),
        (Scorer, "scores", True),
        (ReplayBuffer, "add", False),
        (Learner, "_take_over", False),
    ],
)
def test_a_part_that_raises(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, background: bool) -> None:
    """Catches a request that waits for ever for the thread that died of it, and learning that does not go on."""
    live = Live()
    learner = live.learner(background=background, duty_cycle=1.0, steps_per_update=2)

    def observe(count: int) -> None:
        for number in range(count):
            learner.observe(request(number % KINDS))
        with suppress(hf_osd.LearningError):
            learner.update()  # waits for what is under way

    within(60.0, lambda: observe(4))
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, raises)
        within(60.0, lambda: observe(6))
        assert learner.counters.failures > 0
    failures, seen = learner.counters.failures, len(learner.journal.requests)
    within(60.0, lambda: observe(8))
    within(60.0, learner.close)
    assert learner.counters.failures == failures
    assert len(learner.journal.requests) == seen + 8


def raises(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("out of memory")


def test_a_failure_while_a_failure_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a thread that dies, and every later request with it, because memory is out for the clean-up as well."""
    live = Live()
    learner = live.learner(update_every=1, gate=False)
    within(60.0, lambda: learner.observe(request(0)))
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_take_over", raises)
        patch.setattr(Student, "load_state", raises)
        within(20.0, lambda: learner.observe(request(1)))
        within(20.0, lambda: learner.observe(request(2)))
    within(60.0, lambda: learner.observe(request(3)))
    assert learner.counters.failures == 2
    within(20.0, learner.close)


def test_serving_goes_on_with_every_fault_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a request that fails, or an output that changes, because learning is ill."""
    model, draft = target(), llama()
    config = hf_osd.OnlineConfig(update_every=3, batch_size=4, steps_per_update=2, learning_rate=1e3)
    scores = Scorer.scores
    calls: list[int] = []

    def sometimes(scorer: Scorer, candidates: Any, observations: Sequence[Observation]) -> list[dict[str, Score]]:
        calls.append(len(observations))
        return raises() if len(calls) % 7 == 0 else scores(scorer, candidates, observations)

    monkeypatch.setattr(Scorer, "scores", sometimes)
    with hf_osd.OnlineAssistant(draft, model, config) as assistant:
        for number in range(8):
            prompt = request(number % KINDS).prompt_ids[None]
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
            options["attention_mask"] = torch.ones_like(prompt)
            expected = model.generate(prompt, **options)
            assert torch.equal(hf_osd.generate(model, prompt, online_assistant=assistant, **options), expected)
            assistant._learner.observe(broken(request(number), math.nan))
            assistant._learner.observe(poisoned(request(number % KINDS), "random", number))
        assert assistant.stats().failed_updates > 0
        assert assistant.stats().requests == 8
    assert all(bool(weight.isfinite().all()) for weight in draft.parameters())
