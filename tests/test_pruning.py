"""Drafts cut out of a target: which layers and neurons, what is computed, what is shared, what is saved."""

import copy

import pytest
import torch
from fakes import prompts, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_osd.design.reading import read_texts
from hf_osd.drafts import pruning as pruning_module
from hf_osd.drafts import width as width_module
from hf_osd.drafts.depth import Depth, choose_layers
from hf_osd.drafts.likeness import likeness
from hf_osd.drafts.pruning import borrow, prune
from hf_osd.drafts.sharing import shared_with
from hf_osd.drafts.states import layers_of
from hf_osd.errors import InputError, MissingDependencyError, UnsupportedModelError

KINDS = ("llama", "qwen3", "gpt2", "gemma3")
WITH_WIDTH = KINDS  # their configurations say how wide they are
IDS = prompts(1, length=24)["input_ids"]


def texts(target, count=2):
    """Texts of 20 tokens that a target has read."""
    rows = [prompts(1, length=20, seed=seed)["input_ids"][0] for seed in range(count)]
    return read_texts(target, rows, [8] * count)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_same(found, expected):
    """Up to what a model that is loaded and one that is turned to float64 make of a constant in float32."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def by_neuron(module):
    return module.weight.detach() if hasattr(module, "nf") else module.weight.detach().T


def down_of(layer):
    return layer.mlp.c_proj if hasattr(layer.mlp, "c_proj") else layer.mlp.down_proj


def without(target, layers):
    """A copy of a target whose other layers add nothing to the state: their last projections are zero."""
    model = copy.deepcopy(target)
    for index, layer in enumerate(layers_of(model)):
        if index not in layers:
            for name, module in layer.named_modules():
                if name.endswith(("o_proj", "down_proj", "c_proj")):
                    module.weight.data.zero_()
                    if getattr(module, "bias", None) is not None:
                        module.bias.data.zero_()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_draft_is_the_target_without_the_other_layers(kind, tied):
    """Would catch layers in another order, a lost norm, or a kind of attention that stays at its place in the list."""
    target = tiny_model(kind, layers=6, tie_word_embeddings=tied)
    before = copy.deepcopy(target.state_dict())
    draft = prune(target, [1, 2, 5])
    assert type(draft) is type(target)
    assert not draft.training
    assert draft.config.num_hidden_layers == len(layers_of(draft)) == 3
    assert_same(logits(draft), logits(without(target, [1, 2, 5])))
    assert all(torch.equal(weight, before[name]) for name, weight in target.state_dict().items())


def test_kinds_of_attention_go_with_their_layers():
    """Would catch a draft whose windowed layers look at everything."""
    target = tiny_model("gemma3", layers=8)
    kinds = target.config.layer_types
    assert len({kinds[1], kinds[5]}) == 2
    assert prune(target, [1, 5]).config.layer_types == [kinds[1], kinds[5]]
    assert len(target.config.layer_types) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_generates_with_its_cache(kind):
    """Would catch layers that write where they stood in the target, not where they stand now."""
    draft = prune(tiny_model(kind, layers=4), [1, 3])
    options = dict(max_new_tokens=12, do_sample=False)
    with_cache = draft.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    without_cache = draft.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **options)
    assert torch.equal(with_cache, without_cache)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [None, 20])
def test_only_embedding_and_head_are_borrowed(kind, tied, width):
    """Would catch a draft whose training changes its target, or one that copies the largest weights there are."""
    target = tiny_model(kind, layers=3, tie_word_embeddings=tied)
    draft = prune(target, [0, 2], width=width, observations=texts(target))
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert getattr(draft, part)().weight is getattr(target, part)().weight
    borrowed = {id(draft.get_input_embeddings().weight), id(draft.get_output_embeddings().weight)}
    names = {name for name, weight in draft.named_parameters() if id(weight) in borrowed}
    assert shared_with(draft, target) == names
    assert all(weight.requires_grad for weight in draft.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [None, 20])
def test_what_is_saved_is_loaded(kind, width, tmp_path):
    """Would catch a configuration that does not describe the weights beside it."""
    target = tiny_model(kind, layers=4)
    target.generation_config.max_new_tokens = 7
    draft = prune(target, [0, 3], width=width, observations=texts(target))
    draft.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(draft)
    assert loaded.generation_config.max_new_tokens == 7
    assert_same(logits(loaded), logits(draft))
    borrow(loaded, target)
    assert loaded.get_input_embeddings().weight is target.get_input_embeddings().weight
    assert_same(logits(loaded), logits(draft))


@pytest.mark.parametrize("kind", WITH_WIDTH)
def test_a_narrow_draft_is_the_wide_one_without_its_weakest_neurons(kind):
    """Would catch a gate and its input that lose different neurons, or the strongest ones left out."""
    target = tiny_model(kind, layers=3)
    observed = texts(target)
    narrow = prune(target, [0, 2], width=20, observations=observed)
    wide = prune(target, [0, 2])
    for layer, weakest in zip(layers_of(wide), weakest_neurons(wide, observed, 20), strict=True):
        by_neuron(down_of(layer))[weakest] = 0
    assert_same(logits(narrow), logits(wide))
    assert all(len(by_neuron(down_of(layer))) == 20 for layer in layers_of(narrow))


def weakest_neurons(model, observed, width):
    """From the definition: norm of what a neuron writes, times the mean of how strongly it is active."""
    found = []
    for layer in layers_of(model):
        seen = []
        handle = down_of(layer).register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0][0]))
        for one in observed:
            logits(model, torch.cat([one.prompt_ids, one.output_ids])[None])
        handle.remove()
        activity, weights = torch.cat(seen).abs().mean(0), by_neuron(down_of(layer))
        scores = [float(activity[n]) * sum(float(w) ** 2 for w in weights[n]) ** 0.5 for n in range(len(weights))]
        found.append(sorted(range(len(scores)), key=scores.__getitem__)[: len(scores) - width])
    return found


def test_the_configuration_says_the_width():
    """Would catch GPT-2's kin, whose width is written in another place, or not at all."""
    for kind, name in (("llama", "intermediate_size"), ("gpt2", "n_inner")):
        target = tiny_model(kind)
        assert getattr(prune(target, [0], width=7, observations=texts(target)).config, name) == 7


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "bloom"])
def test_layers_are_left_out_and_come_back(kind):
    """Would catch a target that stays without its layers, or a layer that returns another thing."""
    target = tiny_model(kind, layers=3)
    whole = logits(target)
    depth = Depth(target)
    with depth.only([1]):
        part = logits(target)
    assert not torch.allclose(part, whole)
    assert torch.equal(logits(target), whole)
    assert_same(part, logits(prune(target, [1])))


