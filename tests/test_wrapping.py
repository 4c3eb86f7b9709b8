"""Drafts inside of wrappers: which are unwrapped, which are refused, and how those that carry an adapter learn."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fakes import add_adapter
from torch import nn
from traffic import llama
from transformers import LlamaForCausalLM, PreTrainedModel
from wired import learner_of, requests

from hf_osd.drafts.wrapping import unwrap
from hf_osd.errors import ConfigError, HfOsdError, UnsupportedModelError

peft = pytest.importorskip("peft")


def lora(**options: Any) -> Any:
    """An adapter that does something from the beginning."""
    chosen = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", **chosen)


def adapted(seed: int = 0, **options: Any) -> Any:
    return peft.get_peft_model(llama(seed), lora(**options)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.arange(3, 12)[None]).logits


INSIDE: dict[str, Callable[[], Any]] = {
    "plain": llama,
    "peft": adapted,
    "peft, mixed": lambda: peft.get_peft_model(llama(), lora(), mixed=True).eval(),
    "compiled": lambda: torch.compile(llama(), backend="eager"),
    "peft, compiled": lambda: torch.compile(adapted(), backend="eager"),
    "compiled, peft": lambda: peft.get_peft_model(torch.compile(llama(), backend="eager"), lora()).eval(),
}


@pytest.mark.parametrize("make", INSIDE.values(), ids=INSIDE.keys())
def test_the_model_inside_is_found(make: Callable[[], Any]) -> None:
    """Catches a copy, an adapter that is lost on the way, and a wrapper in a wrapper."""
    model = make()
    inside = unwrap(model)
    assert isinstance(inside, PreTrainedModel)
    assert inside in list(model.modules())
    torch.testing.assert_close(logits(inside), logits(model))
    assert unwrap(inside) is inside


class Holder(nn.Module):
    """Somebody's own wrapper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.policy = model


