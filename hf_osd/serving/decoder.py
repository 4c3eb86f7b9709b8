"""A causal language model together with its cache, for one batch: feed tokens, read logits, roll back."""

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from .._compat import show_windows_only
from ..errors import UnsupportedModelError
from .cache import RaggedLayer
from .graphs import captured_span, captured_width
from .kept import borrow, give_back
from .transfer import upload

RAGGED_ATTENTION = ("sdpa", "eager")  # the implementations that take a 4D mask as it is
PREFILL_CHUNK = 1024  # columns in one forward: a 4D mask over a whole long prompt would not fit into memory


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
    """

    def __init__(self, model: PreTrainedModel, padding: Sequence[int], width: int) -> None:
        self.model = model
        self.padding = list(padding)
        self.context = context_length(model)
        self.cached = list(padding)  # first column of each row that is not in the cache
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

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

    def release(self) -> None:  # noqa: B027 -- most have nothing to leave
        """Leave what later calls can use. The decoder must not be used afterwards."""

    def _logits(self, keep: int, **inputs: Any) -> torch.Tensor:
        if self._keeps_logits:
            inputs["logits_to_keep"] = keep
        logits: torch.Tensor = self.model(use_cache=True, return_dict=True, **inputs).logits[:, -keep:]
        return logits.to(torch.float32)  # as transformers does before any processor


class RaggedDecoder(Decoder):
    """Any batch, any acceptance pattern, on a [`RaggedCache`]."""

    def __init__(self, model: PreTrainedModel, padding: Sequence[int], width: int) -> None:
        super().__init__(model, padding, width)
        self._device = model.device
        self._kept = borrow(model, len(self.padding), width - min(self.padding))
        self.cache = self._kept.cache
        self._padding = upload(self.padding, self._device)[:, None]  # (batch, 1)
        self._last_position = min(self.cache.capacity, self.context) - 1
        self._additive_mask = model.config._attn_implementation == "eager"

    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int) -> torch.Tensor:
        """Feed a long prompt in chunks, and the rest at once; see [`Decoder.feed`]."""
        while self._lag(ends) > PREFILL_CHUNK + keep:
            chunk = zip(self.cached, ends, strict=True)
            self._feed(ids, [max(cached, min(cached + PREFILL_CHUNK, end - keep)) for cached, end in chunk], 1)
        return self._feed(ids, ends, keep)

    def _lag(self, ends: Sequence[int]) -> int:
        return max(end - cached for cached, end in zip(self.cached, ends, strict=True))

    def _feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int) -> torch.Tensor:
        """One forward over a rectangle of columns that ends at every row's own end."""
        q = max(keep, self._lag(ends))
        graphs, width = self._kept.graphs, captured_width(q)
        if graphs is not None and width is not None:
            span = captured_span(self._span(ends), self.cache.capacity)
            forward = partial(self._forward, span=span)
            logits = graphs.run(self.model, span, forward, *self._columns(ids, ends, width))[:, -keep:]
        elif len(ends) == 1 and self._is_inside(ends[0], q):
            first = ends[0] - q - self.padding[0]
            positions = self.cache.stage_run(first, q)
            # transformers knows what a prompt sees, and that one token sees all: faster paths than with a mask.
            is_known = (q == 1 or first == 0) and not self._additive_mask
            mask = None if is_known else self.cache.mask_of(positions)
            logits = self._call(ids[:, ends[0] - q : ends[0]], positions, mask, keep)
        else:
            logits = self._forward(*self._columns(ids, ends, q), span=self._span(ends), keep=keep)
        self.cached = list(ends)
        return logits

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

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, *, span: int, keep: int = 0) -> torch.Tensor:
        """Every kernel of a forward, the mask's included; `keep` 0 means all."""
        mask = self.cache.stage(positions, span)
        return self._call(tokens, positions.clamp(0, self._last_position), mask, keep or tokens.shape[1])

    def _call(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, keep: int
    ) -> torch.Tensor:
        return self._logits(
            keep,
            input_ids=tokens,
            position_ids=positions,
            attention_mask=None if mask is None else self._as_model_mask(mask),
            past_key_values=self.cache,
        )

    def _as_model_mask(self, mask: torch.Tensor) -> torch.Tensor:
        if not self._additive_mask:
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def rollback(self, ends: Sequence[int]) -> None:
        """A length change; see [`Decoder.rollback`]."""
        self.cached = [min(cached, end) for cached, end in zip(self.cached, ends, strict=True)]

    def release(self) -> None:
        """Leave the cache to the next call of its shape; see [`Decoder.release`]."""
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
    One row, on transformers' own dynamic cache: sliding windows, hybrid and other layers that the ragged cache cannot
    hold, and caches that the caller hands over to be continued. See [`make_decoder`].

    Args:
        model, padding, width: See [`Decoder`].
        cache (`Cache`, *optional*): A cache to go on from, updated in place; defaults to an empty one.
    """

    def __init__(self, model: PreTrainedModel, padding: Sequence[int], width: int, cache: Cache | None = None) -> None:
        super().__init__(model, padding, width)
        self.cache = cache if cache is not None else DynamicCache(config=model.config)
        self.cached = [self.padding[0] + self.cache.get_seq_length()]
        self.cache.activate_past_recording()
        show_windows_only(self.cache)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int) -> torch.Tensor:
        """Feed the row's new columns, without its padding; see [`Decoder.feed`]."""
        (start,), (end,) = self.cached, ends
        if end - start < keep:
            self.rollback([end - keep])
            (start,) = self.cached
        inputs: dict[str, Any] = {"input_ids": ids[:, start:end], "past_key_values": self.cache}
        if self._takes_positions:
            inputs["position_ids"] = torch.arange(start, end, device=ids.device)[None] - self.padding[0]
        logits = self._logits(keep, **inputs)
        if self.cache.get_seq_length() != end - self.padding[0]:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be served: it does not keep its tokens in the cache it is given"
            )
        self.cached = [end]
        return logits

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


