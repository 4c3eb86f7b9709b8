"""Requests made at random: what is read, how the output is processed, where it ends, and what is asked for."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..families.building import FIRST_TOKEN, VOCAB
from .pairs import ROUTES, TOKENIZER, Pair

BATCHES = (1, 1, 1, 2, 3, 4)  # prompts of a request, each as likely
LONGEST_PROMPT, LONGEST_OUTPUT = 24, 40  # tokens
Inputs = Callable[[], dict[str, Any]]

_SCORES = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)


@dataclass(frozen=True)
class Request:
    """
    One request.

    Attributes:
        inputs (`Callable[[], dict]`): Makes what is read; anew for each call, since a cache among it is filled.
        rows (`int`): Prompts.
        settings (`dict`): Further arguments of `generate`, for both ways.
        own (`dict`): Those of `hf_osd.generate` alone.
        kind (`str`): Which assistant serves it.
        streams (`bool`): Whether a streamer is given.
        through_transformers (`bool`): Whether it is asked of `model.generate(custom_generate=...)`.
    """

    inputs: Inputs
    rows: int
    settings: dict[str, Any]
    own: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    streams: bool = False
    through_transformers: bool = False


class Favour(LogitsProcessor):
    """A processor of the user's: depends on the last token, the length, and the number of the row."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Raise the score of one token in each row."""
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            scores[row, (int(ids[-1]) * 7 + len(ids) + row) % scores.shape[-1]] += 3.0
        return scores


class EndsWith(StoppingCriteria):
    """A criterion of the user's: a row ends behind one of some tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Say of each row whether it ends."""
        return torch.isin(input_ids[:, -1], self._tokens)


def grammar(prompt: int, ends: Sequence[int]) -> Callable[[int, torch.Tensor], list[int]]:
    """
    Return a `prefix_allowed_tokens_fn` that knows texts of its grammar alone: behind others it allows nothing.

    Args:
        prompt (`int`): Columns before the output.
        ends (`Sequence[int]`): Tokens that end a text, behind which padding is allowed, and nothing else.
    """

    def follows(row: int, last: int) -> list[int]:
        if last in (0, *ends):
            return [0]
        return [token for token in range(FIRST_TOKEN, VOCAB) if (token + last + row) % 3]

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        tokens = ids.tolist()[prompt:]
        fits = all(token in (0, *follows(row, last)) for last, token in itertools.pairwise(tokens))
        if not tokens:
            return list(range(FIRST_TOKEN, VOCAB))
        return follows(row, tokens[-1]) if fits else []

    return allowed


def draw(pair: Pair, choose: random.Random) -> Request:
    """Draw a request for a pair."""
    rows = choose.choice(BATCHES)
    inputs, width = _text(pair, choose, rows) if pair.reads_text else _other(pair, choose, rows)
    settings = _settings(pair, choose, width, rows)
    kind = choose.choice(list(pair.assistants))
    own: dict[str, Any] = {}
    if len(pair.assistants[kind].routes) > 1 and choose.random() < 0.8:
        each = [choose.choice(ROUTES) for _ in range(rows)]
        own["osd_route"] = each if "num_return_sequences" not in settings and choose.random() < 0.6 else each[0]
    through = choose.random() < 0.2 and "stop_strings" not in settings
    return Request(inputs, rows, settings, own, kind, choose.random() < 0.2, through)


def _other(pair: Pair, choose: random.Random, rows: int) -> tuple[Inputs, int]:
    """Draw what a target with an encoder, or one that sees images, reads; and the columns before its output."""
    made = partial(pair.case.inputs, rows, choose.randrange(1000))
    target: Any = pair.case.target
    return made, 1 if target.config.is_encoder_decoder else made()["input_ids"].shape[1]


