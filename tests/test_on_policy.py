"""On-policy batches: the training copy's own outputs, and the target's distributions over them."""

import random
from typing import Any

import pytest
import torch
from fakes import VOCAB, tiny_model
from traffic import Live, recorded, request, target
from transformers import PreTrainedModel

from hf_osd.config import OnlineConfig
from hf_osd.learning.on_policy import OnPolicySource
from hf_osd.learning.online import OnlineLearner
from hf_osd.records import Observation

KINDS = ("llama", "gpt2")


def asked(prompt_length: int, output_length: int, seed: int = 0) -> Observation:
    """A recorded request of which only the prompt and the length of the output matter."""
    generator = torch.Generator().manual_seed(seed)
    nothing = torch.zeros(output_length, 1)
    return Observation(
        prompt_ids=torch.randint(3, VOCAB, (prompt_length,), generator=generator),
        output_ids=torch.randint(3, VOCAB, (output_length,), generator=generator),
        teacher_ids=nothing.long(),
        teacher_log_probs=nothing,
        teacher_tail=nothing[:, 0],
        draft_ids=torch.full((output_length,), -1),
        accepted=torch.zeros(output_length, dtype=torch.bool),
    )


REQUESTS = [asked(7, 5, seed=1), asked(3, 9, seed=2), asked(1, 2, seed=3)]


def source_of(
    student: Any, teacher: PreTrainedModel, requests: list[Observation] = REQUESTS, **settings: Any
) -> OnPolicySource:
    return OnPolicySource(
        lambda size: requests[:size], student, teacher, OnlineConfig(**{"lmbda": 1.0, "top_k_teacher": 6, **settings})
    )


