"""Models and requests that were made in inference mode, whose tensors take no gradient and no write outside of it."""

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import FIELDS
from torch import nn
from traffic import llama
from transformers import LlamaForCausalLM
from wired import learner_of, requests

import hf_osd
from hf_osd.records import Observation
from hf_osd.serving.weights import LiveWeights


def inference(wanted: bool = True) -> AbstractContextManager[Any]:
    return torch.inference_mode() if wanted else nullcontext()


def bound_requests(target: LlamaForCausalLM, count: int) -> list[Observation]:
    with torch.inference_mode():
        return requests(target, count)


SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "gate": {"gate": True},
    "background": {"background": True, "duty_cycle": 1.0},
    "LoRA": {"peft_config": {"r": 4}},
    "on policy": {"lmbda": 1.0},
    "full teacher": {"full_teacher": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(("draft_bound", "target_bound"), [(True, True), (True, False), (False, True)])
def test_learning_goes_on(settings: dict[str, Any], draft_bound: bool, target_bound: bool) -> None:
    """Catches a training copy that takes no gradient, a teacher that cannot be saved for it, and a publish refused."""
    with inference(draft_bound):
        draft = llama()
    with inference(target_bound):
        target = llama(seed=1, layers=2)
    before = [weight.clone() for weight in draft.parameters()]
    learner = learner_of(draft, target, **settings)
    for request in bound_requests(target, 8):
        learner.observe(request)
    learner.update()
    learner.close()
    assert (learner.counters.failures, learner.counters.steps > 0) == (0, True)
    if not settings.get("gate"):
        assert learner.counters.updates >= 1  # in the background, updates that come due together are one
        assert any(not torch.equal(old, new) for old, new in zip(before, draft.parameters(), strict=True))
    assert next(draft.parameters()).is_inference() == draft_bound


@pytest.mark.parametrize("settings", [{}, {"peft_config": {"r": 4}}, {"full_teacher": True}], ids=str)
def test_a_learner_that_is_made_in_inference_mode(settings: dict[str, Any]) -> None:
    """Catches a training copy made at once, in the mode of whoever makes it."""
    target = llama(seed=1, layers=2)
    with torch.inference_mode():
        draft = llama()
        learner = learner_of(draft, target, **settings)
        for request in bound_requests(target, 8):
            learner.observe(request)
        learner.update()
    learner.close()
    assert (learner.counters.updates, learner.counters.failures) == (3, 0)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_restart_in_inference_mode(mode: Any, tmp_path: Path) -> None:
    """Catches moments of the optimiser that are read in a mode in which they may never be written to again."""
    target = llama(seed=1, layers=2)
    settings = {"peft_config": {"r": 4}, "state_dir": tmp_path / "state"}
    weights = []
    for folder in ("none", "saved"):
        with mode():
            draft = llama()
            learner = learner_of(draft, target, **settings)
            if folder == "saved":
                assert learner.counters.updates == 3
            for request in bound_requests(target, 8):
                learner.observe(request)
            learner.update()
            learner.save(tmp_path / "saved")
            learner.close()
        weights.append({name: weight.clone() for name, weight in draft.named_parameters()})
    assert (learner.counters.updates, learner.counters.failures) == (6, 0)
    with mode():
        again = learner_of(llama(), target, peft_config={"r": 4})
        again.load(tmp_path / "saved")
        for request in bound_requests(target, 4):
            again.observe(request)
        again.close()
    assert (again.counters.updates, again.counters.failures) == (7, 0)


def test_what_is_shared_may_be_bound_too() -> None:
    """Catches a shared output layer that cannot be saved for the backward pass, or is copied so that it can."""
    with torch.inference_mode():
        target, draft = llama(seed=1, layers=2), llama()
        draft.set_output_embeddings(target.get_output_embeddings())
        draft.set_input_embeddings(target.get_input_embeddings())
    before = copy.deepcopy(target.state_dict())
    learner = learner_of(draft, target)
    for request in bound_requests(target, 8):
        learner.observe(request)
    learner.close()
    assert (learner.counters.updates, learner.counters.failures) == (2, 0)
    assert all(torch.equal(before[name], weight) for name, weight in target.state_dict().items())
    shared = learner.learner.student.model.lm_head.weight
    assert shared.data_ptr() == target.lm_head.weight.data_ptr()
    assert not shared.is_inference()


def test_recorded_requests_are_set_free() -> None:
    """Catches a request that is kept as it came, and may be written to by nobody, not even by `redact`."""
    target = llama(seed=1, layers=2)
    learner = learner_of(llama(), target, update_every=100)
    bound, free = bound_requests(target, 1)[0], requests(target, 1)[0]
    assert bound.teacher_tail.is_inference()
    learner.observe(bound)
    learner.observe(free)
    kept = learner.learner.replay.observations()
    learner.close()
    for one in kept:
        for name in FIELDS:
            assert not getattr(one, name).is_inference()
            assert torch.equal(getattr(one, name), getattr(bound, name))
    assert any(one is free for one in kept)


def test_publishing_reaches_bound_and_free_parameters() -> None:
    """Catches a write that the one or the other refuses, and a parameter that changes its kind or its place."""
    with torch.inference_mode():
        model: Any = nn.Linear(3, 4)
    model.bias = nn.Parameter(torch.zeros(4))
    places = [weight.data_ptr() for weight in model.parameters()]
    LiveWeights(model).publish({name: torch.ones_like(weight) for name, weight in model.named_parameters()})
    assert all(bool((weight == 1.0).all()) for weight in model.parameters())
    assert [weight.is_inference() for weight in model.parameters()] == [True, False]
    assert places == [weight.data_ptr() for weight in model.parameters()]
    model.bias.sum().backward()
    assert model.bias.grad is not None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("rows", [1, 2])
def test_generate_in_either_mode(mode: Any, rows: int) -> None:
    """Catches updates that fail, or outputs that differ, where the caller serves in inference mode."""
    target, draft = llama(seed=1, layers=2), llama()
    config = hf_osd.OnlineConfig(update_every=2, batch_size=2, steps_per_update=2, gate=False)
    prompts = torch.randint(3, 64, (rows, 5), generator=torch.Generator().manual_seed(0))
    call = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with mode(), hf_osd.OnlineAssistant(draft, target, config) as assistant:
        expected = target.generate(prompts, **call)
        for _ in range(4):
            assert torch.equal(hf_osd.generate(target, prompts, online_assistant=assistant, **call), expected)
        stats = assistant.stats()
    assert (stats.updates, stats.failed_updates) == (2 * rows, 0)
