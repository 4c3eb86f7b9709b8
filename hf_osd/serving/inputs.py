"""What `generate` was asked for, checked before any work starts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import logits_process as lp
from transformers.generation.logits_process import LogitsProcessor

from ..errors import InputError, UnsupportedGenerationError, UnsupportedModelError
from .weights import describe

# Setting -> whether a value of it asks for a mode that is not speculative sampling, and what that mode is called.
_REFUSED_SETTINGS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (lambda value: (value or 1) > 1, "beam search"),
    "num_beam_groups": (lambda value: (value or 1) > 1, "group beam search"),
    "constraints": (bool, "constrained beam search"),
    "force_words_ids": (bool, "constrained beam search"),
    "penalty_alpha": (bool, "contrastive search"),
    "dola_layers": (bool, "DoLa decoding"),
    "prompt_lookup_num_tokens": (bool, "prompt lookup"),
    "assistant_early_exit": (bool, "early-exit speculation"),
    "use_mtp": (bool, "multi-token prediction"),
    "guidance_scale": (lambda value: value not in (None, 1, 1.0), "classifier-free guidance"),
    "token_healing": (bool, "token healing"),
    "cache_implementation": (
        lambda value: any(kind in (value or "") for kind in ("quantized", "offloaded", "paged")),
        "a cache of another kind",
    ),
    "output_attentions": (bool, "returning attentions"),
    "output_hidden_states": (bool, "returning hidden states"),
}

# What transformers prepares itself, or what does not change the result.
_KNOWN_MODEL_INPUTS = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position",
}  # fmt: skip

# These keep state from one token to the next, which a rejected proposal would corrupt.
_STATEFUL_PROCESSORS: tuple[type, ...] = (
    lp.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    lp.SynthIDTextWatermarkLogitsProcessor,
)


def check_settings(lookup: Callable[[str], Any]) -> None:
    """
    Refuse generation modes that have no lossless speculative form here.

    Args:
        lookup (`Callable[[str], Any]`): Gives the value of a generation setting by its name, `None` where unset.

    Raises:
        UnsupportedGenerationError: Names the setting and its value.
    """
    for name, (asks, mode) in _REFUSED_SETTINGS.items():
        value = lookup(name)
        if asks(value):
            raise UnsupportedGenerationError(
                f"{name}={value!r} asks for {mode}, which online speculative decoding does not support: leave {name} "
                "out, or call model.generate without online_assistant"
            )


def check_target(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for targets that no cache here can serve."""
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"the target must be a transformers model that generates, got {type(model).__name__}"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{describe(model)} is an encoder-decoder model; only decoder-only targets are served"
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{describe(model)} keeps a recurrent state, which cannot roll back rejected tokens"
        )


def check_length(model: PreTrainedModel, length: int) -> None:
    """
    Raise `UnsupportedGenerationError` where a target's rotary frequencies would change in the middle of the text.

    They then depend on how far any row has been fed, proposals included. transformers itself recomputes its cache at
    that point for some models.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind not in ("dynamic", "longrope"):
        return
    switch = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    switch = switch or config.max_position_embeddings
    if length > switch:
        raise UnsupportedGenerationError(
            f"{describe(model)} changes its {kind} position embeddings at {switch} tokens, and prompt and output may "
            f"reach {length}: lower max_new_tokens, or call model.generate without online_assistant"
        )


def check_processors(processors: list[LogitsProcessor]) -> None:
    """Raise `UnsupportedGenerationError` for processors that cannot be asked about tokens that may be rejected."""
    for processor in processors:
        if isinstance(processor, _STATEFUL_PROCESSORS):
            raise UnsupportedGenerationError(
                f"{type(processor).__name__} keeps state from token to token, which rejected proposals would corrupt: "
                "call model.generate without online_assistant"
            )


def check_config(config: GenerationConfig) -> None:
    """Refuse what a prepared generation config asks for and is not supported; see [`check_settings`]."""
    check_settings(lambda name: getattr(config, name, None))


def padding_of(input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> list[int]:
    """
    Count the padding columns of each row.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, prompt)`): The prompts.
        model_kwargs (`Mapping[str, Any]`): What `generate` would hand to the model.

    Returns:
        `list[int]`: Padding on the left of each row.

    Raises:
        InputError: Nothing to decode, or padding anywhere but on the left, or unusual position ids.
        UnsupportedGenerationError: Model inputs beyond tokens.
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise InputError(
            f"input_ids must hold at least one prompt of at least one token, got shape {tuple(input_ids.shape)}"
        )
    extra = [name for name, value in model_kwargs.items() if name not in _KNOWN_MODEL_INPUTS and _is_given(value)]
    if extra:
        raise UnsupportedGenerationError(
            f"model inputs other than tokens are not supported yet, got {', '.join(extra)}"
        )
    padding = _padding(input_ids, model_kwargs.get("attention_mask"))
    _check_positions(model_kwargs.get("position_ids"), padding, input_ids.shape[1])
    return padding


def check_cache(cache: Cache, padding: Sequence[int]) -> None:
    """
    Refuse a cache of the caller's that cannot be gone on from.

    Args:
        cache (`Cache`): As given to `generate`.
        padding (`Sequence[int]`): Padding columns of each row.

    Raises:
        UnsupportedGenerationError: It cannot roll back.
        InputError: It is filled, and may hold padding: whether it does cannot be seen from it.
    """
    if type(cache) is not DynamicCache:
        raise UnsupportedGenerationError(
            f"past_key_values must be a DynamicCache, which can roll back rejected tokens, got {type(cache).__name__}"
        )
    if any(padding) and cache.get_seq_length():
        raise InputError("a filled past_key_values cannot be combined with padding: pass the prompt without it")


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def _padding(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    if mask is None:
        return [0] * len(input_ids)
    mask = mask[:, -input_ids.shape[1] :].bool()
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


def _check_positions(position_ids: torch.Tensor | None, padding: list[int], width: int) -> None:
    """Position ids arrive prepared by transformers; the user's own would be silently dropped unless refused."""
    if position_ids is None or position_ids.ndim != 2:
        return
    for row, pad in enumerate(padding):
        given = position_ids[min(row, len(position_ids) - 1), -(width - pad) :].tolist()
        if (given and given != list(range(given[-1] - len(given) + 1, given[-1] + 1))) or given[-1:] != [
            width - pad - 1
        ]:
            raise InputError("position_ids other than 0, 1, 2, ... from each row's first token are not supported")
