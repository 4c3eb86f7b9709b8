"""Refuses inputs that cannot be decoded, or would be answered wrongly, before any work."""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from .._caches import tokens_held
from ..errors import InputError


def padding_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[int]:
    """
    Count the padding columns of each row.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, prompt)`): The prompts.
        attention_mask (`torch.LongTensor` of shape `(batch, text)`, *optional*): 1 for tokens, 0 for padding; of the
            prompt, or of a cached text and the prompt.

    Returns:
        `list[int]`: Padding on the left of each row.

    Raises:
        InputError: Nothing to decode, or padding anywhere but on the left.
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise InputError(
            f"input_ids must hold at least one prompt of at least one token, got shape {tuple(input_ids.shape)}"
        )
    if attention_mask is None:
        return [0] * len(input_ids)
    if attention_mask.ndim != 2 or len(attention_mask) != len(input_ids):
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}: it must "
            "have a row for each prompt"
        )
    mask = attention_mask[:, -input_ids.shape[1] :].bool()
    padding = (~mask).sum(dim=1)
    left_padded = torch.arange(mask.shape[1], device=mask.device) >= padding[:, None]
    wrong = [row for row, same in enumerate((mask == left_padded).all(dim=1).tolist()) if not same]
    if wrong:
        raise InputError(
            f"attention_mask has padding that is not on the left in rows {wrong}: use padding_side='left'"
        )
    empty = [row for row, count in enumerate(padding.tolist()) if count == mask.shape[1]]
    if empty:
        raise InputError(f"attention_mask hides every token of rows {empty}: a prompt needs at least one token")
    return list(padding.tolist())


def holds_cached_text(cache: Cache | None, rows: int, prompt: int, text: int) -> bool:
    """
    Say whether a prompt holds the text of the caller's cache as well; if not, it is what comes after it.

    Args:
        cache (`Cache`, *optional*): As given to `generate`.
        rows (`int`): Prompts.
        prompt (`int`): Columns of `input_ids`.
        text (`int`): Columns of the attention mask.

    Raises:
        InputError: The cache holds more than the text, or the mask is of another length than both together, or the
            cache is of another batch size.
    """
    held = tokens_held(cache) if cache is not None else 0
    if held and text == prompt and held >= prompt:
        raise InputError(
            f"the cache in past_key_values holds {held} tokens and the text only {prompt}: pass the whole text, or "
            "what comes after the cache with an attention_mask of the whole text"
        )
    if text not in (prompt, prompt + held):
        raise InputError(
            f"attention_mask covers {text} tokens, past_key_values holds {held} and input_ids {prompt}: it must cover "
            f"{prompt} (the whole text is in input_ids) or {prompt + held} (only what comes after the cache is)"
        )
    if cache is not None:
        _check_rows(cache, rows)
    return text == prompt


def _check_rows(cache: Cache, rows: int) -> None:
    stored: Sequence[torch.Tensor | None] = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    held = next((keys.shape[0] for keys in stored if isinstance(keys, torch.Tensor) and keys.ndim == 4), rows)
    if held != rows:
        raise InputError(f"past_key_values holds {held} rows and input_ids {rows}: pass one cache row for each prompt")