class DistributedDataParallel(nn.Module):
    """As the one of torch holds its module, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "data parallel": (lambda: nn.DataParallel(llama()), r"DataParallel, which wraps one: pass model\.module"),
    "distributed": (lambda: DistributedDataParallel(adapted()), r"DistributedDataParallel.*pass model\.module"),
    "compiled, distributed": (
        lambda: torch.compile(DistributedDataParallel(llama()), backend="eager"),
        r"DistributedDataParallel.*pass model\.module",
    ),
    "own": (lambda: Holder(llama()), r"Holder, which wraps one: pass model\.policy"),
    "no language model": (lambda: nn.Linear(2, 2), "got Linear$"),
    "prompt": (
        lambda: peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        "'default' is a PROMPT_TUNING",
    ),
    "prefix": (
        lambda: peft.get_peft_model(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        "'default' is a PREFIX_TUNING",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_other_wrappers_are_refused_by_name(make: Callable[[], Any], message: str) -> None:
    """Catches a wrapper that is served as a model, fails deep inside, or is left without a way out."""
    with pytest.raises(UnsupportedModelError, match=message):
        unwrap(make())


def test_weights_that_are_spread_over_processes_are_refused() -> None:
    """Catches a model that torch has sharded in place, which looks like any other."""
    model = llama()
    model.__class__ = type("FSDPLlama", (type("FSDPModule", (), {}), LlamaForCausalLM), {})
    with pytest.raises(UnsupportedModelError, match="FSDPLlama, whose weights are spread"):
        unwrap(model)


@pytest.mark.parametrize("value", [None, 3, [llama()], LlamaForCausalLM], ids=["none", "int", "list", "class"])
def test_what_is_no_model_is_a_type_error(value: Any) -> None:
    """Catches an `AttributeError` from inside, and an error that is not of this package."""
    with pytest.raises(HfOsdError, match="must be a transformers model"):
        unwrap(value)
    with pytest.raises(TypeError):
        unwrap(value)


def learned(draft: PreTrainedModel, during: Callable[[int], Any] = lambda _: nullcontext(), **settings: Any) -> Any:
    """A learner that has seen twelve requests, each made while something was the case."""
    target = llama(seed=1, layers=2)
    learner = learner_of(draft, target, **{"learning_rate": 1e-3, **settings})
    for number, request in enumerate(requests(target, 12)):
        with during(number):
            learner.observe(request)
    if settings.get("background"):
        learner.update()  # waits for what is under way
    learner.close()
    return learner


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "gate": {"gate": True, "steps_per_update": 8, "learning_rate": 1e-2},
    "background": {"background": True, "duty_cycle": 1.0},
    "on policy": {"lmbda": 1.0},
    "full teacher": {"full_teacher": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("trainable", [True, False])
def test_the_adapter_that_a_draft_carries_learns(trainable: bool, settings: dict[str, Any]) -> None:
    """Catches a base that is trained, an adapter that is not, and weights that go live under other names."""
    wrapper = adapted()
    if not trainable:  # as loaded from disk
        wrapper.requires_grad_(False)
    draft = unwrap(wrapper)
    before = {name: weight.clone() for name, weight in draft.named_parameters()}
    learner = learned(draft, **settings)
    assert (learner.counters.failures, learner.counters.steps > 0) == (0, True)
    found = changed(draft, before)
    assert found or settings.get("gate")
    assert all("lora_" in name for name in found)
    assert {weight.requires_grad for name, weight in draft.named_parameters() if "lora_" in name} == {trainable}
    torch.testing.assert_close(logits(wrapper), logits(draft))


def test_gated_updates_of_an_adapter_go_live() -> None:
    """Catches a judge that scores the draft without the adapter that is learned: no update would ever pass."""
    draft = unwrap(adapted(target_modules=["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"], r=16))
    learner = learned(draft, gate=True, steps_per_update=16, learning_rate=3e-2)
    assert learner.counters.updates > 0


@pytest.mark.parametrize("trainable", [True, False])
def test_of_several_adapters_the_active_one_learns(trainable: bool) -> None:
    """Catches adapters that are not in use, trained or published."""
    wrapper = adapted()
    wrapper.add_adapter("other", lora())
    wrapper.set_adapter("other")
    if not trainable:
        wrapper.requires_grad_(False)
    draft = unwrap(wrapper)
    before = {name: weight.clone() for name, weight in draft.named_parameters()}
    learner = learned(draft)
    assert (learner.counters.updates, learner.counters.failures) == (3, 0)
    assert changed(draft, before)
    assert all(".other." in name for name in changed(draft, before))


def test_several_adapters_at_once() -> None:
    """Catches one of two adapters that are both in use, left out."""
    draft = unwrap(adapted())
    add_adapter(draft, lora(), "other")
    draft.set_adapter(["default", "other"])
    before = {name: weight.clone() for name, weight in draft.named_parameters()}
    learner = learned(draft)
    assert (learner.counters.updates, learner.counters.failures) == (3, 0)
    for part in (".default.", ".other."):
        assert any(part in name for name in changed(draft, before))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("when", [0, 5])
def test_an_adapter_that_is_disabled_for_a_while(when: int, gate: bool) -> None:
    """Catches a training copy in which the adapter stays disabled, since it was when the copy was made."""
    wrapper = adapted()
    draft = unwrap(wrapper)
    before = {name: weight.clone() for name, weight in draft.named_parameters()}
    learner = learned(draft, lambda number: wrapper.disable_adapter() if number == when else nullcontext(), gate=gate)
    assert (learner.counters.steps > 0, learner.counters.failures) == (True, 0)
    if not gate:
        assert changed(draft, before)
    for model in (learner.learner.student.model, learner.learner._scorer._skeleton):
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        assert layers
        assert not any(layer.disable_adapters for layer in layers)


def test_a_merged_adapter_is_refused() -> None:
    """Catches an adapter that has no part in the output: every update would fail, or teach nothing."""
    wrapper = adapted()
    wrapper.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        learned(unwrap(wrapper))
    learned(unwrap(wrapper), learn=False)
    wrapper.unmerge_adapter()
    assert learned(unwrap(wrapper)).counters.failures == 0
    wrapper.merge_adapter()
    assert learned(wrapper.unload()).counters.failures == 0


def test_the_config_must_not_ask_for_an_adapter_twice() -> None:
    """Catches an adapter on an adapter."""
    with pytest.raises(ConfigError, match="adapter already"):
        learned(unwrap(adapted()), peft_config={"r": 4})


def test_a_model_compiled_in_place_learns() -> None:
    """Catches a training copy that cannot be made of one, or that compiles itself."""
    draft = llama()
    draft.compile(backend="eager")
    assert unwrap(draft) is draft
    learner = learned(draft)
    assert (learner.counters.updates, learner.counters.failures) == (3, 0)


def test_unwrapping_leaves_the_wrapper_alone() -> None:
    """Catches a wrapper that loses its adapter, or its mode."""
    wrapper = adapted()
    before, names = logits(wrapper), {name for name, _ in wrapper.named_parameters()}
    unwrap(wrapper)
    assert torch.equal(before, logits(wrapper))
    assert names == {name for name, _ in wrapper.named_parameters()}
    assert copy.deepcopy(wrapper) is not wrapper
