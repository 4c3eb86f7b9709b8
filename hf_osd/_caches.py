"""
What hf_osd needs of transformers' caches that is private there, or differs between the supported versions.

Each function says for which versions it was written; see [`~hf_osd._compat`] for all but caches.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.generation.utils import GenerationMixin

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the cache among model inputs: from transformers 5.24 on, up to 5.23, and Mamba's up to 5.23."""

CACHE_NAME = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
"""That of this version of transformers."""


def cache_argument(parameters: Collection[str], cache: Cache | None) -> dict[str, Any]:
    """Return a cache as a keyword argument of a function with these parameters, some of which may be unnamed."""
    return {next((name for name in CACHE_NAMES if name in parameters), CACHE_NAME): cache}


def cache_of(values: Mapping[str, Any]) -> Cache | None:
    """Return the cache among model inputs or outputs, whatever it is called there."""
    return next((values[name] for name in CACHE_NAMES if values.get(name) is not None), None)


def empty_cache(model: PreTrainedModel, reads_encoder: bool) -> Cache:
    """
    Return an empty dynamic cache, as `generate` makes it (5.17 to 5.24).

    Args:
        model (`PreTrainedModel`): The model.
        reads_encoder (`bool`): Whether its passes get the outputs of an encoder.
    """
    config = model.config.get_text_config(decoder=True)
    if not reads_encoder:
        return DynamicCache(config=config)
    # A decoder's windows are not for the encoder's outputs, and a decoder alone may count the layers of an encoder.
    text = DynamicCache(config=config) if model.config.is_encoder_decoder else DynamicCache()
    return EncoderDecoderCache(text, DynamicCache())


def text_cache(cache: Cache) -> Any:
    """Return the part of a cache that grows with the text; keys of an encoder's outputs lie beside it."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def is_callers_own(cache: Cache) -> bool:
    """Whether a cache came from the caller, not from `generate`, which marks it privately (5.17)."""
    return bool(getattr(cache, "_is_user_defined", False))


def carries_state(model: PreTrainedModel) -> bool:
    """Whether a model carries a state from token to token in transformers' own cache, which cannot be cropped."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def hides_state(model: PreTrainedModel) -> bool:
    """Whether transformers says, privately (5.17), that a model carries a state elsewhere than in its own cache."""
    own: Any = getattr(model, "_supports_default_dynamic_cache", lambda: True)
    return not own() and (bool(getattr(model, "_is_stateful", False)) or carries_state(model))


def is_croppable(model: PreTrainedModel) -> bool:
    """Whether transformers' own cache of a model can drop its last tokens (not said before 5.23)."""
    return bool(getattr(DynamicCache(config=model.config.get_text_config(decoder=True)), "is_croppable", True))


def tokens_held(cache: Cache) -> int:
    """Return how many tokens a cache holds; 0 for one of states alone, which does not count them (5.17)."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return 0


class _WindowLayer(DynamicSlidingWindowLayer):
    """Returns the keys that its mask is made for: the window before the new tokens, and these."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -visible:], values[:, :, -visible:]


def show_windows_only(cache: Cache) -> None:
    """
    Make the windowed layers of a cache that records its past fit for several forwards between two crops.

    transformers 5.17 returns the recorded past as well, for which the mask is too short; 5.23 does as here. This can
    go once 5.17 is no longer supported. The class is replaced, not the method, so that the cache can still be copied.
    """
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layer.__class__ = _WindowLayer


def stop_recording(cache: Cache) -> None:
    """Undo [`show_windows_only`] and `activate_past_recording`, for which transformers (5.17) has no way back."""
    for layer in cache.layers:
        if type(layer) is _WindowLayer:
            layer.__class__ = DynamicSlidingWindowLayer  # type: ignore[assignment]
        if hasattr(layer, "record_past"):
            layer.record_past = False
