"""The decoder on transformers' own dynamic cache: one row, whose windows and soft prompts that cache knows about."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .._caches import cache_argument, empty_cache, show_windows_only, stop_recording, text_cache, tokens_held
from ..errors import UnsupportedModelError
from .decoder import Decoder, Parents
from .preparation import Preparation
from .states import TargetStates


class CroppableDecoder(Decoder):
    """
    One row, on transformers' own dynamic cache: sliding windows and other layers that the ragged cache cannot hold,
    soft prompts, and caches that the caller hands over to be continued. See
    [`~hf_osd.serving.choice.choose_decoder`].

    Args:
        model, padding, width, preparation, states: See [`Decoder`].
        cache (`Cache`, *optional*): A cache to continue, updated in place; defaults to an empty one.
        is_prefix (`bool`, defaults to `True`): Whether the buffer holds the text of the cache as well, or only what
            comes after it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        padding: Sequence[int],
        width: int,
        preparation: Preparation | None = None,
        cache: Cache | None = None,
        is_prefix: bool = True,
        states: TargetStates | None = None,
    ) -> None:
        super().__init__(model, padding, width, preparation, states)
        held = tokens_held(cache) if cache is not None else 0
        self.cached = [self.padding[0] + (held if is_prefix else 0)]
        self._adopt(cache if cache is not None else empty_cache(model, bool(self._every_pass)))
        self._ahead = held - (self.cached[0] - self.padding[0])  # cached tokens that are no columns of the buffer
        self._zero = (self.padding[0] - self._ahead, torch.zeros(1, 1, dtype=torch.long))  # a column, its position

    def _adopt(self, cache: Cache) -> None:
        self.cache = cache
        cache.activate_past_recording()
        show_windows_only(text_cache(cache))

    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Parents | None = None) -> torch.Tensor:
        """Feed the row's new columns, without its padding; see [`Decoder.feed`]."""
        assert parents is None, "its masks are the model's own"
        (start,), (end,) = self.cached, ends
        if end - start < keep:
            self.rollback([end - keep])
            (start,) = self.cached
        prepares = self.reads_prompt_alone
        inputs = self._prepared(ids, start, end) if prepares else self._plain(ids, start, end)
        logits, states, cache = self._run(keep, **inputs)
        self._take(None if states is None else states[:, start - end :], [end])  # a soft prompt comes before the text
        if prepares:
            self._note_first_pass(inputs, cache, end)
        self.cached = [end]
        self._check()
        return logits

    def _check(self) -> None:
        """Raise an error for a model that ignores the cache it is given."""
        if tokens_held(self.cache) - self._ahead != self.cached[0] - self.padding[0]:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be served: it does not keep its tokens in the cache it is given"
            )

    def _plain(self, ids: torch.Tensor, start: int, end: int) -> dict[str, Any]:
        inputs = {"input_ids": ids[:, start:end]}
        if self._prefix + "position_ids" in self._parameters:
            column, position = self._zero
            distances = torch.arange(start - column, end - column, device=ids.device)
            inputs["position_ids"] = position.to(ids.device) + distances
        return {**self._named(**inputs), **cache_argument(self._parameters, self.cache)}

    def _prepared(self, ids: torch.Tensor, start: int, end: int) -> dict[str, Any]:
        """Let the model's own code make the inputs, as `generate` does for its first pass."""
        assert self._preparation is not None
        mask = self._prefix + "attention_mask"
        kept = {name: value for name, value in self._preparation.model_kwargs.items() if name != mask}
        own: Any = self.model.prepare_inputs_for_generation
        inputs: dict[str, Any] = own(
            ids[:, self.padding[0] : end],
            next_sequence_length=end - start,
            is_first_iteration=True,
            **cache_argument((), self.cache),
            **kept,
        )
        return inputs

    def _note_first_pass(self, inputs: dict[str, Any], cache: Cache | None, end: int) -> None:
        """A soft prompt may have brought a cache of its own, or tokens before the text; positions go on behind it."""
        if cache is not None and cache is not self.cache:
            self._adopt(cache)
        self._ahead = tokens_held(self.cache) - (end - self.padding[0])
        last = inputs.get(self._prefix + "position_ids")
        if last is None:
            last = torch.full((1, 1), tokens_held(self.cache) - 1)
        self._zero = (end - 1, last[..., -1:])

    def rollback(self, ends: Sequence[int]) -> None:
        """Crop the cache. Called after every round, since it also bounds windowed layers; see [`Decoder.rollback`]."""
        if self.cache.get_seq_length() == 0:
            return
        surplus = max(self.cached[0] - ends[0], 0)
        self.cache.crop(-surplus)
        self.cached = [self.cached[0] - surplus]

    def export(self) -> Cache:
        """The cache itself; see [`Decoder.export`]."""
        return self.cache

    def release(self, failed: bool = False) -> None:
        """Leave the cache as `generate` would, for a caller who goes on from it; see [`Decoder.release`]."""
        stop_recording(text_cache(self.cache))
