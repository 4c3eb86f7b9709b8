"""Several drafts over one batch: each decodes its own rows, and the rest of serving sees one draft of all rows."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

from .._compat import execution_device
from .decoder import Decoder, Parents
from .drafting import fit_vocabulary


class Group(NamedTuple):
    """
    Rows of a batch that one draft serves.

    Attributes:
        rows (`list[int]`): Which.
        decoder (`Decoder`): Of these rows alone, in this order.
        guard (`AbstractContextManager`): Held during each of its forwards.
        known (`int`): Tokens of the target that it can be fed, the first ones.
    """

    rows: list[int]
    decoder: Decoder
    guard: AbstractContextManager[object]
    known: int


class GroupedDecoder(Decoder):
    """
    Feeds each row to the draft that serves it: as many forwards a pass as there are drafts.

    Args:
        groups (`Sequence[Group]`): Together all rows, each once.
        vocab_size (`int`): Tokens of the target. Logits are of all of them, unless all drafts score the same part.
    """

    def __init__(self, groups: Sequence[Group], vocab_size: int) -> None:  # without that of `Decoder`: no one model
        self._groups, self._vocab_size = list(groups), vocab_size
        first, *others = (group.decoder.vocabulary for group in groups)
        is_shared = first is not None and all(one is not None and one.equal(first) for one in others)
        self.vocabulary = first if is_shared else None
        self.cached = [0] * sum(len(group.rows) for group in groups)
        self._note_cached()

    def _note_cached(self) -> None:
        for group in self._groups:
            for row, cached in zip(group.rows, group.decoder.cached, strict=True):
                self.cached[row] = cached

    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Parents | None = None) -> torch.Tensor:
        """Run every draft over its rows; see [`Decoder.feed`]."""
        assert parents is None, "drafts are fed chains"
        width = self._vocab_size if self.vocabulary is None else len(self.vocabulary)
        logits = torch.empty(len(ids), keep, width, device=ids.device)
        for group in self._groups:
            logits[group.rows] = self._feed(group, ids, ends, keep).to(ids.device)
        self._note_cached()
        return logits

    def _feed(self, group: Group, ids: torch.Tensor, ends: Sequence[int], keep: int) -> torch.Tensor:
        decoder = group.decoder
        own = ids[group.rows].to(execution_device(decoder.model)).clamp(max=group.known - 1)
        with group.guard:
            logits = decoder.feed(own, [ends[row] for row in group.rows], keep)
        return logits if self.vocabulary is not None else fit_vocabulary(logits, self._vocab_size, decoder.vocabulary)

    def rollback(self, ends: Sequence[int]) -> None:
        """See [`Decoder.rollback`]."""
        for group in self._groups:
            group.decoder.rollback([ends[row] for row in group.rows])
        self._note_cached()

    def export(self) -> Cache:
        """Nobody goes on from the caches of drafts; see [`Decoder.export`]."""
        raise NotImplementedError("the caches of several drafts are none for a caller")

    def release(self, failed: bool = False) -> None:
        """See [`Decoder.release`]."""
        for group in self._groups:
            group.decoder.release(failed)
