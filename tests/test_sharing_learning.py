"""Learning of a draft that shares weights with its target: the target never changes, and the draft learns on."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from borrowed import EMBEDDING, OUTPUT, SHARES, Share, copies, pair, same
from traffic import llama
from transformers import LlamaForCausalLM
from wired import learner_of, requests

from hf_osd.drafts.sharing import shared_with
from hf_osd.errors import LearningError
from hf_osd.learning.online import OnlineLearner
from hf_osd.serving.weights import LiveWeights


def learned(draft: LlamaForCausalLM, target: LlamaForCausalLM, count: int = 8, **settings: Any) -> OnlineLearner:
    """A learner of a draft, after some requests and two updates that were asked for."""
    learner = learner_of(draft, target, **settings)
    for request in requests(target, count):
        learner.observe(request)
    for _ in range(2):
        learner.update()
    return learner


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {"gate": True},
    "no gate": {},
    "background": {"background": True, "duty_cycle": 1.0, "gate": True},
    "on policy": {"lmbda": 1.0},
    "full teacher": {"full_teacher": True},
    "LoRA": {"peft_config": {"r": 4}},
    "LoRA of all": {"peft_config": {"r": 4, "target_modules": "all-linear", "bias": "all"}},
    "decay": {"training_arguments": {"weight_decay": 0.5}},
    "checkpointing": {"training_arguments": {"gradient_checkpointing": True}},
    "autocast": {"training_arguments": {"bf16": True}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_learning_leaves_the_target_alone(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Catches shared weights that are trained, decayed, adapted, merged or published to; and learning that stops."""
    draft, target = pair(dtype=dtype)
    before, own = copies(target), copies(draft)
    learner = learned(draft, target, **settings)
    learner.close()
    assert same(target, before)
    assert learner.counters.failures == 0
    assert learner.counters.steps > 0
    if not settings.get("gate"):
        assert learner.counters.updates >= 2
        changed = {name for name, weight in draft.named_parameters() if not torch.equal(weight, own[name])}
        assert changed
        assert not changed & {EMBEDDING, OUTPUT}


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES.keys())
def test_learning_leaves_the_targets_memory_alone(share: Share) -> None:
    """Catches a draft whose parameters are others than the target's, over the same memory."""
    draft, target = pair(share)
    before = copies(target)
    learner = learned(draft, target)
    learner.close()
    assert same(target, before)
    assert (learner.counters.updates >= 2, learner.counters.failures) == (True, 0)


@pytest.mark.parametrize("gate", [False, True])
def test_a_draft_learns_around_what_it_shares(gate: bool) -> None:
    """Catches gradients that stop at a shared output layer: nothing below would learn."""
    draft, target = pair()
    learner = learned(draft, target, count=40, gate=gate, steps_per_update=8)
    learner.close()
    assert learner.counters.updates > 0
    assert learner.acceptance > 0.3


def test_an_adapter_on_a_base_that_is_the_targets() -> None:
    """Catches a draft that is the target with an adapter of its own, and cannot learn or writes to the base."""
    peft = pytest.importorskip("peft")
    target = llama(seed=1)
    memo = {id(weight): weight for weight in target.parameters()}
    draft = copy.deepcopy(target, memo)
    draft = peft.get_peft_model(draft, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).get_base_model()
    before, own = copies(target), copies(draft)
    learner = learned(draft, target)
    learner.close()
    assert same(target, before)
    assert (learner.counters.updates >= 2, learner.counters.failures) == (True, 0)
    changed = {name for name, weight in draft.named_parameters() if not torch.equal(weight, own[name])}
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("settings", [{}, {"peft_config": {"r": 4}}], ids=["full", "LoRA"])
def test_a_draft_that_shares_everything_does_not_learn(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an update that fails for ever because there is nothing to train, and silence about it."""
    target = llama(seed=1)
    draft = copy.deepcopy(target, {id(weight): weight for weight in target.parameters()})
    before = copies(target)
    with caplog.at_level(logging.WARNING, logger="hf_osd.learning"):
        learner = learner_of(draft, target, update_every=1, **settings)
        for request in requests(target, 3):
            learner.observe(request)
    assert not learner.learns
    assert caplog.text.count("does not learn") == 1
    with pytest.raises(LearningError, match="nothing to train"):
        learner.update()
    assert (learner.counters.failures, learner.counters.steps, learner.has_state) == (0, 0, False)
    assert same(target, before)
    learner.close()


def test_what_is_shared_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Catches weights that are left alone in silence, and a line for every update."""
    draft, target = pair()
    with caplog.at_level(logging.INFO, logger="hf_osd.learning"):
        learned(draft, target).close()
    assert caplog.text.count("learning leaves alone") == 1
    assert EMBEDDING in caplog.text


def test_the_live_draft_refuses_what_is_shared() -> None:
    """Catches a mistake of learning that reaches the target, and half an update that was written before it."""
    draft, target = pair()
    before = copies(draft)
    live = LiveWeights(draft, shared_with(draft, target))
    with pytest.raises(LearningError, match=r"lm_head\.weight is shared"):
        live.publish(
            {name: torch.zeros_like(weight) for name, weight in draft.named_parameters() if "norm" not in name}
        )
    assert same(draft, before)


def test_a_saved_state_goes_on(tmp_path: Path) -> None:
    """Catches a state with shared weights in it, one that misses them, and one that overwrites the target's."""
    draft, target = pair()
    first = learned(draft, target)
    first.save(tmp_path)
    first.close()
    again, other = pair()
    before = copies(other)
    second = learner_of(again, other)
    second.load(tmp_path)
    assert all(torch.equal(weight, draft.get_parameter(name)) for name, weight in again.named_parameters())
    for request in requests(other, 4):
        second.observe(request)
    second.close()
    assert (second.counters.updates, second.counters.failures) == (first.counters.updates + 1, 0)
    assert same(other, before)


def test_a_state_in_which_shared_weights_were_trained_is_refused(tmp_path: Path) -> None:
    """Catches half of such a state gone live, which is no draft that anybody trained."""
    draft, target = llama(), llama(seed=1, layers=2)
    first = learned(draft, target)
    first.save(tmp_path)
    first.close()
    target.set_input_embeddings(draft.get_input_embeddings())  # from now on
    before = copies(draft)
    assert shared_with(draft, target) == {EMBEDDING}
    second = learner_of(draft, target)
    with pytest.raises(LearningError, match=r"another model\.embed_tokens\.weight than the target"):
        second.load(tmp_path)
    assert same(draft, before)
    second.close()