def test_a_replaced_forward_comes_back():
    """Would catch layers that stay out after an error, or an offloading hook, which replaces forwards too, lost."""
    target = tiny_model(layers=2)
    first, second = layers_of(target)
    first.forward = replaced = first.forward
    with pytest.raises(TypeError), Depth(target).only([]):
        target("not tokens")
    assert first.forward is replaced
    assert "forward" not in vars(second)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_that_do_nothing_go_first(kind):
    """Would catch a choice of the layers that matter least, or of those that lie last."""
    target = without(tiny_model(kind, layers=5), [0, 3])
    assert choose_layers(target, (5, 2), texts(target)) == {5: [0, 1, 2, 3, 4], 2: [0, 3]}
    with pytest.raises(InputError, match=r"counts must be in \[1, 5\], got \[6\]"):
        choose_layers(target, [6], texts(target))
    with pytest.raises(InputError, match="at least one observation"):
        choose_layers(target, [1], [])


def test_likeness_is_what_it_says():
    """Would catch positions that are one off, or probabilities of different tokens compared."""
    target, draft = tiny_model(), tiny_model(seed=1)
    observed = texts(target, count=3)
    agreements, acceptances = [], []
    for one in observed:
        ids = torch.cat([one.prompt_ids, one.output_ids])[None]
        p, q = logits(target, ids)[0].softmax(-1), logits(draft, ids)[0].softmax(-1)
        for place in range(len(one.prompt_ids) - 1, ids.shape[1] - 1):
            top = p[place].argsort(descending=True)[:32]
            agreements.append(int(p[place].argmax() == q[place].argmax()))
            others = [token for token in range(p.shape[1]) if token not in top]
            pairs = [(p[place, token], q[place, token]) for token in top] + [(p[place, others], q[place, others])]
            acceptances.append(sum(min(float(a.sum()), float(b.sum())) for a, b in pairs))
    found = likeness(draft, observed)
    assert found.positions == len(agreements) == 36
    assert found.agreement == pytest.approx(sum(agreements) / 36)
    assert found.acceptance == pytest.approx(sum(acceptances) / 36, abs=1e-5)
    itself = likeness(target, observed)
    assert itself.agreement == 1
    assert itself.acceptance == pytest.approx(1, abs=1e-5)


def test_a_layer_that_knows_its_place_cannot_be_moved():
    """Would catch a draft that silently computes something else: here, attention is scaled by the layer's number."""
    target = tiny_model("gpt2", layers=3, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedModelError, match="its layers work differently at another place"):
        prune(target, [1, 2])
    prune(target, [0, 1])


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [-1], [3], [True, 0.5]])
def test_layers_that_are_not_there_are_refused(layers):
    """Would catch a draft of no layers, or one with a layer twice."""
    with pytest.raises(InputError, match=r"layers must be .* \[0, 2\]"):
        prune(tiny_model(layers=3), layers)


def test_what_cannot_be_narrowed_says_why(monkeypatch):
    """Would catch an assertion of torch-pruning's own, or a bare ImportError."""
    target = tiny_model(layers=2)
    with pytest.raises(InputError, match=r"width must be in \[1, 48\], got 49"):
        prune(target, [0], width=49, observations=texts(target))
    with pytest.raises(InputError, match="at least one observation"):
        prune(target, [0], width=4)
    bloom = tiny_model("bloom")
    with pytest.raises(UnsupportedModelError, match="its configuration cannot say how wide"):
        prune(bloom, [0], width=4, observations=texts(bloom))
    monkeypatch.setattr(width_module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"hf-osd\[prune\]"):
        prune(target, [0], width=4, observations=texts(target))


def test_targets_that_cannot_be_cut_say_why():
    """Would catch a draft of random or of half the weights."""
    quantised = tiny_model()
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedModelError, match="it is quantised: load it in bfloat16"):
        prune(quantised, [0])
    adapted = tiny_model()
    adapted.model.layers[0].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"weights do not fit a smaller one.*extra"):
        prune(adapted, [0])


def test_a_machine_without_memory_is_not_taken_for_an_architecture(monkeypatch):
    """Would catch a design that leaves a draft out, and says that its target cannot be cut, where memory ran out."""
    target = tiny_model(layers=2)

    def starved(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(pruning_module, "_cut", starved)
    with pytest.raises(RuntimeError, match="can't allocate") as raised:
        prune(target, [0])
    assert not isinstance(raised.value, UnsupportedModelError)


def test_another_targets_embedding_is_refused():
    """Would catch a draft that reads rows of the wrong width."""
    draft = prune(tiny_model(), [0])
    with pytest.raises(UnsupportedModelError, match="weight of shape"):
        borrow(draft, tiny_model(hidden_size=16))
