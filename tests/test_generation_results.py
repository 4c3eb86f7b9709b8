"""Ways to call `generate`, and what it gives beside the tokens: streams, scores, caches, and the same for a seed."""

import pytest
import torch
from calls import LLAMA, NOISY, EndsWith, FavourByLength, both, eos_of, static, tiny_tokenizer
from fakes import Collector, prompts, tiny_model, wrong_draft
from transformers import LogitsProcessorList, pipeline

import hf_osd
from hf_osd._caches import cache_argument, cache_of


def test_arguments_by_position():
    """Catches positional arguments of `model.generate` that land elsewhere."""
    ids, config = prompts(1)["input_ids"], LLAMA.generation_config
    processors = LogitsProcessorList([FavourByLength()])
    expected = LLAMA.generate(ids, config, processors, max_new_tokens=9)
    actual = hf_osd.generate(LLAMA, ids, config, processors, online_assistant=static(NOISY), max_new_tokens=9)
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("path", ["generate", "custom_generate"])
def test_streamer(batch, path):
    """Catches tokens that are streamed late, twice or not at all; transformers drops the streamer on one path."""
    inputs = prompts(batch)
    eos = eos_of(LLAMA, inputs, [3 + 4 * row for row in range(batch)])
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=eos, pad_token_id=0)
    plain, ours = Collector(), Collector()
    LLAMA.generate(**inputs, **settings, streamer=plain)
    if path == "generate":
        hf_osd.generate(LLAMA, **inputs, **settings, online_assistant=static(NOISY), streamer=ours)
    else:
        LLAMA.generate(
            **inputs,
            **settings,
            custom_generate=hf_osd.online_decoding,
            online_assistant=static(NOISY),
            streamer=ours,
        )
    assert ours.ended == plain.ended == 1
    assert len(ours.values) == len(plain.values)
    assert all(torch.equal(a, b) for a, b in zip(ours.values, plain.values, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_and_logits(batch):
    """Catches scores of rejected positions, of other rows, or taken before the processors."""
    inputs = prompts(batch)
    eos = eos_of(LLAMA, inputs, [4 + 5 * row for row in range(batch)])
    expected, actual = both(
        LLAMA,
        NOISY,
        inputs,
        eos_token_id=eos,
        pad_token_id=0,
        repetition_penalty=1.3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert torch.equal(expected.sequences, actual.sequences)
    assert len(expected.scores) == len(actual.scores) == len(actual.logits)
    for step in range(len(expected.scores)):
        alive = ~torch.isin(expected.sequences[:, 9 : 9 + step], torch.tensor(eos)).any(dim=1)
        torch.testing.assert_close(actual.scores[step][alive], expected.scores[step][alive])
        torch.testing.assert_close(actual.logits[step][alive], expected.logits[step][alive])
        assert (actual.scores[step][~alive] == 0).all()


def test_scores_behind_a_criterion():
    """Catches scores of tokens that a criterion has cut off: behind a row's end they are zero."""
    stops = eos_of(LLAMA, prompts(3), [1, 9, 16])
    output = hf_osd.generate(
        LLAMA, **prompts(3), online_assistant=static(wrong_draft(LLAMA, "perfect")), max_new_tokens=16,
        do_sample=False, eos_token_id=2, pad_token_id=0, stopping_criteria=[EndsWith(stops[:1])], output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    ended = torch.isin(output.sequences[:, 9:], torch.tensor([stops[0], 2])).cumsum(1).cumsum(1) > 1
    assert ended[0, 2:].all()
    for step, scores in enumerate(output.scores):
        assert ((scores == 0).all(dim=1) == ended[:, step]).all()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3n"])
@pytest.mark.parametrize("batch", [1, 3])
def test_returned_cache_can_be_continued(kind, batch):
    """
    Catches an exported cache with rejected tokens in it, or in the wrong columns, with more than a window (8), or that
    fails for layers which read the keys of another.
    """
    target, inputs = tiny_model(kind), prompts(batch)
    ours = hf_osd.generate(
        target, **inputs, online_assistant=static(NOISY, target), max_new_tokens=10, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    plain = target.generate(**inputs, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    held = [[layer.keys.shape for layer in cache_of(one).layers if layer.keys is not None] for one in (ours, plain)]
    assert held[0] == held[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch, 10, dtype=torch.long)], dim=1)
    longer = target.generate(
        input_ids=ours.sequences, attention_mask=mask, max_new_tokens=8, do_sample=False,
        **cache_argument((), cache_of(ours)),
    )  # fmt: skip
    assert torch.equal(longer, target.generate(**inputs, max_new_tokens=18, do_sample=False))


def test_continues_a_given_cache():
    """Catches a caller's cache that is ignored: the second turn of a chat would be recomputed, or wrong."""
    ids = prompts(1)["input_ids"]
    first = LLAMA.generate(input_ids=ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, ids[:, :4]], dim=1)
    expected = LLAMA.generate(input_ids=turn, max_new_tokens=9, do_sample=False)
    cache = first.past_key_values
    actual = hf_osd.generate(
        LLAMA, input_ids=turn, past_key_values=cache, max_new_tokens=9, do_sample=False, online_assistant=static(NOISY)
    )
    assert torch.equal(expected, actual)
    assert cache.get_seq_length() == actual.shape[1] - 1


def test_num_return_sequences():
    """Catches rows that share randomness, and prompts that are not expanded."""
    torch.manual_seed(0)
    output = hf_osd.generate(
        LLAMA, **prompts(2), online_assistant=static(NOISY), do_sample=True, num_return_sequences=3, max_new_tokens=10
    )
    assert output.shape[0] == 6
    assert len({tuple(row.tolist()) for row in output}) == 6


def test_seeds():
    """Catches hidden sources of randomness: a seed or a generator must make sampling repeatable."""

    def run(**kwargs):
        return hf_osd.generate(
            LLAMA, **prompts(2), online_assistant=static(NOISY), do_sample=True, max_new_tokens=16, **kwargs
        )

    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(run())
        outputs.append(run(generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[4])
    assert not torch.equal(outputs[1], outputs[5])


def test_greedy_leaves_the_random_state_alone():
    """Catches randomness spent where none is needed: code around a greedy call must stay repeatable."""
    before = torch.get_rng_state()
    both(LLAMA, NOISY, prompts(1))
    assert torch.equal(before, torch.get_rng_state())


def test_through_model_generate():
    """Catches a callable that transformers cannot drive: this is its own extension point."""
    inputs = prompts(3)
    expected = LLAMA.generate(**inputs, max_new_tokens=12, do_sample=False)
    actual = LLAMA.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        custom_generate=hf_osd.online_decoding,
        online_assistant=static(NOISY),
    )
    assert torch.equal(expected, actual)


def test_a_draft_model_is_wrapped_and_kept():
    """Catches an assistant made anew at each call, which would forget all it has learned."""
    from hf_osd.resolving import resolve_assistant

    draft = wrong_draft(LLAMA, "noisy")
    expected = LLAMA.generate(**prompts(1), max_new_tokens=8, do_sample=False)
    for _ in range(2):
        actual = hf_osd.generate(LLAMA, **prompts(1), max_new_tokens=8, do_sample=False, online_assistant=draft)
        assert torch.equal(expected, actual)
    assert resolve_assistant(draft, LLAMA).stats().requests == 2


def test_pipeline():
    """Catches arguments that the text-generation pipeline changes or refuses on the way."""
    pipe = pipeline("text-generation", model=LLAMA, tokenizer=tiny_tokenizer())
    settings = dict(max_new_tokens=8, do_sample=False, return_full_text=False)
    expected = pipe("ABCD", **settings)
    actual = pipe("ABCD", **settings, custom_generate=hf_osd.online_decoding, online_assistant=static(NOISY))
    assert expected == actual
