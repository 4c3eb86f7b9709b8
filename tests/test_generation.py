"""`generate` against `model.generate`: greedy output equal token for token, whatever the draft."""

import copy
import string

import pytest
import torch
from fakes import ARCHITECTURES, CONTEXT, DRAFTS, VOCAB, prompts, tiny_model, wrong_draft
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)

import hf_osd
from hf_osd import (
    InputError,
    OnlineAssistant,
    OnlineConfig,
    UnsupportedGenerationError,
    UnsupportedModelError,
)

TARGETS = {kind: tiny_model(kind) for kind in ARCHITECTURES}
LLAMA = TARGETS["llama"]
NOISY = wrong_draft(LLAMA, "noisy")


def static(draft, target=LLAMA, **settings):
    """A draft that always proposes: with measured lengths these models are too fast to be speculated on."""
    settings = {"draft_length_schedule": "constant", "draft_length": 5, **settings}
    return OnlineAssistant(draft, target, OnlineConfig(learn=False, **settings))


def both(target, draft, inputs, **kwargs):
    """Plain and speculative output of the same call."""
    kwargs = {"max_new_tokens": 24, "do_sample": False, **kwargs}
    expected = target.generate(**inputs, **copy.deepcopy(kwargs))
    actual = hf_osd.generate(target, **inputs, online_assistant=static(draft, target), **copy.deepcopy(kwargs))
    return expected, actual


def eos_of(target, inputs, steps):
    """Tokens that end row r at about its `steps[r]`-th new token, so that rows finish at different times."""
    output = target.generate(**inputs, max_new_tokens=max(steps) + 1, do_sample=False)
    return [int(output[row, inputs["input_ids"].shape[1] + step]) for row, step in enumerate(steps)]


@pytest.mark.parametrize("how", DRAFTS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_equals_generate(kind, how):
    """Catches any error in cache, mask, positions, rollback or commit, on each architecture and kind of draft."""
    target = TARGETS[kind]
    draft = wrong_draft(target, how)
    for batch in (1, 3):
        expected, actual = both(target, draft, prompts(batch))
        assert torch.equal(expected, actual), f"batch {batch}"


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_rows_end_at_different_times(batch):
    """Catches rows that go on behind their eos, wrong padding behind it, and eos inside a drafted run or as bonus."""
    inputs = prompts(batch)
    eos = eos_of(LLAMA, inputs, [(5 * row) % 19 + 1 for row in range(batch)])
    for how in ("perfect", "noisy", "shifted"):
        for ids in (eos, eos[:1], eos[-1:]):
            expected, actual = both(LLAMA, wrong_draft(LLAMA, how), inputs, eos_token_id=ids, pad_token_id=0)
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("draft_length", [0, 1, 2, 3, 7, 40])
def test_any_draft_length(draft_length):
    """Catches off-by-one errors in budgets: proposals longer than what is left, and none at all."""
    inputs = prompts(3)
    expected = LLAMA.generate(**inputs, max_new_tokens=20, do_sample=False)
    assistant = static(NOISY, draft_length=draft_length)
    actual = hf_osd.generate(LLAMA, **inputs, max_new_tokens=20, do_sample=False, online_assistant=assistant)
    assert torch.equal(expected, actual)
    if draft_length == 0:
        assert assistant.stats().tokens_per_target_pass == 1.0


@pytest.mark.parametrize("threshold", [0.05, 0.3, 1.0])
def test_proposals_of_any_confidence(threshold):
    """Catches proposals that stop early and leave the rows, the cache or the counts behind."""
    for batch in (1, 3):
        inputs = prompts(batch)
        expected = LLAMA.generate(**inputs, max_new_tokens=20, do_sample=False)
        assistant = static(NOISY, confidence_threshold=threshold, draft_length=6)
        actual = hf_osd.generate(LLAMA, **inputs, max_new_tokens=20, do_sample=False, online_assistant=assistant)
        assert torch.equal(expected, actual)
        stats = assistant.stats()
        if threshold == 1.0:  # no probability is above it: one token a round
            assert stats.proposed_tokens <= stats.target_passes


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 9], [11]]},
        {"sequence_bias": [[[5], 4.0], [[7, 9], -6.0]]},
        {"min_new_tokens": 12},
        {"min_length": 18},
        {"forced_bos_token_id": 4},
        {"forced_eos_token_id": 4},
        {"suppress_tokens": [3, 4, 5, 6]},
        {"begin_suppress_tokens": list(range(3, 40))},
        {"exponential_decay_length_penalty": (4, 1.3)},
        {"encoder_repetition_penalty": 1.3},
        {"renormalize_logits": True, "remove_invalid_values": True},
        {"prefix_allowed_tokens_fn": lambda row, ids: [3 + (len(ids) + row) % 50, 20, 30 + row]},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("batch", [1, 4])
