"""The same call to `model.generate` and to `generate`: tiny targets, a draft that always proposes, what users pass."""

import copy
import string

import torch
from fakes import ARCHITECTURES, VOCAB, tiny_model, wrong_draft
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig

TARGETS = {kind: tiny_model(kind) for kind in ARCHITECTURES}
LLAMA = TARGETS["llama"]
NOISY = wrong_draft(LLAMA, "noisy")


def static(draft, target=LLAMA, **settings):
    """A draft that always proposes: with measured lengths these models are too fast to be speculated on."""
    settings = {"draft_length_schedule": "constant", "draft_length": 5, **settings}
    return OnlineAssistant(draft, target, OnlineConfig(learn=False, **settings))


def both(target, draft, inputs, **kwargs):
    """Plain and speculative output of the same call; the draft may be an assistant already."""
    kwargs = {"max_new_tokens": 24, "do_sample": False, **kwargs}
    expected = target.generate(**inputs, **copy.deepcopy(kwargs))
    assistant = draft if isinstance(draft, OnlineAssistant) else static(draft, target)
    actual = hf_osd.generate(target, **inputs, online_assistant=assistant, **copy.deepcopy(kwargs))
    return expected, actual


def eos_of(target, inputs, steps):
    """Tokens that end row r at about its `steps[r]`-th new token, so that rows finish at different times."""
    output = target.generate(**inputs, max_new_tokens=max(steps) + 1, do_sample=False)
    return [int(output[row, inputs["input_ids"].shape[1] + step]) for row, step in enumerate(steps)]


def chi_square(counts, probabilities):
    """
    The chance of counts at least this far from their probabilities, by Pearson's chi-square.

    Outcomes that are expected fewer than 8 times are merged into one. The samplers here are seeded, so in practice a
    test fails always or never; a correct sampler fails with a probability of about FALSE_ALARM.
    """
    expected = probabilities.double() * counts.sum()
    often = expected >= 8
    merged = [torch.cat([each[often], each[~often].sum()[None]]) for each in (counts.double(), expected)]
    observed, expected = (each[merged[1] > 0] for each in merged)
    assert counts[probabilities == 0].sum() == 0
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0).double(), statistic / 2))


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


def tiny_tokenizer():
    letters = string.ascii_letters + string.digits
    words = ["<pad>", "<bos>", "<eos>", *letters[: VOCAB - 3]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
