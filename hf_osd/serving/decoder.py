"""A causal language model together with its cache, for one batch: feed tokens, read logits, roll back."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from .._compat import (
    attention_implementation,
    cache_argument,
    cache_of,
    execution_device,
    show_windows_only,
    stop_recording,
)
from ..errors import UnsupportedModelError
from .cache import RaggedLayer
from .graphs import captured_span, captured_width
from .kept import borrow, give_back
from .preparation import Preparation
from .states import TargetStates
from .transfer import upload

PREFILL_CHUNK = 1024  # columns in one forward: a 4D mask over a whole long prompt would not fit into memory


class Pass(NamedTuple):
    """
    What one forward gave.

    Attributes:
        logits (`torch.FloatTensor` of shape `(batch, keep, vocab)`): Of the last positions, float32.
        states (`torch.Tensor` of shape `(batch, q, size)`, *optional*): Hidden states, where somebody reads them.
        cache (`Cache`, *optional*): The cache that the model went on with.
    """

    logits: torch.Tensor
    states: torch.Tensor | None
    cache: Cache | None = None


class Decoder(ABC):
    """
    One model and its cache, over the columns of a left-padded token buffer.

    Row `r` of the buffer holds padding in its first `padding[r]` columns, then real tokens; the token in column `c`
    has position `c - padding[r]`. The decoder remembers up to which column each row is cached, so feeding a prompt,
    catching up after a rejection and verifying a proposal are the same call.

    Args:
        model (`PreTrainedModel`): The model, in eval mode.
        padding (`Sequence[int]`): Padding columns of each row.
        width (`int`): Columns of the buffer that may ever be fed.
        preparation (`Preparation`, *optional*): The inputs of the first pass, where they are more than tokens.
        states (`TargetStates`, *optional*): Where the hidden states of what is fed go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        padding: Sequence[int],
        width: int,
        preparation: Preparation | None = None,
        states: TargetStates | None = None,
    ) -> None:
        self.model = model
        self._states = states
        self._layers = states.layers if states is not None else ()
        self.padding = list(padding)
        self.context = context_length(model)
        self.cached = list(padding)  # first column of each row that is not in the cache
        self._preparation = preparation if preparation is not None and not preparation.is_plain else None
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._first = True

    @property
    def reads_prompt_alone(self) -> bool:
        """Whether the next pass gets more than tokens, so that nothing may be proposed behind the prompt yet."""
        return self._first and self._preparation is not None

    @abstractmethod
    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int) -> torch.Tensor:
        """
        Run the model over every token that is not cached yet.

        Args:
            ids (`torch.LongTensor` of shape `(batch, columns)`): The token buffer, on the model's device.
            ends (`Sequence[int]`): For each row, one more than its last column to feed.
            keep (`int`): How many of the last columns to return logits for, at least 1.

        Returns:
            `torch.FloatTensor` of shape `(batch, keep, vocab)`: float32 logits of columns `end - keep ... end - 1`.
        """

    @abstractmethod
    def rollback(self, ends: Sequence[int]) -> None:
        """Forget every column from `ends[r]` on. Never copies in the ragged cache."""

    @abstractmethod
    def export(self) -> Cache:
        """Return the cache as transformers' `generate` would, for a caller who wants to go on from it."""

    @abstractmethod
    def release(self, failed: bool = False) -> None:
        """
        Leave what later calls can use. The decoder must not be used afterwards.

        Args:
            failed (`bool`, defaults to `False`): Whether an exception ended the request.
        """

    def _run(self, keep: int, **inputs: Any) -> Pass:
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = keep
        forward = partial(self.model, **{**inputs, "use_cache": True, "return_dict": True})
        output, states = self._states.read(forward) if self._states is not None else (forward(), None)
        self._first = False
        logits = output.logits[:, -keep:].to(torch.float32)  # before any processor, as there
        return Pass(logits, states, cache_of(output))

    def _take(self, states: torch.Tensor | None, ends: Sequence[int]) -> None:
        """Leave the states of a pass, whose last columns are those before `ends`, to whoever reads them."""
        if states is not None and self._states is not None:
            self._states.write(states, ends)


