"""States that are copied and restored: targets and drafts of recurrent layers, alone and among attention."""

import pytest
import torch
from calls import LLAMA, NOISY, both, static
from fakes import RECURRENT, prompts, tiny_model, wrong_draft
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import RandomPlans, repeating
from test_speculation import FALSE_ALARM, chi_square, exact_distribution
from transformers import DynamicCache

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd._caches import cache_argument, cache_of
from hf_osd._compat import parameters_of
from hf_osd.serving import recurrent_decoder
from hf_osd.serving.choice import choose_draft_decoder
from hf_osd.serving.recurrent_decoder import RecurrentDecoder

MODELS = {kind: tiny_model(kind, dtype=torch.float32) for kind in RECURRENT}
WIDTH = 40


def plain_logits(model, ids, end, keep):
    with torch.no_grad():
        return model(ids[:, :end]).logits[:, -keep:].float()


@pytest.mark.parametrize("kind", RECURRENT)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_rounds_of_a_target(kind, data):
    """Catches a state that has seen rejected tokens, one that lacks accepted ones, and one that is changed twice."""
    model, padding = MODELS[kind], data.draw(st.integers(0, 2))
    ids = torch.randint(0, 61, (1, WIDTH), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    decoder, end = RecurrentDecoder(model, [padding], WIDTH), padding + data.draw(st.integers(1, 12))
    while end < WIDTH - 6:
        count = data.draw(st.integers(0, 5))
        with torch.no_grad():
            logits = decoder.feed(ids, [end + count], count + 1)
        expected = plain_logits(model, ids[:, padding:], end + count - padding, count + 1)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
        end += data.draw(st.integers(0, count))
        decoder.rollback([end])
        ids[:, end:] = (ids[:, end:] + 7) % 61  # what was rolled back is replaced by something else
        end += 1


@pytest.mark.parametrize("kind", RECURRENT)
def test_token_by_token_as_a_draft(kind):
    """Catches a draft that reads accepted tokens again, or that goes back further than to the first wrong one."""
    model, ids = MODELS[kind], torch.randint(0, 61, (1, WIDTH), generator=torch.Generator().manual_seed(1))
    decoder, end = RecurrentDecoder(model, [0], WIDTH), 9
    for accepted in (0, 3, 5, 1, 0, 2):
        for place in range(5):
            with torch.no_grad():
                logits = decoder.feed(ids, [end + place], 1)
            torch.testing.assert_close(logits, plain_logits(model, ids, end + place, 1), atol=2e-4, rtol=2e-4)
        decoder.rollback([end + accepted])
        assert decoder.cached == [min(end + accepted, end + 4)]
        ids[:, end + accepted :] = (ids[:, end + accepted :] + 7) % 61
        end += accepted + 1


def test_a_draft_that_does_not_go_on_by_several_tokens():
    """Catches a Mamba that forgets the text where a proposal is accepted in full, and one of another kind slowed."""
    mamba = tiny_model("mamba", dtype=torch.float32)
    ids = torch.randint(3, 61, (1, WIDTH), generator=torch.Generator().manual_seed(1))
    for model, is_single in ((mamba, True), (MODELS["mamba2"], False)):
        decoder = choose_draft_decoder(model, ids[:, :9], [0], WIDTH)()
        assert decoder._reads_singly == is_single
        with torch.no_grad():
            for end in (9, 10, 11, 13, 16):
                found = decoder.feed(ids, [end], 1)
                torch.testing.assert_close(found, plain_logits(model, ids, end, 1), atol=2e-4, rtol=2e-4)
            decoder.rollback([14])
            found = decoder.feed(ids, [15], 1)
        torch.testing.assert_close(found, plain_logits(model, ids, 15, 1), atol=2e-4, rtol=2e-4)


def test_what_is_read_again_is_bounded(monkeypatch):
    """Catches a prompt that is read anew after every rejection, and a text that all passes read again."""
    lengths, run = [], RecurrentDecoder._run

    def noting(decoder, keep, **inputs):
        lengths.append(inputs["input_ids"].shape[1])
        return run(decoder, keep, **inputs)

    monkeypatch.setattr(RecurrentDecoder, "_run", noting)
    ids = torch.randint(0, 61, (1, 400))
    decoder = RecurrentDecoder(MODELS["lfm2"], [0], 400)
    for end in range(200, 300):  # one token a round, since all proposals are rejected
        with torch.no_grad():
            decoder.feed(ids, [end + 3], 4)
        decoder.rollback([end])
    assert max(lengths[1:]) <= recurrent_decoder._READ_AGAIN + 4
    assert lengths[0] == 199
    assert len(lengths) <= 101 + 100 // recurrent_decoder._READ_AGAIN


def test_copies_hold_no_keys_of_their_own():
    """Catches keys of the whole text that are held twice."""
    decoder = RecurrentDecoder(MODELS["qwen3.5"], [0], WIDTH)
    with torch.no_grad():
        decoder.feed(prompts(1, length=WIDTH)["input_ids"], [20], 1)
        decoder.feed(prompts(1, length=WIDTH)["input_ids"], [30], 5)
    for before in decoder._copies.values():
        for copied, layer in zip(before, decoder.cache.layers, strict=True):
            keys = getattr(copied, "keys", None)
            assert keys is None or keys.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("how", ["random", "shifted", "noisy", "perfect"])
def test_greedy_equals_generate(kind, how, monkeypatch):
    """Catches rounds of any kind that leave a state behind which plain decoding would not have."""
    target, inputs = tiny_model(kind), {"input_ids": repeating(1)["input_ids"]}
    expected, actual = both(target, assistant := static(wrong_draft(target, how), target), inputs, max_new_tokens=40)
    assert torch.equal(expected, actual)
    RandomPlans(3).install(monkeypatch)
    measured = OnlineAssistant(wrong_draft(target, how), target, OnlineConfig(learn=False, draft_length=5))
    for _ in range(2):
        output = hf_osd.generate(target, **inputs, online_assistant=measured, max_new_tokens=40, do_sample=False)
        assert torch.equal(expected, output)
    assert assistant.stats().fallbacks == measured.stats().fallbacks == 0


@pytest.mark.parametrize("kind", RECURRENT)
def test_as_a_draft(kind, monkeypatch):
    """Catches a draft whose state a request leaves to the next, or that a round without it leaves behind."""
    draft, inputs = tiny_model(kind, seed=5), {"input_ids": repeating(1)["input_ids"]}
    RandomPlans(4).install(monkeypatch)
    assistant = OnlineAssistant(draft, LLAMA, OnlineConfig(learn=False, draft_length=5))
    for _ in range(3):
        expected, actual = both(LLAMA, assistant, inputs, max_new_tokens=30)
        assert torch.equal(expected, actual)
    assert assistant.stats().draft_tokens > 0
    assert assistant.stats().fallbacks == 0


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_draft_learns(kind):
    """Catches updates that fail for a state, or whose weights are never served."""
    target = tiny_model(kind, dtype=torch.float32)
    draft = wrong_draft(target, "noisy")
    before = {name: value.clone() for name, value in draft.named_parameters()}
    config = OnlineConfig(update_every=1, steps_per_update=1, gate=False, draft_length_schedule="constant")
    with OnlineAssistant(draft, target, config) as assistant:
        for seed in range(3):
            inputs = {"input_ids": prompts(1, seed=seed)["input_ids"]}
            expected, actual = both(target, assistant, inputs, max_new_tokens=12)
            assert torch.equal(expected, actual)
        stats = assistant.stats()
    assert stats.updates > 0
    assert stats.failed_updates == 0
    assert any(not torch.equal(before[name], value) for name, value in draft.named_parameters())


def test_sampled_tokens_have_the_targets_distribution():
    """Catches logits of a state that has seen what was rejected: two tokens, against their exact probabilities."""
    vocab, target = 4, tiny_model("lfm2", vocab_size=4, initializer_range=0.15, pad_token_id=None, bos_token_id=None)
    ids = torch.tensor([[3, 2, 1, 3, 2]])
    with torch.no_grad():
        expected = exact_distribution(target, ids, 2)
    assistant, counts = static(wrong_draft(target, "shifted"), target, draft_length=2), torch.zeros(vocab, vocab)
    torch.manual_seed(5)
    call = dict(do_sample=True, top_k=0, max_new_tokens=2, min_new_tokens=2)
    for _ in range(400):
        output = hf_osd.generate(target, ids, online_assistant=assistant, **call)[:, -2:]
        counts.index_put_(tuple(output.T), torch.ones(1), accumulate=True)
    assert 0 < assistant.stats().accepted_tokens < assistant.stats().draft_tokens
    assert chi_square(counts.flatten(), expected.flatten()) > FALSE_ALARM


@pytest.mark.parametrize("kind", RECURRENT)
def test_the_returned_cache_is_the_texts(kind):
    """Catches a cache that is returned with a state from before the tokens that were accepted last."""
    target, inputs = tiny_model(kind), {"input_ids": prompts(1)["input_ids"]}
    call = dict(max_new_tokens=11, do_sample=False, return_dict_in_generate=True)
    for how in ("noisy", "shifted"):
        ours = hf_osd.generate(target, **inputs, online_assistant=static(wrong_draft(target, how), target), **call)
        plain = target.generate(**inputs, **call)
        assert torch.equal(ours.sequences, plain.sequences)
        for one, other in zip(cache_of(ours).layers, cache_of(plain).layers, strict=True):
            for states in ("conv_states", "recurrent_states"):
                for key, value in getattr(other, states, {}).items():
                    torch.testing.assert_close(getattr(one, states)[key], value, atol=1e-4, rtol=1e-4)
            if getattr(other, "keys", None) is not None:
                torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mamba2", "qwen3.5"])
def test_batches_and_caches_of_the_callers_are_served_plainly(kind):
    """Catches rows that share a state, and a caller's cache that is left with proposals in its state."""
    target = tiny_model(kind)
    assistant = static(NOISY, target)
    expected, actual = both(target, assistant, prompts(3))
    assert torch.equal(expected, actual)
    assert assistant.stats().fallback_reasons == {"target: batches of this model or length": 3}
    ids, outputs, named = prompts(1)["input_ids"], [], parameters_of(target.forward)
    for call in (target.generate, lambda *a, **k: hf_osd.generate(*[target, *a], online_assistant=assistant, **k)):
        cache = DynamicCache(config=target.config)
        target(ids[:, :5], **cache_argument(named, cache))
        outputs.append(call(ids, **cache_argument(named, cache), max_new_tokens=9, do_sample=False))
    assert torch.equal(*outputs)
    assert assistant.stats().fallback_reasons["target: state that cannot roll back"] == 1