@torch.no_grad()
def written_one_by_one(student: PreTrainedModel, requests: list[Observation], seed: int = 0) -> list[list[int]]:
    """The same draws without a cache, padding or positions: each row's whole text at every step."""
    generator = torch.Generator().manual_seed(seed)
    texts = [one.prompt_ids for one in requests]
    for _ in range(max(len(one.output_ids) for one in requests)):
        last = [student(text[None]).logits[0, -1] for text in texts]
        drawn = torch.multinomial(torch.stack(last).float().softmax(-1), 1, generator=generator)
        texts = [torch.cat((text, token)) for text, token in zip(texts, drawn, strict=True)]
    return [
        text[len(one.prompt_ids) :][: len(one.output_ids)].tolist() for text, one in zip(texts, requests, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_writes_as_it_would_without_cache_and_padding(kind: str) -> None:
    """Catches padding that is read, positions off by one, a cache of another row, greedy choices and dropout."""
    student = tiny_model(kind, seed=3).train()
    batch = source_of(student, tiny_model()).sample(3)
    student.eval()
    assert [one.output_ids.tolist() for one in batch] == written_one_by_one(student, REQUESTS)
    for one, recorded_one in zip(batch, REQUESTS, strict=True):
        assert torch.equal(one.prompt_ids, recorded_one.prompt_ids)
        assert torch.equal(one.draft_ids, one.output_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_target(kind: str) -> None:
    """Catches distributions of the student, of another position, with padding read, or without all of the tail."""
    teacher = tiny_model(kind, seed=4)
    batch = source_of(tiny_model("llama", seed=3), teacher).sample(3)
    for one in batch:
        ids = torch.cat((one.prompt_ids, one.output_ids))
        with torch.no_grad():
            log_probs = teacher(ids[None]).logits[0, len(one.prompt_ids) - 1 : -1].log_softmax(-1)
        values, top = log_probs.topk(6)
        assert torch.equal(one.teacher_ids, top)
        torch.testing.assert_close(one.teacher_log_probs, values.float(), rtol=1e-5, atol=1e-5)
        tail = 1.0 - values.exp().sum(-1)
        torch.testing.assert_close(one.teacher_tail, tail.float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(one.accepted, one.output_ids == top[:, 0])
    assert any(bool(one.rejected.any()) for one in batch)


def test_samples_follow_the_student() -> None:
    """Catches a temperature, a sharpened or truncated distribution, and one draw for all rows."""
    student, count = tiny_model(seed=3), 4000
    prompt = asked(4, 1, seed=5)
    batch = source_of(student, tiny_model(), [prompt] * count).sample(count)
    drawn = torch.cat([one.output_ids for one in batch]).bincount(minlength=VOCAB).double()
    with torch.no_grad():
        expected = count * student(prompt.prompt_ids[None]).logits[0, -1].softmax(-1)
    common = expected >= 5.0
    statistic = float(((drawn - expected)[common] ** 2 / expected[common]).sum())
    degrees = int(common.sum())
    # Mean plus six standard deviations of chi-squared: less than one false alarm in 10,000 seeds, and this is fixed.
    assert statistic < degrees + 6.0 * (2.0 * degrees) ** 0.5
    assert degrees > 5


def test_lmbda_is_the_share_of_batches() -> None:
    """Catches a coin for each request, one that is tossed by the global generator, and shares the wrong way round."""
    shares = []
    for lmbda in (0.0, 0.3, 1.0):
        source = source_of(tiny_model(seed=3), tiny_model(), REQUESTS[2:], lmbda=lmbda)
        shares.append(sum(source.sample(1)[0] is not REQUESTS[2] for _ in range(60)) / 60)
    assert shares[0] == 0.0
    assert 0.1 < shares[1] < 0.5
    assert shares[2] == 1.0


def test_global_random_state_is_untouched_and_seeds_count() -> None:
    """Catches samples from the generator that serving uses, and ones that nobody can repeat."""
    torch.manual_seed(8)
    before = random.getstate(), torch.get_rng_state()
    outputs = []
    for seed in (0, 0, 1):
        batch = source_of(tiny_model(seed=3), tiny_model(), seed=seed).sample(3)
        outputs.append(torch.cat([one.output_ids for one in batch]).tolist())
    assert outputs[0] == outputs[1] != outputs[2]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("lengths", [[(120, 6), (4, 100)], [(300, 6), (2, 3)], [(4, 200)], [(3, 20), (40, 2)]])
def test_requests_that_are_too_long(lengths: list[tuple[int, int]]) -> None:
    """Catches positions that the draft does not have (gpt2 has 128), and an output without a teacher."""
    requests = [asked(*both, seed=number) for number, both in enumerate(lengths)]
    for settings in ({}, {"max_length": 16}):
        batch = source_of(tiny_model("gpt2", seed=3), tiny_model(), requests, **settings).sample(len(requests))
        for one in batch:
            count = len(one.output_ids)
            assert count > 0
            assert one.teacher_ids.shape == (count, 6)
            assert len(one.teacher_tail) == len(one.accepted) == count


def test_a_target_with_a_small_vocabulary() -> None:
    """Catches a k that the target's vocabulary does not have."""
    batch = source_of(tiny_model(seed=3), tiny_model(), top_k_teacher=500).sample(2)
    assert batch[0].teacher_ids.shape == (5, VOCAB)
    torch.testing.assert_close(batch[0].teacher_tail, torch.zeros(5), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("peft_config", [None, {"r": 8}], ids=["full", "lora"])
@pytest.mark.parametrize("background", [False, True])
def test_a_draft_learns_from_its_own_outputs(peft_config: Any, background: bool) -> None:
    """Catches a trainer that never sees them, one that breaks an adapter, and an update that fails in silence."""
    live = Live()
    settings = {"lmbda": 1.0, "gate": False, "background": background, "peft_config": peft_config, "batch_size": 8}
    config = OnlineConfig(update_every=1000, learning_rate=1e-2, **settings)
    learner = OnlineLearner(live.draft, config, live.publish, target=target())
    prompts = [request(number) for number in range(8)]
    before = [recorded(target(), one.prompt_ids) for one in prompts]
    for one in before:
        learner.observe(one)
    losses = []
    for _ in range(6):
        learner.update()
        losses.append(learner.counters.last_loss)
    learner.close()
    assert (learner.counters.updates, learner.counters.failures) == (6, 0)
    assert losses[-1] < 0.7 * losses[0], losses
