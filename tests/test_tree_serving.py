"""Trees in whole requests: beside feature drafts, captured graphs, windows, and targets that take none."""

import copy

import pytest
import torch
from fakes import VOCAB, WINDOWED, tiny_model, wrong_draft
from plans import RandomPlans, repeating
from test_graphs import replayed  # noqa: F401 -- a fixture

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.drafts.features import FeatureDraft
from hf_osd.drafts.states import StateTap
from hf_osd.serving import probe as probing
from hf_osd.serving.draft_length import MeasuredLength

CONFIG = OnlineConfig(learn=False, draft_length=5)


def feature_draft(target):
    torch.manual_seed(0)
    return FeatureDraft.of(target, general=torch.arange(0, VOCAB, 2))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sample", [False, True])
def test_feature_drafts_read_the_accepted_path(batch, sample, monkeypatch):
    """Catches states of refused branches, or in the place of others, that a draft reads or that learning is given."""
    target = tiny_model(layers=4)
    draft = feature_draft(target)
    plans = RandomPlans(batch).install(monkeypatch)
    with OnlineAssistant(draft, target, OnlineConfig(draft_length=5, update_every=100)) as assistant:
        for seed in range(3):
            inputs = repeating(batch, seed=seed)
            output = hf_osd.generate(target, **inputs, online_assistant=assistant, max_new_tokens=24, do_sample=sample)
            if not sample:
                assert torch.equal(output, target.generate(**inputs, max_new_tokens=24, do_sample=False))
        observations = assistant._learner.learner.replay.observations()
    assert len(observations) == 3 * batch
    assert plans.shapes
    for one in observations:
        ids = torch.cat((one.prompt_ids, one.output_ids))[None, :-1]
        with torch.no_grad():
            _, states = StateTap.of(target, draft.state_layers).read(lambda ids=ids: target(ids))
        assert torch.equal(one.states, states[0].to(torch.bfloat16))


def test_feature_drafts_propose_the_same_whatever_was_checked(monkeypatch):
    """Catches states that are moved wrongly: the output would be right, and the draft's tokens worse than they are."""
    target, proposed = tiny_model(layers=4), []
    for nodes in (0, 16):  # besides what is drafted, which is all submitted
        RandomPlans(1, ["trial"]).install(monkeypatch)

        def cut(lengths, reach, least=0, nodes=nodes):
            return max(least, min(nodes, len(reach)))

        for name, choice in {"best_cut": cut, "filled": lambda _, n, most: n, "goes_on": lambda *_: True}.items():
            monkeypatch.setattr(MeasuredLength, name, choice)
        proposed.append({})
        original = hf_osd.OnlineAssistedGenerator.propose

        def noting(self, ids, ends, *given, seen=proposed[-1], original=original):
            text = tuple(ids[0, : ends[0]].tolist())
            proposal = original(self, ids, ends, *given)
            seen[text] = proposal.tokens[0, 0].item()
            return proposal

        with monkeypatch.context() as patch:
            patch.setattr(hf_osd.OnlineAssistedGenerator, "propose", noting)
            assistant = OnlineAssistant(feature_draft(target), target, CONFIG)
            hf_osd.generate(target, **repeating(1), online_assistant=assistant, max_new_tokens=40, do_sample=False)
    shared = proposed[0].keys() & proposed[1].keys()
    assert len(shared) > 10
    assert all(proposed[0][text] == proposed[1][text] for text in shared)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_replayed_trees_are_lossless(kind, batch, replayed, monkeypatch):  # noqa: F811
    """Catches a tree that is captured as that of another round, and a chain that replays a tree's mask."""
    target = tiny_model(kind)
    plans = RandomPlans(batch).install(monkeypatch)
    assistant = OnlineAssistant(wrong_draft(target, "noisy"), target, CONFIG)
    for seed in range(3):
        inputs = repeating(batch, seed=seed)
        expected = target.generate(**inputs, max_new_tokens=40, do_sample=False)
        actual = hf_osd.generate(target, **inputs, online_assistant=assistant, max_new_tokens=40, do_sample=False)
        assert torch.equal(actual, expected)
    assert plans.shapes


@pytest.mark.parametrize("kind", ["neo", "mistral", "gpt2", "gemma3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_up_to_the_end_of_what_a_target_sees(kind, batch, monkeypatch):
    """Catches proposals that lie beyond a window or the last position, because others or longer rows are before."""
    target = tiny_model(kind, max_position_embeddings=16) if kind == "gpt2" else tiny_model(kind)
    length = 8 if kind in ("mistral", "gemma3") else 16
    inputs = repeating(batch, length=4)
    call = dict(max_new_tokens=length - 4, do_sample=False)
    expected = target.generate(**inputs, **call)
    plans = RandomPlans(batch).install(monkeypatch)
    for how in ("noisy", "shifted", "perfect"):
        assistant = OnlineAssistant(wrong_draft(target, how), target, CONFIG)
        for _ in range(4):
            assert torch.equal(hf_osd.generate(target, **inputs, **call, online_assistant=assistant), expected)
    assert bool(plans.shapes) == (kind != "neo")  # whose window goes by columns: only up to where proposals end


@pytest.mark.parametrize("kind", [*WINDOWED, "gemma3n"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("captured", [False, True])
def test_trees_past_a_window(kind, batch, captured, request, monkeypatch):
    """
    Catches a window that counts the slots of a tree, graphs that read the window of the round before, and paths that
    are moved in layers without keys of their own.
    """
    if captured:
        request.getfixturevalue("replayed")
    target, inputs = tiny_model(kind), repeating(batch)
    plans = RandomPlans(batch).install(monkeypatch)
    call = dict(max_new_tokens=22, do_sample=False)
    for how in ("noisy", "shifted"):
        assistant = OnlineAssistant(wrong_draft(target, how), target, CONFIG)
        for _ in range(3):
            actual = hf_osd.generate(target, **inputs, **call, online_assistant=assistant)
            assert torch.equal(actual, target.generate(**inputs, **call))
    assert plans.shapes
    assert assistant.stats().fallbacks == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_targets_that_take_no_trees_get_chains(batch, monkeypatch):
    """Catches trees for a target whose attention goes by its own idea of what comes before what."""
    target = tiny_model("llama")

    def all_before(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is None or mask.ndim != 4:
            return None
        places = mask.shape[-1] - mask.flip(-1).long().argmax(-1) - 1  # the last one that each token sees
        seen = torch.arange(mask.shape[-1]) <= places[..., None]
        return args, kwargs | {"attention_mask": seen}

    target.register_forward_pre_hook(all_before, with_kwargs=True)
    plans = RandomPlans(batch).install(monkeypatch)
    assistant = OnlineAssistant(wrong_draft(target, "noisy"), target, CONFIG)
    inputs = repeating(batch)
    expected = target.generate(**inputs, max_new_tokens=24, do_sample=False)
    for _ in range(2):
        actual = hf_osd.generate(target, **inputs, online_assistant=assistant, max_new_tokens=24, do_sample=False)
        assert torch.equal(actual, expected)
    assert not plans.shapes
    assert assistant.stats().accepted_tokens
    assert not any(finding.takes_trees for finding in probing._findings[target].values())
    assert any(finding.takes_trees for finding in probing._findings[copied_and_served(tiny_model("llama"))].values())


def copied_and_served(target):
    assistant = OnlineAssistant(copy.deepcopy(target), target, CONFIG)
    hf_osd.generate(target, **repeating(1), online_assistant=assistant, max_new_tokens=4, do_sample=False)
    return target
