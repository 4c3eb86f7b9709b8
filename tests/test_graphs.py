"""Captured forwards. Without a GPU, capture is replaced by its contract: fixed buffers in, a fixed buffer out."""

import copy
import logging

import pytest
import torch
from fakes import ARCHITECTURES, prompts, tiny_model, wrong_draft

import hf_osd
from hf_osd import OnlineAssistant, OnlineAssistedGenerator, OnlineConfig, decoding
from hf_osd.drafts.features import FeatureDraft
from hf_osd.serving import graphs, kept

ALWAYS = {"draft_length_schedule": "constant", "draft_length": 5}


class Replayed:
    """What a captured forward may do: read its own buffers, write its own buffer, and nothing that has a shape."""

    made = 0

    def __init__(self, forward, inputs, pool):
        type(self).made += 1
        self.forward, self.inputs = forward, [value.clone() for value in inputs]
        self.output = [value.clone() if torch.is_tensor(value) else None for value in forward(*self.inputs)]

    def __call__(self, *inputs):
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        for buffer, value in zip(self.output, self.forward(*self.inputs), strict=True):
            if buffer is not None:
                buffer.copy_(value)
        return self.output


@pytest.fixture
def replayed(monkeypatch):
    monkeypatch.setattr(kept, "can_capture", lambda model: True)
    monkeypatch.setattr(graphs.torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "CapturedForward", Replayed)
    monkeypatch.setattr(Replayed, "made", 0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 3])
def test_replayed_forwards_are_lossless(kind, batch, replayed):
    """Catches widths rounded up over the wrong columns, keys beyond the span, and outputs read after a replay."""
    target = tiny_model(kind)
    for how in ("noisy", "shifted"):
        assistant = OnlineAssistant(wrong_draft(target, how), target, OnlineConfig(learn=False, **ALWAYS))
        for seed in range(2):
            inputs = prompts(batch, seed=seed)
            settings = dict(max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_logits=True)
            expected = target.generate(**inputs, **settings)
            actual = hf_osd.generate(target, **inputs, online_assistant=assistant, **settings)
            assert torch.equal(actual.sequences, expected.sequences)
            for ours, theirs in zip(actual.logits, expected.logits, strict=True):
                torch.testing.assert_close(ours, theirs)
    assert Replayed.made > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_replayed_feature_drafts_are_lossless(batch, replayed, monkeypatch):
    """Catches states that a replay does not write, and graphs of the target's states replayed for the draft's own."""
    target = tiny_model("llama", layers=4)
    drafts = [FeatureDraft.of(target) for _ in range(2)]
    drafts[1].load_state_dict(drafts[0].state_dict())
    proposed = []
    for captures, draft in zip((True, False), drafts, strict=True):
        monkeypatch.setattr(kept, "can_capture", lambda model, captures=captures: captures)
        assistant = OnlineAssistant(draft, target, OnlineConfig(learn=False, **ALWAYS))
        proposed.append([])
        noted(monkeypatch, proposed[-1])
        for seed in range(2):
            inputs = prompts(batch, seed=seed)
            expected = target.generate(**inputs, max_new_tokens=40, do_sample=False)
            ours = hf_osd.generate(target, **inputs, online_assistant=assistant, max_new_tokens=40, do_sample=False)
            assert torch.equal(ours, expected)
    assert proposed[0] == proposed[1] != []
    assert Replayed.made > 0


def noted(monkeypatch, proposed):
    """Note every proposal."""

    class Noting(OnlineAssistedGenerator):
        def propose(self, *args, **kwargs):
            proposal = super().propose(*args, **kwargs)
            proposed.append(proposal.tokens.tolist())
            return proposal

    monkeypatch.setattr(decoding, "OnlineAssistedGenerator", Noting)


def test_captured_once_for_all_calls_and_updates(replayed):
    """Catches graphs that are captured anew for every call, or after every update of the weights."""
    target = tiny_model("llama")
    assistant = OnlineAssistant(wrong_draft(target, "noisy"), target, OnlineConfig(learn=False, **ALWAYS))
    made = []
    for _ in range(6):
        hf_osd.generate(target, **prompts(2), online_assistant=assistant, max_new_tokens=30, do_sample=False)
        assistant.weights.publish({name: weight.clone() for name, weight in assistant.draft.named_parameters()})
        made.append(Replayed.made)
    assert made[0] > 0
    assert made[-1] == made[2]  # a shape is captured at its third use


