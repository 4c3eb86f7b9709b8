"""The probe: what no decoder here can reproduce is found by trying, and what fails is tried again."""

import pytest
import torch
from calls import LLAMA, both, static
from fakes import prompts, tiny_model, wrong_draft
from torch import nn

from hf_osd.serving import probe as probing
from hf_osd.serving.choice import choose_decoder
from hf_osd.serving.decoder import RaggedDecoder
from hf_osd.serving.preparation import Preparation
from hf_osd.serving.probe import Trial, probe


def found(model, rows=1, make=None):
    trial = Trial(prompts(1)["input_ids"].expand(rows, -1), [0] * rows, Preparation({}, 9))
    return probe(model, "ragged", make or (lambda *a: RaggedDecoder(model, *a)), trial)


class Rounded(nn.Module):
    """A layer of few bits, whose scale is that of all tokens fed at once, as dynamic quantisation does."""

    def __init__(self, inner, levels=3):
        super().__init__()
        self.inner, self.levels = inner, levels

    def forward(self, x):
        scale = x.abs().max() / self.levels
        return self.inner((x / scale).round() * scale)


def test_a_draft_need_not_be_exact():
    """Catches a draft in eight bits that is left out, although its errors cost speed only."""
    draft = tiny_model("llama")
    for layer in draft.model.layers:
        layer.mlp.down_proj = Rounded(layer.mlp.down_proj, levels=127)
    assistant = static(draft)
    expected, actual = both(LLAMA, assistant, prompts(2))
    assert torch.equal(expected, actual)
    assert (assistant.stats().fallbacks, assistant.stats().proposed_tokens > 0) == (0, True)


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_that_depend_on_how_many_tokens_are_fed(rows):
    """Catches dynamically quantised targets, served with the logits of a pass over other tokens."""
    target = tiny_model("llama")
    assert found(target, rows).suits
    for layer in target.model.layers:
        layer.mlp.down_proj = Rounded(layer.mlp.down_proj)
    result = found(target, rows)
    assert not result.suits
    assert "fed at once" in result.why
    assistant = static(wrong_draft(target, "noisy"), target)
    expected, actual = both(target, assistant, prompts(rows))
    assert torch.equal(expected, actual)
    assert assistant.stats().fallbacks == rows


def test_a_verdict_on_a_draft_is_none_on_a_target():
    """Catches a model that passed as a draft, and later serves as a target with errors that a draft may have."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Rounded(layer.mlp.down_proj, levels=127)
    trial = Trial(prompts(1)["input_ids"], [0], Preparation({}, 9), is_draft=True)
    assert probe(model, "ragged", lambda *a: RaggedDecoder(model, *a), trial).suits
    assert not found(model).suits


def test_a_hook_added_later_is_noticed():
    """Catches a verdict that outlives what it was about: the model's hooks change after its first request."""
    target = tiny_model("llama")
    assert found(target).suits

    def only_single_tokens(module, args, output):
        return output * 3.0 if output.shape[1] == 1 else output

    handle = target.model.layers[0].mlp.register_forward_hook(only_single_tokens)
    assert not found(target).suits
    handle.remove()
    assert found(target).suits


def test_a_hook_or_forward_replaced_by_another_is_noticed():
    """Catches a verdict that counts hooks, where one takes the place of another, or is put on every module at once."""
    target = tiny_model("llama")
    layer = target.model.layers[0].mlp
    handle = layer.register_forward_hook(lambda module, args, output: output)
    assert found(target).suits
    handle.remove()
    handle = layer.register_forward_hook(lambda module, args, output: output * (3.0 if output.shape[1] == 1 else 1.0))
    assert not found(target).suits
    handle.remove()
    original = layer.forward
    layer.forward = lambda x: original(x)
    assert found(target).suits
    layer.forward = lambda x: original(x) * (3.0 if x.shape[1] == 1 else 1.0)
    assert not found(target).suits
    del layer.forward
    assert found(target).suits

    def everywhere(module, args, output):
        return output * 3.0 if module is layer and output.shape[1] == 1 else output

    handle = nn.modules.module.register_module_forward_hook(everywhere)
    assert not found(target).suits
    handle.remove()


def test_preparation_of_its_own():
    """Catches models that change their inputs before every pass: a plain forward does not show it."""
    target = tiny_model("llama")
    original = target.prepare_inputs_for_generation

    def shifted(*args, **kwargs):
        made = original(*args, **kwargs)
        return made | {"input_ids": (made["input_ids"] + 1) % 61}

    target.prepare_inputs_for_generation = shifted
    assert not found(target).suits
    assistant = static(wrong_draft(target, "noisy"), target)
    expected, actual = both(target, assistant, prompts(2))
    assert torch.equal(expected, actual)
    assert assistant.stats().fallbacks == 2


def test_an_exception_is_no_verdict():
    """Catches one moment without memory that sends a model to plain decoding for ever, and one that is never tried."""
    target, calls = tiny_model("llama"), []

    def make(*args):
        calls.append(args)
        if len(calls) < 4:
            raise torch.OutOfMemoryError("no memory here")
        return RaggedDecoder(target, *args)

    results = [found(target, make=make) for _ in range(12)]
    assert "no memory here" in results[0].why
    assert [result.suits for result in results] == [False] * 7 + [True] * 5  # tried at requests 1, 2, 4 and 8
    assert len(calls) == 4


def test_a_trial_costs_nothing_later(monkeypatch):
    """Catches a probe that is run for every request."""
    target, tried = tiny_model("llama"), []
    original = probing._try
    monkeypatch.setattr(probing, "_try", lambda *args: tried.append(args) or original(*args))
    for seed in range(3):
        for rows in (1, 2, 3):
            inputs = prompts(rows, seed=seed)
            choose_decoder(target, Trial(inputs["input_ids"], [0] * rows), 20)
    assert len(tried) == 2  # one row, and several


def test_autocast_is_tried_apart():
    """Catches a verdict of full precision that is used under autocast."""
    target, keys = tiny_model("llama", dtype=torch.float32), set()
    for enabled in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert found(target).suits
            keys |= set(probing._findings[target])
    assert len(keys) == 2


def test_a_generation_config_of_the_models_own():
    """Catches a trial that fails on settings which the request itself overrides, so that nothing is speculated on."""
    target = tiny_model("llama")
    target.generation_config.update(num_return_sequences=3, do_sample=True, stop_strings=["x"], max_length=4)
    assert found(target).suits
    assert found(target, 2).suits
