"""
A ragged static key/value cache: each row of a batch has its own length, and rolls back by lowering it.

The keys of an encoder's outputs lie beside it, in a cache of their own. Not covered: sliding windows that the text
outgrows, which go through [`~hf_osd.serving.croppable_decoder.CroppableDecoder`]; linear attention, which the target's
own decoding serves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from .._compat import execution_device


class RaggedLayer(CacheLayerMixin):
    """
    Keys and values of one layer, stored as `(heads, batch * slots, head_dim)`.

    One `index_copy_` writes any pattern of rows and positions, and a view reads them back: nothing is moved when rows
    advance or roll back by different amounts.
    """

    is_compileable = False  # otherwise transformers builds masks where none are needed
    is_sliding = False

    def __init__(self, cache: "RaggedCache") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

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
            `tuple[torch.Tensor, torch.Tensor]`: Views of shape `(batch, heads, span, head_dim)`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys, values = self._readable
        first, q, span = self._cache.staged_run, key_states.shape[2], self._cache.span
        if first is not None:
            keys.narrow(2, first, q).copy_(key_states)
            values.narrow(2, first, q).copy_(value_states)
        else:
            self._scatter(self.keys, key_states)
            self._scatter(self.values, value_states)
        return keys.narrow(2, 0, span), values.narrow(2, 0, span)

    def _scatter(self, store: torch.Tensor, states: torch.Tensor) -> None:
        slots = self._cache.staged_slots.to(store.device)
        store.index_copy_(1, slots, states.transpose(0, 1).reshape(store.shape[0], -1, store.shape[2]))

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy slots, `(tokens,)` over all rows, to others; see [`RaggedCache.move`]."""
        for store in (self.keys, self.values):
            assert store is not None
            store.index_copy_(1, targets.to(store.device), store.index_select(1, sources.to(store.device)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys. The mask itself is always passed, as a 4D tensor."""
        return self._cache.span, 0

    def get_seq_length(self) -> int:
        """Tokens before those being fed, for models that build their own positions."""
        return self._cache.start

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

    Args:
        batch (`int`): Rows.
        capacity (`int`): Positions a row can hold.
        layers (`int`): Layers of the model.
        device (`torch.device`): Where positions and masks are built.
        dtype (`torch.dtype`): The model's.
    """

    def __init__(self, batch: int, capacity: int, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = (batch, capacity, device, dtype)
        self.batch = batch
        self.capacity = capacity
        self.slots = capacity + 1
        self.span = 0  # slots of each row that the staged queries may read
        self.start = 0
        self.staged_slots = torch.empty(0, dtype=torch.long, device=device)  # (batch * q,)
        self.staged_run: int | None = None  # first slot, where a single row writes consecutive ones
        self._row_offsets = torch.arange(batch, device=device)[:, None] * self.slots  # (batch, 1)
        self._slot_ids = torch.arange(self.slots, device=device)  # (slots,)
        super().__init__(layers=[RaggedLayer(self) for _ in range(layers)])

    @classmethod
    def of(cls, model: PreTrainedModel, batch: int, capacity: int) -> "RaggedCache":
        """Make a cache for a model."""
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        return cls(batch, capacity, layers, execution_device(model), model.dtype)

    def stage(self, places: torch.Tensor, span: int, seen: torch.Tensor | None = None) -> torch.Tensor:
        """
        Announce where the tokens about to be fed go, and build their mask.

        Args:
            places (`torch.LongTensor` of shape `(batch, q)`): Slot of each token in its row: its position, unless the
                tokens are a tree. Outside `[0, capacity)`: padding, written to the scratch slot.
            span (`int`): One more than the largest slot inside the capacity.
            seen (`torch.BoolTensor` of shape `(batch, q, q)`, *optional*): Which of these tokens see one another;
                defaults to each seeing those before it.

        Returns:
            `torch.BoolTensor` of shape `(batch, 1, q, span)`: True where a query may look. A padding query sees slot
            0, since a row of nothing but -inf would turn into nan.
        """
        valid = (places >= 0) & (places < self.capacity)
        slots = torch.where(valid, places, self.capacity)
        self.staged_slots, self.staged_run = (self._row_offsets + slots).flatten(), None
        self.span, self.start = span, max(span - places.shape[1], 0)
        mask = self.mask_of(places.clamp(min=0))
        if seen is None:
            return mask
        aside = torch.nn.functional.pad(mask, (0, 1))  # one more column, for padding
        index = torch.where(valid, places, span)[:, None, None].expand(-1, -1, places.shape[1], -1)
        return aside.scatter_(3, index, (seen | ~valid[..., None])[:, None])[..., :span]

    def stage_run(self, first: int, count: int) -> torch.Tensor:
        """
        Announce consecutive slots of the only row: the same as [`stage`], at a fraction of its cost.

        Args:
            first (`int`): First slot, not negative.
            count (`int`): Slots; the last one lies inside the capacity.

        Returns:
            `torch.LongTensor` of shape `(1, count)`: The slots; see [`mask_of`].
        """
        self.staged_run, self.span, self.start = first, first + count, first
        return self._slot_ids[None, first : first + count]

    def mask_of(self, places: torch.Tensor) -> torch.Tensor:
        """Return the mask of staged slots `(batch, q)` that are not negative: `(batch, 1, q, span)`."""
        return (self._slot_ids[: self.span] <= places[..., None])[:, None]

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
            layer.move(from_slots, to_slots)