def test_moved_weights_are_captured_anew(replayed):
    """Catches graphs that go on reading the memory that a model has left."""
    target = tiny_model("llama")
    assistant = OnlineAssistant(wrong_draft(target, "noisy"), target, OnlineConfig(learn=False, **ALWAYS))
    settings = dict(max_new_tokens=30, do_sample=False)
    for _ in range(3):
        hf_osd.generate(target, **prompts(1), online_assistant=assistant, **settings)
    made = Replayed.made
    for parameter in target.parameters():
        parameter.data = parameter.data.clone()
    hf_osd.generate(target, **prompts(1), online_assistant=assistant, **settings)
    assert Replayed.made > made


def test_a_model_that_cannot_be_captured_is_served_all_the_same(replayed, monkeypatch, caplog):
    """Catches a failed capture that fails the request, is tried again for ever, or warns again and again."""

    def fail(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "CapturedForward", fail)
    target = tiny_model("llama")
    assistant = OnlineAssistant(wrong_draft(target, "noisy"), target, OnlineConfig(learn=False, **ALWAYS))
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        for _ in range(2):
            settings = dict(max_new_tokens=30, do_sample=False)
            expected = target.generate(**prompts(1), **settings)
            actual = hf_osd.generate(target, **prompts(1), online_assistant=assistant, **settings)
            assert torch.equal(actual, expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2  # once for each model
    assert "cannot be captured" in caplog.text


def test_graphs_are_bounded(replayed, monkeypatch):
    """Catches memory that grows with every new shape."""
    monkeypatch.setattr(graphs, "_GRAPHS", 3)
    found, model = graphs.ForwardGraphs(), tiny_model("llama")
    for _ in range(4):
        for width in range(1, 9):
            found.run(model, (128,), lambda tokens: (tokens + 1,), torch.zeros(1, width))
    assert len(found._captured) == 3


def test_caches_are_reused_inside_and_outside_of_inference_mode():
    """Catches a cache allocated in inference mode, which no later call could write to."""
    target = tiny_model("llama")
    assistant = OnlineAssistant(wrong_draft(target, "noisy"), target, OnlineConfig(learn=False, **ALWAYS))
    settings = dict(max_new_tokens=20, do_sample=False)
    expected = target.generate(**prompts(2), **settings)
    with torch.inference_mode():
        assert torch.equal(hf_osd.generate(target, **prompts(2), online_assistant=assistant, **settings), expected)
    (cache,) = [one.cache for one in kept._idle[target]]
    assert torch.equal(hf_osd.generate(target, **prompts(2), online_assistant=assistant, **settings), expected)
    assert [one.cache for one in kept._idle[target]] == [cache]


def test_a_failed_call_leaves_no_cache_behind():
    """Catches a cache that is handed on although nobody knows what is in it."""
    target = tiny_model("llama")
    assistant = OnlineAssistant(copy.deepcopy(target), target, OnlineConfig(learn=False, **ALWAYS))

    class Break:
        def put(self, value):
            if value.ndim == 1:  # a token, not the prompt, before which no cache is taken
                raise KeyboardInterrupt

        def end(self):
            pass

    hf_osd.generate(target, **prompts(1), online_assistant=assistant, max_new_tokens=5)
    assert kept._idle.get(target)
    with pytest.raises(KeyboardInterrupt):
        hf_osd.generate(target, **prompts(1), online_assistant=assistant, max_new_tokens=5, streamer=Break())
    assert not kept._idle.get(target)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("schedule", ["constant", "measured"])
def test_cuda_graphs_are_lossless(kind, batch, schedule):
    """Catches anything that a real capture does and the stand-in above does not."""
    target = tiny_model(kind).cuda()
    draft = wrong_draft(target, "noisy").cuda()
    config = OnlineConfig(learn=False, draft_length=5, draft_length_schedule=schedule)
    assistant = OnlineAssistant(draft, target, config)
    for seed in range(4):
        inputs = {name: value.cuda() for name, value in prompts(batch, seed=seed).items()}
        expected = target.generate(**inputs, max_new_tokens=40, do_sample=False)
        actual = hf_osd.generate(target, **inputs, online_assistant=assistant, max_new_tokens=40, do_sample=False)
        assert torch.equal(actual, expected)
    captured = [one.graphs for model in (target, draft) for one in kept._idle[model]]
    assert all(one is not None and one._captured for one in captured)
    assert target not in graphs._not_capturable