class RaggedDecoder(Decoder):
    """Any batch, any acceptance pattern, on a [`RaggedCache`]."""

    def __init__(
        self,
        model: PreTrainedModel,
        padding: Sequence[int],
        width: int,
        preparation: Preparation | None = None,
        states: TargetStates | None = None,
    ) -> None:
        super().__init__(model, padding, width, preparation, states)
        self._device = execution_device(model)
        self._kept = borrow(model, len(self.padding), width - min(self.padding))
        self.cache = self._kept.cache
        self._padding = upload(self.padding, self._device)[:, None]  # (batch, 1)
        self._additive_mask = attention_implementation(model) == "eager"
        self._positions = self._preparation if self._preparation and self._preparation.positions is not None else None

    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int) -> torch.Tensor:
        """Feed a long prompt in chunks, and the rest at once; see [`Decoder.feed`]."""
        while not self.reads_prompt_alone and self._lag(ends) > PREFILL_CHUNK + keep:
            chunk = zip(self.cached, ends, strict=True)
            self._feed(ids, [max(cached, min(cached + PREFILL_CHUNK, end - keep)) for cached, end in chunk], 1)
        return self._feed(ids, ends, keep)

    def _lag(self, ends: Sequence[int]) -> int:
        return max(end - cached for cached, end in zip(self.cached, ends, strict=True))

    def _feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int) -> torch.Tensor:
        """One forward over a rectangle of columns that ends at every row's own end."""
        q = max(keep, self._lag(ends))
        graphs, width = self._kept.graphs, captured_width(q)
        if graphs is not None and width is not None and self._preparation is None:
            span = captured_span(self._span(ends), self.cache.capacity)
            tokens, positions = self._columns(ids, ends, width)
            read = self._read(positions)
            forward = partial(self._forward, span=span, names=tuple(read))
            key, inputs = (span, *self._layers, *read), (tokens, positions, *read.values())
            logits, states, _ = graphs.run(self.model, key, forward, *inputs)
        elif len(ends) == 1 and self._is_inside(ends[0], q):
            logits, states, _ = self._feed_run(ids, ends[0], q, keep)
        else:
            tokens, positions = self._columns(ids, ends, q)
            mask = self.cache.stage(positions, self._span(ends))
            logits, states, _ = self._call(tokens, positions.clamp(min=0), mask, keep, self._read(positions))
        self._take(states, ends)
        self.cached = list(ends)
        return logits[:, -keep:]

    def _feed_run(self, ids: torch.Tensor, end: int, q: int, keep: int) -> Pass:
        """The only row's last `q` columns before `end`."""
        first = end - q - self.padding[0]
        positions = self.cache.stage_run(first, q)
        # transformers knows what a prompt sees, and that one token sees all: faster paths than with a mask.
        is_known = (q == 1 or first == 0) and not self._additive_mask and self._positions is None
        mask = None if is_known else self.cache.mask_of(positions)
        return self._call(ids[:, end - q : end], positions, mask, keep, self._read(positions))

    def _span(self, ends: Sequence[int]) -> int:
        spans = (end - pad for end, pad in zip(ends, self.padding, strict=True))
        return min(max(spans), self.cache.capacity)

    def _is_inside(self, end: int, q: int) -> bool:
        return q <= end - self.padding[0] <= self.cache.capacity

    def _columns(self, ids: torch.Tensor, ends: Sequence[int], q: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions of each row's last `q` columns; positions outside the row belong to padding."""
        columns = torch.arange(-q, 0, device=self._device) + upload(ends, self._device)[:, None]
        positions = columns - self._padding
        return ids.gather(1, columns.clamp_(0, ids.shape[1] - 1)), positions

    def _read(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model reads at positions `(batch, q)` besides tokens, by the names of its arguments."""
        return {}

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, *read: torch.Tensor, span: int, names: Sequence[str]
    ) -> Pass:
        """Every kernel of a forward, the mask's included."""
        mask = self.cache.stage(positions, span)
        named = dict(zip(names, read, strict=True))
        return self._call(tokens, positions.clamp(min=0), mask, tokens.shape[1], named)

    def _call(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        keep: int,
        read: dict[str, torch.Tensor],
    ) -> Pass:
        extras = self._preparation.extras_of(tokens.shape[1]) if self._preparation and self._first else {}
        if self._positions is not None:
            positions = self._positions.positions_at(positions + self._padding)
        return self._run(
            keep,
            input_ids=tokens,
            position_ids=positions,
            attention_mask=None if mask is None else self._as_model_mask(mask),
            **cache_argument(self._parameters, self.cache),
            **extras,
            **read,
        )

    def _as_model_mask(self, mask: torch.Tensor) -> torch.Tensor:
        if not self._additive_mask:
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def rollback(self, ends: Sequence[int]) -> None:
        """A length change; see [`Decoder.rollback`]."""
        self.cached = [min(cached, end) for cached, end in zip(self.cached, ends, strict=True)]

    def release(self, failed: bool = False) -> None:
        """Leave the cache to the next call of its shape, unless it may hold anything; see [`Decoder.release`]."""
        if not failed:
            give_back(self.model, self._kept)

    def export(self) -> Cache:
        """Copy into a `DynamicCache` with the buffer's columns, left padding included; see [`Decoder.export`]."""
        columns = torch.arange(max(self.cached), device=self._device)
        slots = (columns - self._padding).clamp(0, self.cache.capacity)  # (batch, columns)
        exported = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            assert isinstance(layer, RaggedLayer)
            rows = torch.arange(self.cache.batch, device=slots.device)[:, None]
            keys, values = (
                view[rows.to(view.device), :, slots.to(view.device)].transpose(1, 2) for view in layer.by_row()
            )
            exported.update(keys, values, index)
        return exported


class CroppableDecoder(Decoder):
    """
    One row, on transformers' own dynamic cache: sliding windows and other layers that the ragged cache cannot hold,
    soft prompts, and caches that the caller hands over to be continued. See
    [`~hf_osd.serving.choice.choose_decoder`].

    Args:
        model, padding, width, preparation, states: See [`Decoder`].
        cache (`Cache`, *optional*): A cache to go on from, updated in place; defaults to an empty one.
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
        held = cache.get_seq_length() if cache is not None else 0
        self.cached = [self.padding[0] + (held if is_prefix else 0)]
        self._adopt(cache if cache is not None else DynamicCache(config=model.config.get_text_config(decoder=True)))
        self._ahead = held - (self.cached[0] - self.padding[0])  # cached tokens that are no columns of the buffer
        self._zero = (self.padding[0] - self._ahead, torch.zeros(1, 1, dtype=torch.long))  # a column, its position

    def _adopt(self, cache: Cache) -> None:
        self.cache = cache
        cache.activate_past_recording()
        show_windows_only(cache)

    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int) -> torch.Tensor:
        """Feed the row's new columns, without its padding; see [`Decoder.feed`]."""
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
        if self.cache.get_seq_length() - self._ahead != end - self.padding[0]:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be served: it does not keep its tokens in the cache it is given"
            )
        self.cached = [end]
        return logits

    def _plain(self, ids: torch.Tensor, start: int, end: int) -> dict[str, Any]:
        inputs = {"input_ids": ids[:, start:end], **cache_argument(self._parameters, self.cache)}
        if "position_ids" in self._parameters:
            column, position = self._zero
            distances = torch.arange(start - column, end - column, device=ids.device)
            inputs["position_ids"] = position.to(ids.device) + distances
        return inputs

    def _prepared(self, ids: torch.Tensor, start: int, end: int) -> dict[str, Any]:
        """Let the model's own code make the inputs, as `generate` does for its first pass."""
        assert self._preparation is not None
        kept = {name: value for name, value in self._preparation.model_kwargs.items() if name != "attention_mask"}
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
        self._ahead = self.cache.get_seq_length() - (end - self.padding[0])
        last = inputs.get("position_ids")
        if last is None:
            last = torch.full((1, 1), self.cache.get_seq_length() - 1)
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
        stop_recording(self.cache)


def context_length(model: PreTrainedModel) -> int:
    """Return how many positions a model was built for; unlimited where its configuration does not say."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 2**62)
