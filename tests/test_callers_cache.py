"""Caches of the caller: gone on from as `generate` does, whatever part of the text comes with them."""

import copy

import pytest
import torch
from calls import LLAMA, NOISY, static
from fakes import prompts, tiny_model, wrong_draft
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StoppingCriteria

import hf_osd
from hf_osd import InputError
from hf_osd._caches import cache_argument, cache_of


def tokens(count, rows=1, seed=3):
    return torch.randint(3, 61, (rows, count), generator=torch.Generator().manual_seed(seed))


def cached(target, text):
    """The caller's cache of a text, as the keyword argument of this version of transformers."""
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(text, **cache_argument((), cache))
    return cache_argument((), cache)


def same(target, assistant, inputs, cache, **kwargs):
    """Serve plainly and by speculation, from a copy of the same cache; the latter's output and cache."""
    kwargs = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    plain = target.generate(**inputs, **copy.deepcopy(cache), **kwargs)
    ours = hf_osd.generate(target, **inputs, **cache, online_assistant=assistant, **kwargs)
    assert torch.equal(plain.sequences, ours.sequences)
    assert cache_of(plain).get_seq_length() == cache_of(ours).get_seq_length()
    return ours


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_only_new_tokens(kind):
    """Catches positions that begin anew behind a cached text, whose tokens the caller need not pass again."""
    target = tiny_model(kind)
    assistant = static(wrong_draft(target, "noisy"), target)
    text, more = tokens(10, seed=5), tokens(6, seed=6)
    inputs = {"input_ids": more, "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    output = same(target, assistant, inputs, cached(target, text))
    assert assistant.stats().fallbacks == 0
    assert assistant.stats().proposed_tokens > 0
    # One turn more, from the cache that came back: it lacks the last token, as that of `generate` does.
    held = cache_of(output).get_seq_length()
    last = torch.cat([output.sequences[:, -1:], tokens(3, seed=7)], dim=1)
    inputs = {"input_ids": last, "attention_mask": torch.ones(1, held + 4, dtype=torch.long)}
    same(target, assistant, inputs, cache_argument((), cache_of(output)))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_whole_text(rows):
    """Catches a cached system prompt that is read again, or whose rows are refused in a batch."""
    text = tokens(10, seed=5).expand(rows, -1)
    inputs = {"input_ids": torch.cat([text, tokens(5, rows, seed=50)], dim=1)}
    same(LLAMA, static(NOISY), inputs, cached(LLAMA, text))


def test_turns_of_a_padded_batch():
    """Catches padding inside of a cached text that is read as text: the cache does not say where it is."""
    first = LLAMA.generate(**prompts(3), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(prompts(3)["attention_mask"], (0, 7), value=1)
    inputs = {"input_ids": torch.cat([first.sequences, tokens(3, 3)], dim=1), "attention_mask": mask}
    for rows in (slice(None), slice(1, 2)):
        cache = copy.deepcopy(cache_of(first))
        cache.batch_select_indices(torch.arange(3)[rows])
        turn = {name: value[rows] for name, value in inputs.items()}
        same(LLAMA, static(NOISY), turn, cache_argument((), cache))


def test_only_new_tokens_behind_padding():
    """Catches padding, or a hole, of a cached text that only the mask shows, not the columns of the new tokens."""
    first = LLAMA.generate(**prompts(3), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    for row, hole in ((1, 0), (0, 5)):
        cache = copy.deepcopy(cache_of(first))
        cache.batch_select_indices(torch.tensor([row]))
        mask = torch.nn.functional.pad(prompts(3)["attention_mask"][row : row + 1], (0, 7), value=1)
        mask[:, hole] = 0
        text = torch.cat([first.sequences[row : row + 1], tokens(3)], dim=1)
        turn = {"input_ids": text[:, cache.get_seq_length() :], "attention_mask": mask}
        same(LLAMA, static(NOISY), turn, cache_argument((), cache))


def test_only_new_tokens_with_their_positions():
    """Catches a text whose length is read off the position ids of its end."""
    for held, more in ((5, 12), (5, 3)):
        inputs = {"input_ids": tokens(more), "attention_mask": torch.ones(1, held + more, dtype=torch.long)}
        inputs["position_ids"] = torch.arange(held, held + more)[None]
        same(LLAMA, static(NOISY), inputs, cached(LLAMA, tokens(held, seed=8)))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_padded_prompt_and_an_empty_cache(kind):
    """Catches a cache that comes back without the columns of the padding, which the next turn's text has."""
    target = tiny_model(kind)
    inputs = {name: value[1:2] for name, value in prompts(2).items()}
    for cache in (cache_argument((), DynamicCache(config=target.config)), {}):
        output = same(target, static(wrong_draft(target, "noisy"), target), inputs, cache)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 11), value=1)
        turn = {"input_ids": torch.cat([output.sequences, tokens(3)], dim=1), "attention_mask": mask}
        same(target, static(NOISY, target), turn, cache_argument((), cache_of(output)))


def test_a_cache_after_an_exception():
    """Catches proposals that stay in the caller's cache where a criterion raises in the middle of a request."""

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] >= 20:
                raise RuntimeError("enough")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    cache, text = DynamicCache(config=LLAMA.config), tokens(12)
    kwargs = {"max_new_tokens": 30, "do_sample": False, "online_assistant": static(NOISY)}
    with pytest.raises(RuntimeError, match="enough"):
        hf_osd.generate(LLAMA, text, **cache_argument((), cache), **kwargs, stopping_criteria=[Stop()])
    held = cache.get_seq_length()
    assert 12 <= held < 20
    full = LLAMA.generate(text, max_new_tokens=30, do_sample=False)
    again = LLAMA.generate(full[:, : held + 1], **cache_argument((), cache), max_new_tokens=5, do_sample=False)
    assert torch.equal(again, full[:, : held + 6])


