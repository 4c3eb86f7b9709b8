"""Learning where draft and target know different tokens: what is read, what can be learned, and what is counted."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from traffic import llama
from wired import learner_of, requests

from hf_osd.config import OnlineConfig
from hf_osd.learning.losses import overlap
from hf_osd.learning.on_policy import OnPolicySource
from hf_osd.learning.reading import ObservationCollator, Reader, teaches
from hf_osd.learning.scoring import Scorer

LARGE, SMALL = 64, 40


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {"gate": True},
    "no gate": {},
    "background": {"background": True, "duty_cycle": 1.0, "gate": True},
    "rejected": {"positions": "rejected"},
    "on policy": {"lmbda": 1.0},
    "full teacher": {"full_teacher": True},
    "LoRA": {"peft_config": {"r": 4}},
    "other loss": {"loss": "lk"},
}


@pytest.mark.parametrize(
    ("own", "targets", "greedy"), [(SMALL, LARGE, True), (LARGE, SMALL, True), (SMALL, LARGE, False)]
)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_learning_goes_on(settings: dict[str, Any], own: int, targets: int, greedy: bool) -> None:
    """Catches an embedding that is asked for a token it does not have, of the draft's or of the target's."""
    draft, target = llama(vocab_size=own), llama(seed=1, layers=2, vocab_size=targets)
    learner = learner_of(draft, target, **settings)
    for request in requests(target, 12, greedy):
        learner.observe(request)
    learner.update()
    learner.close()
    assert learner.counters.failures == 0
    assert learner.counters.steps > 0
    assert len(learner.journal.requests) == 12
    if not settings.get("gate"):
        assert learner.counters.updates >= 3
    assert all(bool(weight.isfinite().all()) for weight in draft.parameters())


def test_a_draft_with_fewer_tokens_learns() -> None:
    """Catches an update that succeeds and teaches nothing."""
    draft, target = llama(vocab_size=SMALL), llama(seed=1, layers=2, vocab_size=LARGE)
    stream = requests(target, 40)
    learner = learner_of(draft, target, gate=True, steps_per_update=4)
    for request in stream:
        learner.observe(request)
    learner.close()
    reachable = [float((request.teacher_ids[:, 0] < SMALL).float().mean()) for request in stream[-8:]]
    rates = [entry.acceptance for entry in learner.journal.requests[-8:]]
    assert sum(rates) > 0.6 * sum(reachable) > 2.0
    assert all(rate <= most + 1e-6 for rate, most in zip(rates, reachable, strict=True))


def test_each_model_reads_the_tokens_that_it_knows() -> None:
    """Catches a target that is asked about the text as the draft reads it, and one that reads what it has not."""
    draft, target = llama(vocab_size=SMALL), llama(seed=1, layers=2, vocab_size=LARGE)
    batch = ObservationCollator(64, "all")(requests(target, 3))
    assert int(batch["input_ids"].max()) == LARGE - 1
    for model, size in ((draft, SMALL), (target, LARGE)):
        read = Reader.of(model).options(batch)["input_ids"]
        assert torch.equal(read, batch["input_ids"].clamp(max=size - 1))


def test_positions_without_a_known_token_teach_nothing() -> None:
    """Catches a position where only the tail is left, which would count among those that were learned from."""
    request = requests(llama(seed=1, layers=2, vocab_size=LARGE), 1)[0]
    ids = request.teacher_ids.clone()
    ids[:5], ids[5:] = SMALL + 1, 3
    ids[7, 1:] = SMALL + 2  # one token is enough
    batch = ObservationCollator(64, "all", SMALL)([replace(request, teacher_ids=ids)])
    assert batch["learn_mask"][0].tolist() == [False] * 5 + [True] * 7
    everything = ObservationCollator(64, "all")([replace(request, teacher_ids=ids)])
    assert bool(everything["learn_mask"].all())


@pytest.mark.parametrize("positions", ["all", "rejected"])
def test_requests_without_a_known_token_are_not_kept(positions: str) -> None:
    """Catches updates on nothing."""
    request = requests(llama(seed=1, layers=2, vocab_size=LARGE), 1)[0]
    unknown = replace(request, teacher_ids=request.teacher_ids + LARGE)
    assert not teaches(unknown, positions, LARGE)
    assert teaches(unknown, positions, 3 * LARGE)
    assert teaches(unknown, positions)
    draft, target = llama(vocab_size=SMALL), llama(seed=1, layers=2, vocab_size=LARGE)
    learner = learner_of(draft, target, update_every=1, positions=positions)
    learner.observe(replace(request, teacher_ids=request.teacher_ids.clamp(min=SMALL)))
    assert (learner.counters.steps, learner.counters.failures, len(learner.journal.requests)) == (0, 0, 1)
    learner.close()


def test_mass_on_unknown_tokens_is_not_shared() -> None:
    """Catches an acceptance of one where the target can only choose what the draft cannot propose."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, LARGE, generator=generator).log_softmax(-1)
    student = torch.randn(6, SMALL, generator=generator)
    values, ids = teacher.sort(descending=True)
    expected = torch.minimum(teacher[:, :SMALL].exp(), student.softmax(-1)).sum(-1)
    tail = torch.zeros(6)
    torch.testing.assert_close(overlap(student, ids, values, tail), expected, rtol=1e-4, atol=1e-6)
    none = overlap(student, torch.full((6, 1), SMALL), torch.zeros(6, 1), tail)
    torch.testing.assert_close(none, torch.zeros(6), rtol=0.0, atol=1e-6)


def test_tokens_that_the_target_lacks_are_not_proposed() -> None:
    """Catches a scorer that counts proposals which serving never makes, and a draft that is scored too low."""
    target = llama(seed=1, layers=2, vocab_size=SMALL)
    draft = llama(seed=1, layers=2, vocab_size=SMALL)
    draft.resize_token_embeddings(LARGE, mean_resizing=False)
    with torch.no_grad():  # what nobody has trained would win
        draft.lm_head.weight[SMALL:] = 50.0 * draft.lm_head.weight[:SMALL].mean(0)
    request = requests(target, 4)
    blind, aware = Scorer(draft, 64, 4), Scorer(draft, 64, 4, proposed=SMALL)
    assert all(found["one"].acceptance == 1.0 for found in aware.scores({"one": {}}, request))
    assert any(found["one"].acceptance < 1.0 for found in blind.scores({"one": {}}, request))


def test_a_draft_writes_only_what_the_target_reads() -> None:
    """Catches on-policy texts that the target has no embedding for, or reads as other texts."""
    student, target = llama(vocab_size=LARGE), llama(seed=1, layers=2, vocab_size=SMALL)
    config = OnlineConfig(lmbda=1.0, top_k_teacher=6)
    recorded_ones = requests(target, 4)
    written = OnPolicySource(lambda size: recorded_ones, student, target, config).sample(4)
    assert all(int(one.output_ids.max()) < SMALL for one in written)
    assert all(int(one.teacher_ids.max()) < SMALL for one in written)
