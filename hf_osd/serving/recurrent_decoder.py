"""The decoder of models that carry a state from token to token: it cannot be cropped, so it is copied and restored."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from .croppable_decoder import CroppableDecoder
from .decoder import Parents

_READ_AGAIN = 16  # accepted tokens that a pass reads again beside the new ones, before they get a pass of their own


class RecurrentDecoder(CroppableDecoder):
    """
    One row, on transformers' own dynamic cache, with layers that keep a state: recurrent ones and hybrids.

    What a pass changes is copied before it. A rollback restores the latest copy from before the rejected tokens, and
    the next pass reads the accepted ones behind that copy again. A draft, which reads token by token, has a copy at
    every token and reads none again. Costs: the memory of a state, for a draft that of one for each token it proposes.

    Args:
        model, padding, width, preparation, cache, is_prefix, states: See
            [`~hf_osd.serving.croppable_decoder.CroppableDecoder`].
        reads_singly (`bool`, defaults to `False`): Whether each pass behind the first reads one token, for a draft
            that does not go on from its state by several (Mamba).
    """

    def __init__(self, *given: Any, reads_singly: bool = False, **named: Any) -> None:
        super().__init__(*given, **named)
        self._reads_singly = reads_singly
        self._copies: dict[int, list[Any]] = {}  # by column, the layers of the cache as they were before it was read
        self._is_settled = False  # whether the text before the last rollback's end is final
        self._text = (torch.empty(1, 0), self.cached[0])  # the buffer, and the end of what the cache has to hold

    def _adopt(self, cache: Cache) -> None:
        """Take a cache as it is: what it would record of the past is not needed."""
        self.cache = cache

    def _check(self) -> None:
        """Not here: states do not count tokens, and a trial shows whether a model goes on from them."""

    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Parents | None = None) -> torch.Tensor:
        """Feed the row's new columns, and those again that follow the last copy; see [`Decoder.feed`]."""
        if self._is_settled:
            self._copies.clear()
            self._is_settled = False
        self._text = (ids, ends[0])
        if self._reads_singly and self.cached[0] > self.padding[0]:
            return self._feed_singly(ids, ends[0], keep)
        behind = ends[0] - keep  # so far the text is final: a rollback goes back to here, or to a later token
        if behind - self.cached[0] > _READ_AGAIN and not self.reads_prompt_alone:
            self._feed_copied(ids, [behind], 1, parents)
        return self._feed_copied(ids, ends, keep, parents)

    def _feed_singly(self, ids: torch.Tensor, end: int, keep: int) -> torch.Tensor:
        if end - self.cached[0] < keep:
            self.rollback([end - keep])
        passes = []
        for column in range(self.cached[0], end):
            if column <= end - keep - _READ_AGAIN:  # so far the text is final
                self._copies.clear()
            passes.append(self._feed_copied(ids, [column + 1], 1))
        return torch.cat(passes[-keep:], dim=1)

    def _feed_copied(
        self, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Parents | None = None
    ) -> torch.Tensor:
        self._copies[self.cached[0]] = [_copy(layer) for layer in self.cache.layers]
        logits = super().feed(ids, ends, keep, parents)
        for before in self._copies.values():
            for copied, layer in zip(before, self.cache.layers, strict=True):
                _share_keys(copied, layer)
        return logits

    def rollback(self, ends: Sequence[int]) -> None:
        """Restore the latest copy from before a column; see [`Decoder.rollback`]."""
        (end,) = ends
        if end < self.cached[0]:
            column = max(column for column in self._copies if column <= end)
            self.cache.layers = self._copies.pop(column)
            self.cached = [column]
        self._is_settled = True
        self._text = (self._text[0], end)

    def export(self) -> Cache:
        """The cache itself, which has read all it should; see [`Decoder.export`]."""
        ids, end = self._text
        if self.cached[0] < end:
            super().feed(ids, [end], 1)
        return self.cache


def _copy(layer: Any) -> Any:
    """
    Copy what a pass changes in place.

    States are written in place, and lie in dictionaries; keys and values make way for longer ones.
    """
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            states = {key: one.clone() if isinstance(one, torch.Tensor) else one for key, one in value.items()}
            setattr(copied, name, states)
    return copied


def _share_keys(copied: Any, layer: Any) -> None:
    """Let a copy see its keys and values within the longer ones, so that they are not held twice."""
    if getattr(copied, "keys", None) is None or copied.is_sliding:
        return
    count = copied.keys.shape[-2]
    copied.keys, copied.values = layer.keys[..., :count, :], layer.values[..., :count, :]
