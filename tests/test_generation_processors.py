"""Logits processors, stopping criteria and stop strings: each sees and ends what it would token by token."""

import itertools

import pytest
import torch
from calls import LLAMA, NOISY, EndsWith, FavourByLength, both, eos_of, static, tiny_tokenizer
from fakes import VOCAB, prompts, tiny_model, wrong_draft
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

import hf_osd
from hf_osd import InputError


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


@pytest.mark.parametrize("with_eos", [True, False])
@pytest.mark.parametrize("how", ["perfect", "noisy", "random"])
def test_a_rule_is_asked_about_texts_of_its_own_alone(how, with_eos):
    """Catches a grammar that is shown rejected tokens of shorter rows, or what is drafted behind their ends."""
    inputs = prompts(4)
    eos = eos_of(LLAMA, inputs, [3, 9, 6, 12]) if with_eos else []

    def follows(row, last):
        return [0] if last in (0, *eos) else [token for token in range(3, VOCAB) if (token + last + row) % 3]

    def grammar(row, ids):
        output = ids[9:].tolist()
        if any(token not in follows(row, last) for last, token in itertools.pairwise(output)):
            return []  # for which transformers raises
        return follows(row, output[-1]) if output else list(range(3, VOCAB))

    settings = {"prefix_allowed_tokens_fn": grammar, "pad_token_id": 0, "eos_token_id": eos or None}
    for several in ({}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}):  # the rule gets a prompt's number
        expected, actual = both(LLAMA, wrong_draft(LLAMA, how), inputs, **settings, **several)
        assert torch.equal(expected, actual)


class Reversed(PrefixConstrainedLogitsProcessor):
    """A user's own kind of rule, which forbids what the rule allows."""

    def __call__(self, input_ids, scores):
        allowed = super().__call__(input_ids, scores)
        return scores.masked_fill(allowed.isfinite(), -torch.inf)


def test_a_kind_of_rule_of_the_users_own():
    """Catches a subclass that is taken for transformers' own processor, so that its own code does not run."""
    processor = Reversed(lambda row, ids: [token for token in range(VOCAB) if (token + row) % 2], num_beams=1)
    expected, actual = both(LLAMA, NOISY, prompts(3), logits_processor=LogitsProcessorList([processor]))
    assert torch.equal(expected, actual)


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