def _text(pair: Pair, choose: random.Random, rows: int) -> tuple[Inputs, int]:
    """Left-padded prompts that repeat themselves in part; sometimes with a cache of their beginning, or embedded."""
    width = choose.randint(1, LONGEST_PROMPT)
    ids, mask = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.long)
    for row in range(rows):
        length = choose.randint(1, width) if row or choose.random() < 0.1 else width
        phrase = [choose.randrange(FIRST_TOKEN, VOCAB) for _ in range(choose.randint(1, length))]
        ids[row, width - length :] = torch.tensor((phrase * length)[:length])
        mask[row, width - length :] = 1
    given, way, is_full = {"input_ids": ids, "attention_mask": mask}, choose.random(), bool(mask.all())
    if way < 0.06 and width > 2 and is_full:
        return partial(_with_cache, pair.case.target, given, choose.randrange(1, width)), width
    if way < 0.09:
        return partial(_embedded, pair.case.target, given), width
    if way < 0.13 and is_full:
        given = {"input_ids": ids}
    return lambda: {name: value.clone() for name, value in given.items()}, width


@torch.no_grad()
def _with_cache(target: Any, given: dict[str, torch.Tensor], held: int) -> dict[str, Any]:
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    target(input_ids=given["input_ids"][:, :held], past_key_values=cache, use_cache=True)
    return {**given, "past_key_values": cache}


def _embedded(target: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    embeds = target.get_input_embeddings()(given["input_ids"]).detach()
    return {"inputs_embeds": embeds, "attention_mask": given["attention_mask"]}


def _settings(pair: Pair, choose: random.Random, width: int, rows: int) -> dict[str, Any]:
    """Draw how the output is chosen, processed, ended and returned."""
    new = choose.randint(1, LONGEST_OUTPUT)
    eos = choose.sample(range(FIRST_TOKEN, VOCAB), choose.choice([0, 1, 3, 20]))
    settings: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    settings |= {"eos_token_id": eos} if eos else {}
    settings |= choose.choice([{}, {}, {}, {"do_sample": True, "top_k": 1}])
    if settings["do_sample"] and choose.random() < 0.4:
        settings["num_return_sequences"] = 2
    for _ in range(choose.choice([0, 1, 1, 2])):
        settings |= _processors(choose, width, new, eos)
    for _ in range(choose.choice([0, 0, 0, 1])):
        settings |= _stops(choose, width, new)
    settings["min_new_tokens"] = min(settings.get("min_new_tokens", 0), new) or None
    if choose.random() < 0.35:
        settings |= choose.choice([_SCORES, {"return_dict_in_generate": True}, {**_SCORES, "output_logits": False}])
    return {name: value for name, value in settings.items() if value is not None}


def _processors(choose: random.Random, width: int, new: int, eos: Sequence[int]) -> dict[str, Any]:
    tokens = choose.sample(range(FIRST_TOKEN, VOCAB), 8)
    return choose.choice(
        [
            {"suppress_tokens": tokens[:3]},
            {"begin_suppress_tokens": tokens[:3]},
            {"repetition_penalty": 1.4},
            {"no_repeat_ngram_size": choose.choice([1, 2, 3])},
            {"min_new_tokens": choose.choice([3, 12])},
            {"min_length": width + choose.choice([2, 9])},
            {"bad_words_ids": [tokens[:1], tokens[1:3]]},
            {"sequence_bias": [[tokens[:1], 2.0], [tokens[1:3], -3.0]]},
            {"forced_eos_token_id": tokens[0]},
            {"forced_bos_token_id": tokens[0]},
            {"exponential_decay_length_penalty": (new // 2, 1.5)} if eos else {},
            {"encoder_repetition_penalty": 1.3},
            {"encoder_no_repeat_ngram_size": 2},
            {"renormalize_logits": True},
            {"remove_invalid_values": True},
            {"logits_processor": LogitsProcessorList([Favour()])},
            {"prefix_allowed_tokens_fn": grammar(width, eos)},
        ]
    )


def _stops(choose: random.Random, width: int, new: int) -> dict[str, Any]:
    tokens = choose.sample(range(FIRST_TOKEN, VOCAB), 20)
    return choose.choice(
        [
            {"stopping_criteria": StoppingCriteriaList([EndsWith(tokens)])},
            {"max_new_tokens": None, "max_length": width + new},
            {"stop_strings": [TOKENIZER.decode([token]) for token in tokens[:10]], "tokenizer": TOKENIZER},
            {"max_time": 1000.0},
        ]
    )
