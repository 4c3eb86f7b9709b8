"""Tells a model the positions of its tokens where its forward takes none: at its position embedding, which does."""

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .._compat import decoder_prefix, is_compiled, parameters_of

Told = dict[int, torch.Tensor]
"""Positions of the pass that a thread runs, `(batch, q)`, by thread."""


class PositionTap:
    """
    Gives a position embedding the positions of each row, in whatever forward runs inside of [`telling`].

    The model's own code hands it those of one row, which count columns, for all rows (BART, Marian, Pegasus). In their
    place it gets those of all rows, one after another. Its hooks stay on the embedding, and do nothing outside of
    [`telling`]; other threads may run the model meanwhile.

    Args:
        embedding (`torch.nn.Module`): The embedding, whose forward takes `position_ids` of shape `(q,)`.
    """

    def __init__(self, embedding: nn.Module) -> None:
        self._told: Told = {}
        embedding.register_forward_pre_hook(_Give(self._told), with_kwargs=True)
        embedding.register_forward_hook(_Shape(self._told))

    @contextmanager
    def telling(self, positions: torch.Tensor) -> Iterator[None]:
        """
        Tell the positions of the tokens of the one forward that this thread runs inside.

        Args:
            positions (`torch.LongTensor` of shape `(batch, q)`): The positions.
        """
        thread = threading.get_ident()
        self._told[thread] = positions
        try:
            yield
        finally:
            del self._told[thread]


class _Hook:
    """A hook that knows what is told. That of a copy of the model is told nothing."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def __deepcopy__(self, memo: Mapping[int, Any]) -> "_Hook":
        return type(self)({})

    def positions(self) -> torch.Tensor | None:
        """Return what this thread is told."""
        return self._told.get(threading.get_ident())


class _Give(_Hook):
    def __call__(self, module: nn.Embedding, given: Any, named: dict[str, Any]) -> Any:
        positions = self.positions()
        if positions is None:
            return None
        place = module.weight.device  # accelerate moves inputs itself to where it brings offloaded weights
        told = positions.flatten() if place.type == "meta" else positions.flatten().to(place)
        return given, {**named, "position_ids": told}


class _Shape(_Hook):
    def __call__(self, module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor | None:
        positions = self.positions()
        return None if positions is None else output.reshape(*positions.shape, -1)


_lock = threading.Lock()
_taps: "weakref.WeakKeyDictionary[PreTrainedModel, PositionTap | None]" = weakref.WeakKeyDictionary()


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the forward of a model takes the positions of its tokens; others count columns."""
    return decoder_prefix(model) + "position_ids" in parameters_of(model.forward)


def position_tap(model: PreTrainedModel) -> PositionTap | None:
    """
    Return what tells a model positions, the same every time.

    Returns:
        [`PositionTap`]: `None` where its forward takes them, or no embedding of its decoder does, or the model is
            compiled in place, so that its graphs may leave out a new hook.
    """
    if takes_positions(model) or is_compiled(model):
        return None
    with _lock:
        if model not in _taps:
            found = _embeddings(model.get_decoder())
            _taps[model] = PositionTap(found[0]) if len(found) == 1 else None
        return _taps[model]


def _embeddings(decoder: nn.Module) -> list[nn.Module]:
    found = (one for one in decoder.modules() if isinstance(one, nn.Embedding))
    return [one for one in found if "position_ids" in parameters_of(one.forward)]