def test_processors(settings, batch):
    """Catches processors that see another length, row or text than token-by-token decoding would show them."""
    inputs = prompts(batch)
    eos = eos_of(LLAMA, inputs, [7] * batch)
    for how in ("noisy", "random"):
        expected, actual = both(LLAMA, wrong_draft(LLAMA, how), inputs, eos_token_id=eos, pad_token_id=0, **settings)
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("how", ["perfect", "noisy"])
def test_nothing_is_asked_behind_a_drafted_eos(how):
    """Catches a trie that is asked for what follows its end, and raises: token-by-token decoding never asks."""
    inputs = prompts(1)
    eos = eos_of(LLAMA, inputs, [7])[0]

    def trie(row, ids):
        return [] if (ids[9:] == eos).any() else list(range(3, VOCAB))

    expected, actual = both(LLAMA, wrong_draft(LLAMA, how), inputs, eos_token_id=eos, prefix_allowed_tokens_fn=trie)
    assert torch.equal(expected, actual)


def test_arguments_by_position():
    """Catches positional arguments of `model.generate` that land elsewhere."""
    ids, config = prompts(1)["input_ids"], LLAMA.generation_config
    processors = LogitsProcessorList([FavourByLength()])
    expected = LLAMA.generate(ids, config, processors, max_new_tokens=9)
    actual = hf_osd.generate(LLAMA, ids, config, processors, online_assistant=static(NOISY), max_new_tokens=9)
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_change_with_the_length(kind):
    """Catches proposals that reach past the switch of the frequencies, which changes tokens before it."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24, **factors}
    target = tiny_model("llama", rope_parameters=rope, max_position_embeddings=24 if kind == "dynamic" else 96)
    expected, actual = both(target, wrong_draft(target, "noisy"), prompts(2), max_new_tokens=15)
    assert torch.equal(expected, actual)
    with pytest.raises(UnsupportedGenerationError, match=f"{kind}.*24 tokens"):
        both(target, NOISY, prompts(2), max_new_tokens=16)


class FavourByLength(LogitsProcessor):
    """A user's own: depends on the length, the row and the last token."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            scores[row, (int(ids[-1]) * 7 + len(ids) + row) % scores.shape[-1]] += 3.0
        return scores


class EndsWith(StoppingCriteria):
    """A user's own: a row stops behind one of some tokens."""

    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.tokens)


@pytest.mark.parametrize("batch", [1, 5])
def test_user_processor(batch):
    """Catches user-supplied processors that are skipped, or called with the wrong part of the batch."""
    expected, actual = both(LLAMA, NOISY, prompts(batch), logits_processor=LogitsProcessorList([FavourByLength()]))
    assert torch.equal(expected, actual)


class Scheduled(LogitsProcessor):
    """A user's own, with a value for each token that may be generated, and none for any other."""

    def __init__(self, start, count):
        self.start, self.factors = start, torch.linspace(0.5, 1.5, count)

    def __call__(self, input_ids, scores):
        return scores * self.factors[input_ids.shape[1] - self.start]