def test_a_windowed_cache_is_left_as_it_was():
    """Catches a cache that goes on recording what its window has dropped."""
    target = tiny_model("mistral")
    text = tokens(12)
    output = same(target, static(NOISY, target), {"input_ids": text}, cached(target, text[:, :4]))
    longer = target.generate(
        output.sequences, **cache_argument((), cache_of(output)), max_new_tokens=40, return_dict_in_generate=True
    )
    assert max(layer.keys.shape[2] for layer in cache_of(longer).layers) <= 8


@settings(max_examples=30, deadline=None)
@given(held=st.integers(1, 6), prompt=st.integers(1, 8), mask=st.integers(1, 16))
def test_a_cache_that_does_not_fit(held, prompt, mask):
    """Catches a wrong continuation where cache, prompt and mask contradict each other; `generate` says nothing."""
    kwargs = {**cached(LLAMA, tokens(held)), "max_new_tokens": 2, "online_assistant": static(NOISY)}
    inputs = {"input_ids": tokens(prompt), "attention_mask": torch.ones(1, mask, dtype=torch.long)}
    fits = (mask == prompt and held < prompt) or mask == prompt + held
    if fits:
        hf_osd.generate(LLAMA, **inputs, **kwargs)
    else:
        with pytest.raises(InputError, match=r"cache|past_key_values|attention_mask"):
            hf_osd.generate(LLAMA, **inputs, **kwargs)


def test_a_cache_of_other_rows():
    """Catches a cached row that is read by several prompts, or by none."""
    inputs = {"input_ids": tokens(8, rows=2)}
    with pytest.raises(InputError, match="1 rows and input_ids 2"):
        hf_osd.generate(LLAMA, **inputs, **cached(LLAMA, tokens(4)), online_assistant=static(NOISY))


def test_positions_of_the_callers_own():
    """Catches position ids that are replaced by 0, 1, 2, ..."""
    target = tiny_model("gpt2")
    assistant = static(wrong_draft(target, "noisy"), target)
    inputs = {"input_ids": tokens(6, 2), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    for positions in ([[5, 6, 7, 8, 9, 10]] * 2, [[0, 1, 2, 3, 40, 41], [7, 8, 9, 10, 11, 12]]):
        for rows in (1, 2):
            kwargs = {name: value[:rows] for name, value in inputs.items()} | {"max_new_tokens": 12}
            kwargs |= {"position_ids": torch.tensor(positions[:rows]), "do_sample": False}
            actual = hf_osd.generate(target, **kwargs, online_assistant=assistant)
            assert torch.equal(target.generate(**kwargs), actual)
    assert assistant.stats().fallbacks == 0
