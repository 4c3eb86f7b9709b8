"""
A ragged static key/value cache: each row of a batch has its own length, and rolls back by lowering it.

The keys of an encoder's outputs lie beside it, in a cache of their own. Layers with a window keep all positions, as
long as the text, and read those of the window. Not covered: recurrent states, which go through
[`~hf_osd.serving.recurrent_decoder.RecurrentDecoder`].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from .._compat import execution_device

Sees = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Says which queries see which keys, by positions of shape `(batch, 1, q, 1)` and `(batch or 1, 1, 1, keys)`."""


def _causal(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return keys <= queries


@dataclass(frozen=True, slots=True)
class Staged:
    """
    The tokens that are about to be fed.

    Attributes:
        slots (`torch.LongTensor` of shape `(batch, q)`): Where each goes in its row.
        positions (`torch.LongTensor` of shape `(batch, q)`): Their positions. They differ from the slots for nodes of
            a tree, and for padding, which has position 0: a row of nothing but -inf would turn into nan.
        span (`int`): Slots of each row that they may read.
        least (`int`): The least slot of a token, or less.
        run (`int`, *optional*): The first slot, where a single row takes consecutive ones.
        seen (`torch.BoolTensor` of shape `(batch, q, q)`, *optional*): Which of these tokens see one another, of those
            before them; defaults to all.
        valid (`torch.BoolTensor` of shape `(batch, q)`, *optional*): False for padding; defaults to True.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    span: int
    least: int
    run: int | None = None
    seen: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    def mask(self, keys: torch.Tensor, sees: Sees = _causal) -> torch.Tensor:
        """
        Return who sees what.

        Args:
            keys (`torch.LongTensor` of shape `(count,)`): The slots that are read, one after another.
            sees (`Callable`, defaults to a causal mask): What a query sees, by positions.

        Returns:
            `torch.BoolTensor` of shape `(batch, 1, q, count)`: True where a query may look.
        """
        queries = self.positions[:, None, :, None]
        mask = sees(queries, keys[None, None, None])
        if self.seen is None:
            return mask
        inner = sees(queries, self.positions[:, None, None]) & self.seen[:, None]
        first = self.span - len(keys)
        if self.run is not None:
            mask[..., self.run - first :] = inner
            return mask
        assert self.valid is not None
        aside = torch.nn.functional.pad(mask, (0, 1))  # one more column, for padding
        index = torch.where(self.valid, self.slots - first, len(keys))[:, None, None].expand_as(inner)
        return aside.scatter_(3, index, inner | ~self.valid[:, None, :, None])[..., :-1]


class RaggedLayer(CacheLayerMixin):
    """
    Keys and values of one layer, stored as `(heads, batch * slots, head_dim)`.

    One `index_copy_` writes any pattern of rows and positions, and a view reads them back: nothing is moved when rows
    advance or roll back by different amounts.

    Args:
        cache (`RaggedCache`): The cache.
        window (`int`, *optional*): Tokens that a query sees at most, itself included: no earlier ones are read.
    """

    is_compileable = False  # otherwise transformers builds masks where none are needed

    def __init__(self, cache: "RaggedCache", window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._window = window
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the slots with zeros: masked slots must be finite, since 0 * nan is nan."""
        heads, slots = key_states.shape[1], self._cache.batch * self._cache.slots
        with torch.inference_mode(False):  # later calls from outside of inference mode write here, too
            self.keys = key_states.new_zeros(heads, slots, key_states.shape[3])
            self.values = value_states.new_zeros(heads, slots, value_states.shape[3])
        self._readable = self._by_row(self.keys), self._by_row(self.values)
        self.is_initialized = True

    def _by_row(self, store: torch.Tensor) -> torch.Tensor:
        heads, _, width = store.shape
        return store.view(heads, self._cache.batch, self._cache.slots, width).transpose(0, 1)

    def by_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of keys and of values as attention reads them: `(batch, heads, slots, head_dim)` each."""
        return self._readable

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Write the states at the slots that [`RaggedCache.stage`] announced, and return what may be attended to.

        Args:
            key_states, value_states (`torch.Tensor` of shape `(batch, heads, q, head_dim)`): The new states.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Views of shape `(batch, heads, count, head_dim)`; see
            [`get_mask_sizes`].
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys, values = self._readable
        run, q = self._cache.staged.run, key_states.shape[2]
        if run is not None:
            keys.narrow(2, run, q).copy_(key_states)
            values.narrow(2, run, q).copy_(value_states)
        else:
            self._scatter(self.keys, key_states)
            self._scatter(self.values, value_states)
        count, first = self.get_mask_sizes(q)
        if self._cache.columns is not None:
            return self._aligned(self.keys), self._aligned(self.values)
        return keys.narrow(2, first, count), values.narrow(2, first, count)

    def _aligned(self, store: torch.Tensor) -> torch.Tensor:
        """Copy what is read so that all rows end in one column; see [`RaggedCache`]."""
        assert self._cache.columns is not None
        read = store.index_select(1, self._cache.flat_columns.to(store.device))
        return read.view(store.shape[0], *self._cache.columns.shape, store.shape[2]).transpose(0, 1)

    def _scatter(self, store: torch.Tensor, states: torch.Tensor) -> None:
        slots = self._cache.flat_slots.to(store.device)
        store.index_copy_(1, slots, states.transpose(0, 1).reshape(store.shape[0], -1, store.shape[2]))

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy slots, `(tokens,)` over all rows, to others; see [`RaggedCache.move`]."""
        for store in (self.keys, self.values):
            assert store is not None
            store.index_copy_(1, targets.to(store.device), store.index_select(1, sources.to(store.device)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many slots are read, and the first of them. The mask itself is always passed, as a 4D tensor."""
        staged = self._cache.staged
        first = max(staged.least - self._window + 1, 0) if self._window is not None else 0
        return staged.span - first, first

    def get_seq_length(self) -> int:
        """Tokens before those being fed, for models that build their own positions."""
        return max(self._cache.staged.span - self._cache.staged.slots.shape[1], 0)

    def get_max_length(self) -> int:
        """Slots a row has."""
        return self._cache.slots

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` up to transformers 5.17."""
        return self._cache.slots


class RaggedCache(Cache):
    """
    Static cache whose rows have lengths of their own.

    The token at position `p` of a row is in slot `p`. Only nodes of a tree are elsewhere, until a path is chosen. The
    last slot of each row is scratch: padding and positions beyond the capacity are written there and never read.

    A model that takes no positions counts columns, and the distance of two tokens is that of their columns (T5). For
    such a model rows are aligned: of several, what is read is copied so that all of them end in the last column.

    Args:
        batch (`int`): Rows.
        capacity (`int`): Positions a row can hold.
        windows (`Sequence[int | None]`): For each layer of the model its window, if it has one.
        device (`torch.device`): Where positions and masks are built.
        dtype (`torch.dtype`): The model's.

    Attributes:
        is_aligned (`bool`): Whether several rows are read as they are for models that count columns. Before use, it is
            the decoder's to set.
        columns (`torch.LongTensor` of shape `(batch, span)`, *optional*): For aligned rows, the slot that is read in
            each column; negative before the text begins.
        flat_columns (`torch.LongTensor` of shape `(batch * span,)`): These slots, over all rows; the first slot in
            place of negative ones.
        staged ([`Staged`]): What is about to be fed.
        flat_slots (`torch.LongTensor` of shape `(batch * q,)`): Its slots, over all rows.
        slot_ids (`torch.LongTensor` of shape `(slots,)`): 0, 1, 2 ...
    """

    def __init__(
        self, batch: int, capacity: int, windows: Sequence[int | None], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shape = (batch, capacity, tuple(windows), device, dtype)
        self.batch = batch
        self.capacity = capacity
        self.slots = capacity + 1
        self.is_aligned = False
        self.columns: torch.Tensor | None = None
        self.flat_slots = self.flat_columns = torch.empty(0, dtype=torch.long, device=device)
        self.slot_ids = torch.arange(self.slots, device=device)
        self._row_offsets = torch.arange(batch, device=device)[:, None] * self.slots  # (batch, 1)
        none = self.slot_ids[None, :0]
        self.staged = Staged(none, none, span=0, least=0)
        super().__init__(layers=[RaggedLayer(self, window) for window in windows])

    @classmethod
    def of(cls, model: PreTrainedModel, batch: int, capacity: int) -> "RaggedCache":
        """Make a cache for a model."""
        return cls(batch, capacity, windows_of(model), execution_device(model), model.dtype)

    def stage(
        self,
        places: torch.Tensor,
        span: int,
        least: int = 0,
        back: torch.Tensor | int = 0,
        seen: torch.Tensor | None = None,
    ) -> Staged:
        """
        Announce where the tokens about to be fed go.

        Args:
            places (`torch.LongTensor` of shape `(batch, q)`): Slot of each token in its row. Outside `[0, capacity)`:
                padding, written to the scratch slot.
            span (`int`): One more than the largest slot inside the capacity.
            least (`int`, defaults to 0): The least slot of a token that is no padding, or less.
            back (`torch.LongTensor` of shape `(batch, q)`, defaults to 0): How far the position of each token is
                before its slot: more than 0 in a tree.
            seen (`torch.BoolTensor` of shape `(batch, q, q)`, *optional*): See [`Staged`].
        """
        valid = (places >= 0) & (places < self.capacity)
        self.flat_slots = self.flat(torch.where(valid, places, self.capacity))
        self.columns = None  # a kept cache may have been aligned before
        if self.is_aligned:
            self.columns = self.slot_ids[:span] - (span - 1 - places[:, -1:])
            self.flat_columns = self.flat(self.columns.clamp(min=0))
        self.staged = Staged(places, (places - back).clamp(min=0), span, max(least, 0), None, seen, valid)
        return self.staged

    def stage_run(
        self, first: int, count: int, back: torch.Tensor | int = 0, seen: torch.Tensor | None = None
    ) -> Staged:
        """
        Announce consecutive slots of the only row: the same as [`stage`], at a fraction of its cost.

        Args:
            first (`int`): First slot, not negative.
            count (`int`): Slots; the last one lies inside the capacity.
            back, seen: See [`stage`].
        """
        places = self.slot_ids[None, first : first + count]
        positions = places if isinstance(back, int) else places - back
        self.columns = None
        self.staged = Staged(places, positions, first + count, first, first, seen)
        return self.staged

    def flat(self, slots: torch.Tensor) -> torch.Tensor:
        """Number slots, `(batch, count)`, over all rows: `(batch * count,)`."""
        return (self._row_offsets + slots).flatten()

    def mask(self) -> torch.Tensor:
        """Return the mask of the staged tokens where each sees all before it: `(batch, 1, q, span)`."""
        if self.columns is not None:
            keys = self.columns[:, None, None]
            return (keys >= 0) & _causal(self.staged.positions[:, None, :, None], keys)
        return self.staged.mask(self.slot_ids[: self.staged.span])

    def move(self, rows: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """
        Move the keys and values of tokens to other slots of their rows.

        Args:
            rows (`Sequence[int]`): The row of each token.
            sources, targets (`Sequence[int]`): Its slot now, and its new slot.
        """
        offsets = torch.tensor([rows, sources, targets], device=self._row_offsets.device)  # (3, tokens)
        from_slots, to_slots = offsets[0] * self.slots + offsets[1], offsets[0] * self.slots + offsets[2]
        for layer in self.layers:
            assert isinstance(layer, RaggedLayer)
            if layer.is_initialized:  # otherwise it reads the keys of another one
                layer.move(from_slots, to_slots)


def windows_of(model: PreTrainedModel) -> list[int | None]:
    """Return for each layer how many tokens its queries see, as transformers' own cache keeps them; `None` for all."""
    config = model.config.get_text_config(decoder=True)
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return [*windows, *[None] * (config.num_hidden_layers - len(windows))]