def test_processors_are_not_asked_beyond_the_limit():
    """Catches texts shown to a processor that are longer than any that token-by-token decoding has."""
    expected, actual = both(LLAMA, NOISY, prompts(3), max_new_tokens=20, logits_processor=[Scheduled(9, 20)])
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("with_eos", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_user_criterion(batch, with_eos):
    """Catches criteria asked only at the end of a round. Without eos, transformers lets stopped rows run on."""
    inputs = prompts(batch)
    stops = eos_of(LLAMA, inputs, [(5 * row) % 13 + 2 for row in range(batch)])
    extra = {"eos_token_id": 2, "pad_token_id": 0} if with_eos else {}
    for how in ("perfect", "noisy"):
        criteria = StoppingCriteriaList([EndsWith(stops)])
        expected, actual = both(LLAMA, wrong_draft(LLAMA, how), inputs, stopping_criteria=criteria, **extra)
        assert torch.equal(expected, actual)


class NeverStops(StoppingCriteria):
    """A user's own, whose attributes happen to be called as those of transformers' criteria."""

    def __init__(self, eos):
        self.max_length, self.eos_token_id = 12, eos

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("batch", [1, 3])
def test_criteria_mean_what_they_say(batch):
    """Catches criteria enforced by their attributes, and a MaxLengthCriteria that does not replace the config's."""
    inputs = prompts(batch)
    (eos,) = eos_of(LLAMA, inputs, [4])[:1]
    for criterion in (NeverStops(eos), MaxLengthCriteria(35), MaxLengthCriteria(15), MaxLengthCriteria(3)):
        criteria = StoppingCriteriaList([criterion])
        expected, actual = both(LLAMA, NOISY, inputs, stopping_criteria=criteria)
        assert torch.equal(expected, actual), criterion


def test_max_length_and_one_token():
    """Catches budgets computed from max_new_tokens alone, and a loop that proposes with nothing left to fill."""
    inputs = prompts(2)
    for settings in ({"max_length": 15}, {"max_new_tokens": 1}, {"max_new_tokens": 2}):
        expected = LLAMA.generate(**inputs, do_sample=False, **settings)
        actual = hf_osd.generate(LLAMA, **inputs, do_sample=False, online_assistant=static(NOISY), **settings)
        assert torch.equal(expected, actual)


def test_prompt_of_one_token():
    """Catches a draft that needs two tokens to start from."""
    for inputs in ({"input_ids": torch.tensor([[5]])}, {"inputs": torch.tensor([[5], [6]])}):
        expected, actual = both(LLAMA, NOISY, inputs)
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompt_up_to_the_context(kind):
    """Catches proposals beyond the last position: GPT-2's learned positions would raise."""
    target = TARGETS[kind]
    inputs = prompts(2, length=CONTEXT - 6)
    expected, actual = both(target, wrong_draft(target, "noisy"), inputs, max_new_tokens=6)
    assert torch.equal(expected, actual)


def test_draft_with_a_shorter_context():
    """Catches a draft driven beyond its own learned positions, in the prompt and while decoding."""
    draft = tiny_model("gpt2", seed=5, layers=1, n_positions=16)
    for length in (9, 15, 16, 17, 30):
        expected, actual = both(LLAMA, draft, prompts(2, length=length))
        assert torch.equal(expected, actual), length


@pytest.mark.parametrize("difference", [-7, 5])
def test_padded_vocabularies(difference):
    """Catches drafts whose vocabulary is padded to another size than the target's."""
    draft = tiny_model("llama", seed=4, vocab_size=VOCAB + difference)
    inputs = {"input_ids": torch.randint(3, VOCAB - 8, (2, 6), generator=torch.Generator().manual_seed(0))}
    for sample in (False, True):
        output = hf_osd.generate(LLAMA, **inputs, online_assistant=static(draft), max_new_tokens=12, do_sample=sample)
        assert int(output.max()) < VOCAB
        if not sample:
            assert torch.equal(output, LLAMA.generate(**inputs, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("sample", [False, True])
def test_a_token_that_the_draft_does_not_have(sample):
    """Catches a processor that forces such a token: no distribution is left, or no embedding to read it back."""
    draft = tiny_model("llama", seed=4, vocab_size=VOCAB - 7)
    only_last = {"prefix_allowed_tokens_fn": lambda row, ids: [VOCAB - 1] if len(ids) % 2 else list(range(3, VOCAB))}
    assistant = static(draft)
    output = hf_osd.generate(
        LLAMA,
        **prompts(2),
        online_assistant=assistant,
        max_new_tokens=12,
        do_sample=sample,
        temperature=0.5,
        **only_last,
    )
    assert (output[:, 9::2] == VOCAB - 1).all()
    assert assistant.stats().acceptance_rate > 0
    if not sample:
        assert torch.equal(output, LLAMA.generate(**prompts(2), max_new_tokens=12, do_sample=False, **only_last))


def test_draft_in_another_dtype():
    """Catches dtypes that leak from one model into the other's cache or mask."""
    draft = tiny_model("gpt2", seed=5, dtype=torch.bfloat16)
    expected, actual = both(LLAMA, draft, prompts(3))
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "bloom"])
def test_croppable_cache(kind):
    """Catches sliding windows on the full cache: the window (8) is much shorter than the text. One row at a time."""
    target = tiny_model(kind)
    inputs = {"input_ids": prompts(1, length=14)["input_ids"]}
    for draft in (wrong_draft(target, "noisy"), tiny_model("mistral", seed=8)):
        expected, actual = both(target, draft, inputs, max_new_tokens=40)
        assert torch.equal(expected, actual)
    with pytest.raises(UnsupportedModelError, match="one prompt at a time"):
        both(target, NOISY, prompts(2, length=14), max_new_tokens=40)


def test_window_that_the_configuration_calls_otherwise():
    """Catches GPT-Neo's local layers, whose window is one of columns, on rows of different lengths."""
    target = tiny_model("neo")
    expected, actual = both(target, NOISY, prompts(1), max_new_tokens=40)
    assert torch.equal(expected, actual)
    with pytest.raises(UnsupportedModelError, match="one prompt at a time"):
        both(target, NOISY, prompts(3), max_new_tokens=40)


def test_a_model_without_a_cache_is_refused():
    """Catches models that ignore the cache: their output would be wrong, or fail somewhere deep."""
    target = tiny_model("gpt1")
    with pytest.raises(UnsupportedModelError, match="OpenAIGPTLMHeadModel cannot be served"):
        both(target, NOISY, prompts(1))


def test_eager_attention():
    """Catches a boolean mask where eager attention adds it to the scores. In float64 transformers' own overflows."""
    target = tiny_model("llama", dtype=torch.float32)
    target.set_attn_implementation("eager")
    expected, actual = both(target, NOISY, prompts(3))
    assert torch.equal(expected, actual)


def test_target_in_train_mode():
    """Catches dropout in the verification, and a model that is left in another mode than it came in."""
    target = tiny_model("gpt2")
    expected = target.generate(**prompts(2), max_new_tokens=12, do_sample=False)
    target.train()
    actual = hf_osd.generate(
        target, **prompts(2), max_new_tokens=12, do_sample=False, online_assistant=static(NOISY, target)
    )
    assert torch.equal(expected, actual)
    assert target.training


def test_no_pad_token():
    """Catches a missing pad token: transformers falls back to eos."""
    target = tiny_model("llama", pad_token_id=None)
    inputs = {"input_ids": prompts(1)["input_ids"].repeat(3, 1)}
    inputs["input_ids"][:, -1] = torch.tensor([3, 4, 5])
    eos = eos_of(target, inputs, [2, 9, 14])
    expected, actual = both(target, wrong_draft(target, "noisy"), inputs, eos_token_id=eos)
    assert torch.equal(expected, actual)


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.ended += 1


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


@pytest.mark.parametrize("batch", [1, 3])
def test_returned_cache_can_be_continued(batch):
    """Catches an exported cache with rejected tokens in it, or in the wrong columns."""
    inputs = prompts(batch)
    ours = hf_osd.generate(
        LLAMA, **inputs, online_assistant=static(NOISY), max_new_tokens=10, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch, 10, dtype=torch.long)], dim=1)
    longer = LLAMA.generate(
        input_ids=ours.sequences, attention_mask=mask, past_key_values=ours.past_key_values, max_new_tokens=8,
        do_sample=False,
    )  # fmt: skip
    assert torch.equal(longer, LLAMA.generate(**inputs, max_new_tokens=18, do_sample=False))


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


