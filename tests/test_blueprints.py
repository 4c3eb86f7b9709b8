"""What drafts are made of: layers, neurons and states, and that each kind serves and learns."""

import pytest
import torch
from fakes import ARCHITECTURES, VOCAB, prompts, tiny_model
from test_design_distilling import RECIPE, predictable_model

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.design.blueprints import Blueprint, blueprints, make_draft, settled
from hf_osd.design.candidates import weigh
from hf_osd.design.distilling import distil
from hf_osd.design.reading import read_texts
from hf_osd.design.recording import record
from hf_osd.design.requests import Request
from hf_osd.drafts.depth import Depth
from hf_osd.drafts.profiles import Cost, Profile
from hf_osd.drafts.states import layers_of
from hf_osd.drafts.width import configured_width

GENERAL = torch.arange(VOCAB)
GREEDY = {"max_new_tokens": 16, "do_sample": False}


def texts(target, count=2):
    rows = [prompts(1, length=20, seed=seed)["input_ids"][0] for seed in range(count)]
    return read_texts(target, rows, [8] * count)


def stack(draft):
    return next(module for module in draft.body.modules() if isinstance(module, torch.nn.ModuleList))


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "mistral", "gemma3"])
def test_every_blueprint_serves_losslessly(kind):
    """Catches a kind of draft that an architecture cannot be made into, or that changes what is said."""
    target = tiny_model(kind, layers=4, dtype=torch.float32)
    found = blueprints(target)
    assert len({one.name for one in found}) == len(found) >= 4
    expected = target.generate(**prompts(2), **GREEDY)
    for one in found:
        draft = make_draft(target, one, GENERAL, texts(target))
        assert len(stack(draft)) == len(one.layers)
        assert draft.state_layers == one.state_layers
        config = OnlineConfig(learn=False, draft_length_schedule="constant", draft_length=3)
        with OnlineAssistant(draft, target, config) as assistant:
            output = hf_osd.generate(target, **prompts(2), online_assistant=assistant, **GREEDY)
        assert torch.equal(output, expected)


@torch.no_grad()
def test_a_token_draft_is_the_target_without_the_other_layers():
    """Catches layers that are taken from another place, and an embedding or a head that is not the target's."""
    target = tiny_model(layers=6, dtype=torch.float32)
    one = settled(target, Blueprint((4, 5)), texts(target))
    draft = make_draft(target, one, GENERAL)
    ids = prompts(1, length=12)["input_ids"]
    with Depth(target).only(one.layers):
        expected = target(ids, use_cache=False).logits
    torch.testing.assert_close(draft(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_only_token_drafts_choose_their_layers():
    """Catches a draft that reads states and copies a layer that never saw such: its start is solved for the last."""
    target = tiny_model(layers=4, dtype=torch.float32)
    with torch.no_grad():
        for layer in (2, 3):  # layers that add nothing are not missed
            for name, weight in layers_of(target)[layer].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    weight.zero_()
    reading, tokens = Blueprint((2, 3), (1, 4)), Blueprint((2, 3))
    assert settled(target, reading, texts(target)) == reading
    assert settled(target, tokens, texts(target)).layers == (0, 1)


def test_a_narrower_draft_has_fewer_neurons():
    """Catches a width that is ignored, or that changes the target."""
    target = tiny_model(layers=4, dtype=torch.float32)
    full = configured_width(target)
    narrow = next(one for one in blueprints(target) if one.width is not None)
    draft = make_draft(target, narrow, GENERAL, texts(target))
    assert narrow.width == full // 2
    assert stack(draft)[0].mlp.down_proj.weight.shape[1] == full // 2
    assert layers_of(target)[-1].mlp.down_proj.weight.shape[1] == full


def test_drafts_that_read_states_promise_more_than_those_that_do_not():
    """Catches candidates that are compared by their cost alone."""
    target = tiny_model(layers=4, dtype=torch.float32)
    dear = Profile({}, tuple(Cost(1, 1, tokens, 1.0, 1.0, 1.0) for tokens in (1, 16)))
    found = weigh(target, dear, GENERAL, [Blueprint((3,)), Blueprint((3,), (2, 4))])
    assert [bool(one.blueprint.state_layers) for one in found] == [True, False]


def test_a_token_draft_is_distilled(tmp_path):
    """Catches a training or a judgement that wants states of a draft that reads none."""
    target = predictable_model()
    generator = torch.Generator().manual_seed(0)
    asked = [torch.randint(3, VOCAB, (6,), generator=generator) for _ in range(40)]
    learned = record(target, [Request(ids, None, 1) for ids in asked[8:]], tmp_path, max_new_tokens=20)
    held_out = [*record(target, [Request(ids, None, 6) for ids in asked[:8]], tmp_path, max_new_tokens=20)]
    draft = make_draft(target, Blueprint((1,)), GENERAL)
    history = distil(draft, learned, held_out, tmp_path / "work", RECIPE)
    assert history[-1].quality.accepted > history[0].quality.accepted
    assert history[-1].quality.chances[1] > 0
