"""Prompts in tokens: one by one, and joined into batches."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import reason_of
from ..errors import InputError, UnsupportedModelError
from .models import Pair
from .prompts import Prompt

Inputs = dict[str, torch.Tensor]
"""`input_ids` and `attention_mask`, `(batch, prompt)` each: padded on the left, or on the right for an encoder."""


def encode_prompts(pair: Pair, prompts: Iterable[Prompt], max_new_tokens: int) -> list[Inputs]:
    """
    Turn prompts into inputs, by the tokenizer's chat template where it has one.

    Prompts that leave no room for `max_new_tokens` in the context of target or draft are left out: contenders that
    stop at different lengths could not be compared. An encoder has a context of its own.

    Raises:
        InputError: No prompt fits, or the tokenizer or its template refuses one.
        UnsupportedModelError: The tokenizer has tokens that a model does not know.
    """
    context = context_of(pair)
    if max_new_tokens >= context:
        raise InputError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of {context} tokens"
        )
    encoded = [_encode(pair, prompt, number) for number, prompt in enumerate(prompts, start=1)]
    room = context if pair.has_encoder else context - max_new_tokens
    fitting = [inputs for inputs in encoded if 0 < inputs["input_ids"].shape[1] <= room]
    if not fitting:
        raise InputError(f"none of {len(encoded)} prompts fits into the context with max_new_tokens={max_new_tokens}")
    _check_vocabulary(pair, max(int(inputs["input_ids"].max()) for inputs in fitting))
    return fitting


def _check_vocabulary(pair: Pair, largest: int) -> None:
    """Refuse a tokenizer of another model: a token without an embedding would end the run."""
    readers = [("target", pair.target), *([("draft", pair.draft)] if pair.draft_tokenizer is None else [])]
    for role, model in readers:
        if largest >= (known := model.config.get_text_config(decoder=True).vocab_size):
            raise UnsupportedModelError(
                f"the target's tokenizer has a token {largest}, the {role} knows {known} tokens"
            )


def context_of(pair: Pair) -> int:
    """Return the shorter of the two models' contexts."""
    return min(_lengths(pair.target), _lengths(pair.draft))


def _lengths(model: PreTrainedModel) -> int:
    positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)
    return positions if positions > 0 else 2**31  # some families write -1 for no limit


def _encode(pair: Pair, prompt: Prompt, number: int) -> Inputs:
    try:
        return as_inputs(token_ids(pair.tokenizer, prompt)[0].to(pair.target.device))
    except Exception as error:  # a chat template is a program of whoever made the checkpoint
        raise InputError(f"prompt {number} cannot be encoded: {reason_of(error)}") from error


def token_ids(tokenizer: Any, prompt: Prompt) -> torch.Tensor:
    """Encode one prompt by the tokenizer's chat template where it has one; `(1, prompt)`."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        encoding = tokenizer.apply_chat_template(chat, **options)
    else:
        text = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
        encoding = tokenizer(text, return_tensors="pt")
    ids: torch.Tensor = encoding["input_ids"]
    return ids


def as_inputs(ids: torch.Tensor) -> Inputs:
    """Return a request of one row that is made of tokens, `(prompt,)`."""
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}


def join(requests: Sequence[Inputs], pad_token_id: int, *, right: bool = False) -> Inputs:
    """Join requests into one batch, padded on the left; on the right where an encoder counts positions from there."""
    width = max(one["input_ids"].shape[1] for one in requests)

    def pad(name: str, value: int) -> torch.Tensor:
        rows = []
        for one in requests:
            lack = width - one[name].shape[1]
            rows.append(torch.nn.functional.pad(one[name], (0, lack) if right else (lack, 0), value=value))
        return torch.cat(rows)

    return {"input_ids": pad("input_ids", pad_token_id), "attention_mask": pad("attention_mask", 0)}


def columns_before(target: PreTrainedModel, inputs: Inputs) -> int:
    """Return how many columns of what `generate` returns come before the answer: the prompt, or a decoder's start."""
    return 1 if target.config.is_encoder_decoder else inputs["input_ids"].shape[1]


def start_token(target: PreTrainedModel) -> int:
    """Return what a decoder behind an encoder starts with."""
    config: Any = target.generation_config
    return int(config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id)


def end_tokens(target: PreTrainedModel) -> list[int]:
    """Return the tokens at which the target ends a text: none, one or several."""
    ends = target.generation_config.eos_token_id if target.generation_config else None
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def until_end(tokens: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Cut `tokens`, `(new,)`, behind the first end-of-sequence token, where a batch is padded."""
    found = torch.isin(tokens, torch.tensor(ends, dtype=torch.long, device=tokens.device)).nonzero()
    return tokens[: int(found[0]) + 1] if len(found) else tokens