def test_a_filled_cache_with_padding_is_refused():
    """Catches padding in the caller's cache that is read as text: the cache does not say where it is."""
    inputs = {"input_ids": torch.tensor([[0, 0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    first = LLAMA.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    turn = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
    with pytest.raises(InputError, match="padding"):
        hf_osd.generate(LLAMA, **turn, max_new_tokens=4, online_assistant=static(NOISY))


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
    from hf_osd.assistant import resolve_assistant

    draft = wrong_draft(LLAMA, "noisy")
    expected = LLAMA.generate(**prompts(1), max_new_tokens=8, do_sample=False)
    for _ in range(2):
        actual = hf_osd.generate(LLAMA, **prompts(1), max_new_tokens=8, do_sample=False, online_assistant=draft)
        assert torch.equal(expected, actual)
    assert resolve_assistant(draft, LLAMA).stats().requests == 2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_beams": 2, "num_beam_groups": 2}, "num_beams=2"),
        ({"force_words_ids": [[[4]]], "num_beams": 2}, "num_beams"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"dola_layers": "low"}, "DoLa"),
        ({"guidance_scale": 1.5}, "guidance"),
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ({"assistant_model": NOISY}, "assistant_model"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
        ({"token_healing": True}, "token healing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_modes_are_refused(settings, match):
    """Catches modes that would silently give another result than the one asked for."""
    with pytest.raises(UnsupportedGenerationError, match=match):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=static(NOISY), max_new_tokens=4, **settings)


def test_beams_through_model_generate_are_refused():
    """Catches the expanded batch that transformers hands to a callable when beams are asked for."""
    with pytest.raises(UnsupportedGenerationError, match="num_beams"):
        LLAMA.generate(
            **prompts(1),
            num_beams=2,
            max_new_tokens=4,
            custom_generate=hf_osd.online_decoding,
            online_assistant=static(NOISY),
        )


def test_bad_inputs():
    """Catches inputs that would fail deep inside, or decode something else than what was meant."""

    def run(**inputs):
        hf_osd.generate(LLAMA, online_assistant=static(NOISY), max_new_tokens=4, **inputs)

    with pytest.raises(InputError, match=r"shape \(0, 5\)"):
        run(input_ids=torch.empty(0, 5, dtype=torch.long))
    right_padded = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(InputError, match=r"rows \[1\].*padding_side='left'"):
        run(input_ids=torch.full((2, 3), 5), attention_mask=right_padded)
    with pytest.raises(InputError, match="position_ids"):
        run(input_ids=torch.full((1, 3), 5), position_ids=torch.tensor([[4, 5, 9]]))
    with pytest.raises(InputError, match="online_assistant"):
        LLAMA.generate(**prompts(1), custom_generate=hf_osd.online_decoding, max_new_tokens=2)
    with pytest.raises(TypeError, match="int"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=3)


def test_bad_pairs():
    """Catches drafts that cannot work, before any work starts."""
    with torch.device("meta"):
        meta = tiny_model("llama", seed=1)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=meta)
    with pytest.raises(UnsupportedModelError, match="tokenizers differ"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=tiny_model("llama", vocab_size=5000))
    with pytest.raises(UnsupportedModelError, match="itself"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=LLAMA)
    with pytest.raises(UnsupportedModelError, match=r"draft MambaForCausalLM.*recurrent"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=tiny_model("mamba", dtype=torch.float32))
    with pytest.raises(UnsupportedModelError, match="NoneType"):
        hf_osd.generate(None, **prompts(1), online_assistant=NOISY)
    with pytest.raises(UnsupportedModelError, match=r"the draft BloomForCausalLM.*batch of 2"):
        hf_osd.generate(LLAMA, **prompts(2), online_assistant=tiny_model("bloom"), max_new_tokens=4)
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        hf_osd.generate(tiny_model("mamba", dtype=torch.float32), **prompts(1), online_assistant=NOISY)


def tiny_tokenizer():
    letters = string.ascii_letters + string.digits
    words = ["<pad>", "<bos>", "<eos>", *letters[: VOCAB - 3]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def test_stop_strings():
    """Catches stop strings that complete inside a drafted run, and the tokenizer that transformers drops."""
    tokenizer = tiny_tokenizer()
    inputs = prompts(1)
    plain = LLAMA.generate(**inputs, max_new_tokens=20, do_sample=False)
    word = tokenizer.convert_ids_to_tokens(int(plain[0, 9 + 7]))
    settings = dict(max_new_tokens=20, do_sample=False, stop_strings=[word], tokenizer=tokenizer)
    expected = LLAMA.generate(**inputs, **settings)
    for how in ("perfect", "noisy"):
        actual = hf_osd.generate(LLAMA, **inputs, **settings, online_assistant=static(wrong_draft(LLAMA, how)))
        assert torch.equal(expected, actual)
    with pytest.raises(InputError, match="tokenizer"):
        hf_osd.generate(LLAMA, **inputs, stop_strings=["x"], online_assistant=static(NOISY))


@pytest.mark.parametrize("place", ["model", "config", "call"])
def test_stop_strings_of_every_origin(place):
    """Catches stop strings that only the model's own configuration names, whatever else is passed."""
    target, tokenizer, inputs = tiny_model("llama"), tiny_tokenizer(), prompts(1)
    plain = target.generate(**inputs, max_new_tokens=20, do_sample=False)
    word = tokenizer.convert_ids_to_tokens(int(plain[0, 9 + 7]))
    target.generation_config.stop_strings = [word if place == "model" else "never"]
    settings = {"tokenizer": tokenizer, "max_new_tokens": 20, "do_sample": False}
    if place == "config":
        config = GenerationConfig(max_new_tokens=20, do_sample=False, stop_strings=[word])
        settings = {"tokenizer": tokenizer, "generation_config": config}
    if place == "call":
        settings["stop_strings"] = [word]
    expected = target.generate(**inputs, **settings)
    assert expected.shape[1] < plain.shape[1]
    assert torch.equal(expected, hf_osd.generate(target, **inputs, **settings, online_assistant=static(NOISY, target)))


def test_pipeline():
    """Catches arguments that the text-generation pipeline changes or refuses on the way."""
    pipe = pipeline("text-generation", model=LLAMA, tokenizer=tiny_tokenizer())
    settings = dict(max_new_tokens=8, do_sample=False, return_full_text=False)
    expected = pipe("ABCD", **settings)
    actual = pipe("ABCD", **settings, custom_generate=hf_osd.online_decoding, online_assistant=static(NOISY))
    assert expected == actual