def context_length(model: PreTrainedModel) -> int:
    """Return how many positions a model was built for; unlimited where its configuration does not say."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 2**62)


def make_decoder(
    model: PreTrainedModel, padding: Sequence[int], width: int, cache: Cache | None = None, role: str = "target"
) -> Decoder:
    """
    Choose the decoder for a model.

    Args:
        model (`PreTrainedModel`): A decoder-only model.
        padding (`Sequence[int]`): Padding columns of each row.
        width (`int`): Columns that may ever be fed.
        cache (`Cache`, *optional*): A filled cache to go on from.
        role (`str`, defaults to `"target"`): What to call the model in errors.

    Raises:
        UnsupportedModelError: Neither cache can hold the model, or not at this batch size.
    """
    if cache is None and width - min(padding) <= attention_span(model) and holds_ragged_cache(model):
        return RaggedDecoder(model, padding, width)
    if not _is_croppable(model):
        raise UnsupportedModelError(
            f"the {role} {type(model).__name__} cannot be served: its cache cannot roll back rejected tokens"
        )
    if len(padding) != 1:
        raise UnsupportedModelError(
            f"the {role} {type(model).__name__} cannot decode in a batch of {len(padding)} (its cache does not hold "
            "rows of different lengths): pass one prompt at a time"
        )
    return CroppableDecoder(model, padding, width, cache)


def attention_span(model: PreTrainedModel) -> int:
    """
    Return how many tokens every layer can look back over.

    Within the narrowest window, a windowed layer and a full one are the same, so the ragged cache holds both.
    """
    config = model.config.get_text_config(decoder=True)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        window = None
    else:
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    chunk = getattr(config, "attention_chunk_size", None)
    local = getattr(config, "window_size", None)  # GPT-Neo's, whose layers apply it by column, not by position
    return min(window or 2**62, chunk or 2**62, local if isinstance(local, int) else 2**62)


_ragged_models: "weakref.WeakKeyDictionary[PreTrainedModel, dict[str, bool]]" = weakref.WeakKeyDictionary()


def holds_ragged_cache(model: PreTrainedModel) -> bool:
    """
    Say whether a model gives the right logits on a ragged cache.

    What a model does with 4D masks, position ids and a cache of ours is its own code, so it is tried rather than
    looked up: two rows of different lengths, fed in two parts with a rollback between them, must give the logits of
    plain forwards, and so must a single row. Done once per model and attention implementation; costs a few forwards of
    a few tokens.
    """
    implementation = str(model.config._attn_implementation)
    known = _ragged_models.setdefault(model, {})
    if implementation not in known:
        known[implementation] = (
            implementation in RAGGED_ATTENTION and not _has_other_layers(model) and _matches_plain_forward(model)
        )
    return known[implementation]


def _has_other_layers(model: PreTrainedModel) -> bool:
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    return bool(set(kinds) - attention) or bool(getattr(model, "_is_stateful", False))


@torch.no_grad()
def _matches_plain_forward(model: PreTrainedModel) -> bool:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(14).reshape(2, 7) * 7919 + 1) % vocabulary
    ids = ids.to(model.device)
    try:
        decoder = RaggedDecoder(model, [0, 2], 7)
        decoder.feed(ids, [4, 6], keep=1)  # the second row advances by more than it will keep
        decoder.rollback([3, 5])
        ragged = decoder.feed(ids, [6, 7], keep=2)
        plain = torch.stack([model(ids[:1, :6]).logits[0, -2:], model(ids[1:, 2:7]).logits[0, -2:]]).float()
        alone = RaggedDecoder(model, [0], 7)
        alone.feed(ids[:1], [5], keep=1)
        ragged = torch.cat([ragged, alone.feed(ids[:1], [6], keep=1).expand(2, 1, -1)], dim=1)
        plain = torch.cat([plain, plain[:1, -1:].expand(2, 1, -1)], dim=1)
    except Exception:  # any architecture may refuse in any way; it is served by the other cache then
        return False
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    return bool((ragged - plain).abs().max() <= tolerance * plain.std())


def _is_croppable(model: PreTrainedModel) -> bool:
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return False
    return bool(getattr(DynamicCache(config=model.config), "is_croppable", True))
