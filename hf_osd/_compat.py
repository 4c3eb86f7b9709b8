"""The one place that leans on what transformers does not promise, each with the version and the way out."""

import inspect
import sys
from types import FrameType
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin


def dropped_streamer() -> BaseStreamer | None:
    """
    Find the streamer of the `generate` call that is running a custom decoding callable.

    transformers (5.17 to 5.23) hands the prompt to `streamer`, but drops `streamer` before it calls a callable given
    as `custom_generate` (`_extract_generation_mode_kwargs`), so that nothing would be streamed and nobody told. This
    can go once transformers passes it on.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            streamer = frame.f_locals.get("streamer")
            return streamer if isinstance(streamer, BaseStreamer) or hasattr(streamer, "put") else None
        frame = frame.f_back
    return None


class _WindowLayer(DynamicSlidingWindowLayer):
    """Returns what its mask is made for: the window before the new tokens, and these."""

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
