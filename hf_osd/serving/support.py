"""
The table of what plain `generate` can do, and speculation here cannot do losslessly.

A request that meets a row of the table is served by the target's own decoding, or refused with
`OnlineConfig(unsupported="error")`. Limits that only trying a model shows are found by
[`~hf_osd.serving.choice.choose_decoder`]; invalid inputs by `inputs.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import logits_process as lp

from ..errors import UnsupportedError, UnsupportedGenerationError
from .preparation import Preparation, is_given
from .weights import describe


@dataclass(frozen=True, slots=True)
class Asked:
    """
    What a call of `generate` asks for, as far as it is known when the limits are checked.

    Attributes:
        model (`PreTrainedModel`): The target.
        setting (`Callable[[str], Any]`): Value of a generation setting by its name, `None` where unset.
        processors (`Sequence[LogitsProcessor]`): Applied to the logits.
        preparation (`Preparation`, *optional*): The inputs of the first pass.
        cache (`Cache`, *optional*): The caller's own.
        is_padded (`bool`): Whether the attention mask hides anything, in the prompt or in a cached text before it.
        length (`int`): Positions that the longest row may reach.
    """

    model: PreTrainedModel
    setting: Callable[[str], Any]
    processors: Sequence[Any] = ()
    preparation: Preparation | None = None
    cache: Cache | None = None
    is_padded: bool = False
    length: int = 0


@dataclass(frozen=True, slots=True)
class Limit:
    """
    One row of the table.

    Attributes:
        cause (`str`): Its name in [`OnlineStats.fallback_reasons`].
        found (`Callable[[Asked], str | None]`): Returns what is in the way, or `None`.
        error (`type`): The error to raise.
    """

    cause: str
    found: Callable[[Asked], str | None]
    error: type[UnsupportedError] = UnsupportedGenerationError


def check_limits(limits: Sequence[Limit], asked: Asked) -> None:
    """Raise the error of the first limit that a call meets, if any; it names the offender."""
    for limit in limits:
        why = limit.found(asked)
        if why is not None:
            raise limit.error(why, limit.cause)


def _setting(name: str, mode: str, asks: Callable[[Any], bool] = bool) -> Limit:
    def found(asked: Asked) -> str | None:
        """Say what the call asks for, if its setting asks for that mode."""
        value = asked.setting(name)
        if not asks(value):
            return None
        shown = f"{name}={value!r}" if isinstance(value, bool | int | float | str) else name
        return f"{shown} asks for {mode}, which has no lossless speculative form here"

    return Limit(mode, found)


def _rotary_switch(asked: Asked) -> str | None:
    """
    Find a target whose rotary frequencies change in the middle of the text.

    They then depend on how far any row has been fed, proposals included. transformers itself recomputes its cache at
    that point for some models.
    """
    config = asked.model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind not in ("dynamic", "longrope"):
        return None
    switch = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    switch = switch or config.max_position_embeddings
    if asked.length <= switch:
        return None
    return (
        f"{describe(asked.model)} changes its {kind} position embeddings at {switch} tokens, and the text may reach "
        f"{asked.length}: lower max_new_tokens"
    )


# Processors with a state that goes from token to token, which a rejected proposal would corrupt.
_STATEFUL_PROCESSORS: tuple[type, ...] = (
    lp.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    lp.SynthIDTextWatermarkLogitsProcessor,
)


def _stateful_processor(asked: Asked) -> str | None:
    names = [type(one).__name__ for one in asked.processors if isinstance(one, _STATEFUL_PROCESSORS)]
    return f"{names[0]} keeps state from token to token, which rejected proposals would corrupt" if names else None


def _model_inputs(asked: Asked) -> str | None:
    names = asked.preparation.unknown_extras() if asked.preparation is not None else []
    return f"the model inputs {', '.join(names)} may matter to every pass, not only to the first" if names else None


def _cache_kind(asked: Asked) -> str | None:
    if asked.cache is None or type(asked.cache) is DynamicCache:
        return None
    return f"past_key_values is a {type(asked.cache).__name__}; only a DynamicCache can roll back rejected tokens"


def _cache_with_padding(asked: Asked) -> str | None:
    if asked.cache is None or not asked.is_padded:
        return None
    return "past_key_values together with padding: the cache does not say which of its tokens are padding"


def _padded_decoder(asked: Asked) -> str | None:
    """Decoders behind an encoder may count positions by column, and so the padding before their prompt (BART)."""
    if not (asked.is_padded and asked.model.config.is_encoder_decoder):
        return None
    return "decoder_attention_mask hides padding in front of the decoder's prompt, which may count as positions"


def _activated_lora(asked: Asked) -> str | None:
    """PEFT (0.21) locates the tokens that activate an aLoRA (arXiv 2504.12397) from the end of each forward."""
    owner = getattr(asked.model.prepare_inputs_for_generation, "__self__", asked.model)
    configs = getattr(owner, "peft_config", None) or getattr(asked.model, "peft_config", None) or {}
    if not any(getattr(config, "alora_invocation_tokens", None) for config in configs.values()):
        return None
    return f"{describe(asked.model)} has an activated LoRA, which depends on how many tokens are fed at once"


SETTINGS: tuple[Limit, ...] = (
    _setting("num_beams", "beam search", lambda value: (value or 1) > 1),
    _setting("num_beam_groups", "group beam search", lambda value: (value or 1) > 1),
    _setting("constraints", "constrained beam search"),
    _setting("force_words_ids", "constrained beam search"),
    _setting("penalty_alpha", "contrastive search"),
    _setting("dola_layers", "DoLa decoding"),
    _setting("prompt_lookup_num_tokens", "transformers' own prompt lookup"),
    _setting("assistant_early_exit", "early-exit speculation"),
    _setting("use_mtp", "multi-token prediction"),
    _setting("guidance_scale", "classifier-free guidance", lambda value: value not in (None, 1, 1.0)),
    _setting("token_healing", "token healing"),
    _setting(
        "cache_implementation",
        "a cache of another kind",
        lambda value: any(kind in (value or "") for kind in ("quantized", "offloaded", "paged")),
    ),
    _setting("output_attentions", "returning attentions"),
    _setting("output_hidden_states", "returning hidden states"),
    _setting("inputs_embeds", "embeddings instead of tokens", is_given),
    _setting("synced_gpus", "generation over several ranks", is_given),
    _setting("negative_prompt_ids", "classifier-free guidance", is_given),
)
"""Limits that the call alone shows, checked before transformers prepares anything."""

REQUESTS: tuple[Limit, ...] = (
    Limit("position embeddings that change with the length", _rotary_switch),
    Limit("stateful logits processor", _stateful_processor),
    Limit("model inputs of every pass", _model_inputs),
    Limit("cache of another kind", _cache_kind),
    Limit("cache with padding", _cache_with_padding),
    Limit("padding of a decoder's prompt", _padded_decoder),
    Limit("activated LoRA", _activated_lora),
)
"""Limits that show once transformers has prepared the request."""
