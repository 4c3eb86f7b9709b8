"""A language model together with its cache, for one batch: feed tokens, read logits, roll back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache

from .._caches import cache_argument, cache_of
from .._compat import attention_implementation, decoder_prefix, execution_device, parameters_of
from .attention import grouped_attention
from .cache import RaggedLayer
from .graphs import captured_span, captured_width
from .kept import borrow, give_back
from .masks import Masks, OwnMasks
from .positions import position_tap
from .preparation import Preparation
from .states import TargetStates
from .transfer import upload
from .tree import depths, visible

Parents = Sequence[Sequence[int]]

PREFILL_CHUNK = 1024  # columns in one forward over a prompt; the mask of a longer one might not fit into memory


class Pass(NamedTuple):
    """
    The results of one forward.

    Attributes:
        logits (`torch.FloatTensor` of shape `(batch, keep, vocab)`): Of the last positions, float32.
        states (`torch.Tensor` of shape `(batch, q, size)`, *optional*): Hidden states, for a draft that reads them.
        cache (`Cache`, *optional*): The cache that the model returned.
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
        preparation (`Preparation`, *optional*): The inputs of the passes, where they are more than tokens.
        states (`TargetStates`, *optional*): Takes the hidden states of the tokens that are fed.

    Attributes:
        vocabulary (`torch.LongTensor` of shape `(vocab,)`, *optional*): The tokens whose logits it gives; `None` for
            all.
    """

    vocabulary: torch.Tensor | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        padding: Sequence[int],
        width: int,
        preparation: Preparation | None = None,
        states: TargetStates | None = None,
    ) -> None:
        self.model = model
        self._device = execution_device(model)
        self._states = states
        self._layers = states.layers if states is not None else ()
        self.padding = list(padding)
        self.context = context_length(model)
        self.cached = list(padding)  # first column of each row that is not in the cache
        self._preparation = preparation if preparation is not None and not preparation.is_plain else None
        self._every_pass = preparation.every_pass if preparation is not None else {}
        self._prefix = decoder_prefix(model)
        self._parameters = parameters_of(model.forward)
        self._first = True

    @property
    def reads_prompt_alone(self) -> bool:
        """Whether the next pass takes inputs beside tokens, so that it cannot check a proposal as well."""
        return self._first and self._preparation is not None

    @property
    def takes_trees(self) -> bool:
        """Whether [`feed`] takes trees."""
        return False

    @abstractmethod
    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Parents | None = None) -> torch.Tensor:
        """
        Run the model over every token that is not cached yet.

        Args:
            ids (`torch.LongTensor` of shape `(batch, columns)`): The token buffer, on the model's device.
            ends (`Sequence[int]`): For each row, one more than its last column to feed.
            keep (`int`): How many of the last columns to return logits for, at least 1.
            parents (`Sequence[Sequence[int]]`, *optional*): Where the last columns are a tree: by row, the node that
                each follows; see [`~hf_osd.records.Proposal`]. Before anything else is fed, [`select`] says which
                path of it stays.

        Returns:
            `torch.FloatTensor` of shape `(batch, keep, vocab)`: float32 logits of columns `end - keep ... end - 1`.
        """

    def select(self, starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """
        Keep one path of the tree that was fed last; [`rollback`] then forgets the other nodes.

        Args:
            starts (`Sequence[int]`): For each row, the column of its first node.
            paths (`Sequence[Sequence[int]]`): For each row, nodes that follow one another from the text on.
        """
        assert all(list(path) == list(range(len(path))) for path in paths), "not a prefix of a chain"

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
        forward = partial(self.model, **{**self._every_pass, **inputs, "use_cache": True, "return_dict": True})
        with grouped_attention(self._device):
            output, states = self._states.read(forward) if self._states is not None else (forward(), None)
        self._first = False
        logits = output.logits[:, -keep:].to(torch.float32)  # before any processor, as there
        return Pass(logits, states, cache_of(output))

    def _named(self, **inputs: Any) -> dict[str, Any]:
        """Give inputs the names that the model has for them; a decoder behind an encoder may take no positions."""
        if not self._prefix:
            return inputs
        named = {self._prefix + name: value for name, value in inputs.items()}
        return {name: value for name, value in named.items() if name in self._parameters}

    def _take(self, states: torch.Tensor | None, ends: Sequence[int]) -> None:
        """Keep the states of a pass, whose last columns are those before `ends`, for a draft that reads them."""
        if states is not None and self._states is not None:
            self._states.write(states, ends)


class RaggedDecoder(Decoder):
    """
    Decodes batches whose rows accept different numbers of tokens, on a [`RaggedCache`].

    Args:
        model, padding, width, preparation, states: See [`Decoder`].
        takes_trees (`bool`, defaults to `True`): Whether the model obeys a mask that hides earlier tokens from later
            ones.
        is_aligned (`bool`, defaults to `False`): Whether the model counts columns, so that several rows have to end in
            one; see [`RaggedCache`]. It then takes no trees.
        own_masks (`bool`, defaults to `False`): Whether the model makes its masks, since some of its layers do not let
            each token see all before it, and only these; see [`~hf_osd.serving.masks.OwnMasks`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        padding: Sequence[int],
        width: int,
        preparation: Preparation | None = None,
        states: TargetStates | None = None,
        takes_trees: bool = True,
        own_masks: bool = False,
        is_aligned: bool = False,
    ) -> None:
        super().__init__(model, padding, width, preparation, states)
        self._takes_trees = takes_trees and not is_aligned
        self._own_masks = OwnMasks(model) if own_masks else None
        self._kept = borrow(model, len(self.padding), width - min(self.padding))
        self.cache = self._kept.cache
        self.cache.is_aligned = is_aligned
        self._whole = EncoderDecoderCache(self.cache, DynamicCache()) if self._every_pass else self.cache
        self._padding = upload(self.padding, self._device)[:, None]  # (batch, 1)
        self._additive_mask = attention_implementation(model) == "eager"
        self._positions = self._preparation if self._preparation and self._preparation.positions is not None else None
        self._tap = position_tap(model)

    @property
    def takes_trees(self) -> bool:
        """Whether [`feed`] takes trees, as [`~hf_osd.serving.probe.probe`] has found by trying."""
        return self._takes_trees

    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Parents | None = None) -> torch.Tensor:
        """Feed a long prompt in chunks, and the rest at once; see [`Decoder.feed`]."""
        while not self.reads_prompt_alone and self._lag(ends) > PREFILL_CHUNK + keep:
            chunk = zip(self.cached, ends, strict=True)
            self._feed(ids, [max(cached, min(cached + PREFILL_CHUNK, end - keep)) for cached, end in chunk], 1)
        return self._feed(ids, ends, keep, parents)

    def _lag(self, ends: Sequence[int]) -> int:
        return max(end - cached for cached, end in zip(self.cached, ends, strict=True))

    def _feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Parents | None = None) -> torch.Tensor:
        """One forward over a rectangle of columns that ends at every row's own end."""
        q = max(keep, self._lag(ends))
        graphs, width = self._kept.graphs, captured_width(q)
        if graphs is not None and width is not None and self._preparation is None and not self._every_pass:
            span = captured_span(self._span(ends), self.cache.capacity)
            tokens, places = self._columns(ids, ends, width)
            tree, read = self._tree(parents, width), self._read(places)
            forward = partial(self._forward, span=span, names=tuple(read))
            key, inputs = (span, len(tree), *self._layers, *read), (tokens, places, *read.values(), *tree)
            logits, states, _ = graphs.run(self.model, key, forward, *inputs)
        elif len(ends) == 1 and self._is_inside(ends[0], q):
            logits, states, _ = self._feed_run(ids, ends[0], q, keep, parents)
        else:
            tokens, places = self._columns(ids, ends, q)
            tree, read = self._tree(parents, q), self._read(places)
            least = min(end - q - pad for end, pad in zip(ends, self.padding, strict=True))
            logits, states, _ = self._staged(tokens, places, self._span(ends), least, keep, read, tree)
        self._take(states, ends)
        self.cached = list(ends)
        return logits[:, -keep:]

    def _feed_run(self, ids: torch.Tensor, end: int, q: int, keep: int, parents: Parents | None) -> Pass:
        """The only row's last `q` columns before `end`."""
        first = end - q - self.padding[0]
        positions = self.cache.stage_run(first, q, *self._tree(parents, q)).positions
        # Without a mask, transformers takes faster paths for a prompt and for a single token.
        is_known = (q == 1 or first == 0) and not self._additive_mask and self._positions is None and parents is None
        mask = None if is_known and self._own_masks is None else self._mask()
        places = self.cache.staged.slots
        return self._call(ids[:, end - q : end], positions, mask, keep, self._read(places))

    def _tree(self, parents: Parents | None, fed: int) -> tuple[torch.Tensor, ...]:
        """For each token of a tree its slot less its position, and which tokens see one another; empty for a chain."""
        if parents is None:
            return ()
        text = [0] * (fed - len(parents[0]))
        back = [[*text, *(node + 1 - depth for node, depth in enumerate(depths(nodes)))] for nodes in parents]
        return torch.tensor(back, device=self._device), visible(parents, fed).to(self._device)

    def select(self, starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Move accepted nodes to the slots of their positions; see [`Decoder.select`]."""
        moves = [
            (row, starts[row] + node, starts[row] + step)
            for row, path in enumerate(paths)
            for step, node in enumerate(path)
            if node != step
        ]
        if moves:
            rows, sources, targets = zip(*moves, strict=True)
            pads = [self.padding[row] for row in rows]
            slots = [
                [column - pad for column, pad in zip(columns, pads, strict=True)] for columns in (sources, targets)
            ]
            self.cache.move(rows, *slots)
            if self._states is not None:
                self._states.move(rows, sources, targets)

    def _span(self, ends: Sequence[int]) -> int:
        spans = (end - pad for end, pad in zip(ends, self.padding, strict=True))
        return min(max(spans), self.cache.capacity)

    def _is_inside(self, end: int, q: int) -> bool:
        return q <= end - self.padding[0] <= self.cache.capacity

    def _columns(self, ids: torch.Tensor, ends: Sequence[int], q: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and slots of each row's last `q` columns. Slots outside of the row mean padding."""
        columns = torch.arange(-q, 0, device=self._device) + upload(ends, self._device)[:, None]
        places = columns - self._padding
        return ids.gather(1, columns.clamp_(0, ids.shape[1] - 1)), places

    def _read(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """More inputs of the model at positions `(batch, q)`, by the names of its arguments."""
        return {}

    def _forward(
        self, tokens: torch.Tensor, places: torch.Tensor, *more: torch.Tensor, span: int, names: Sequence[str]
    ) -> Pass:
        """A forward and its mask, for a graph to capture; `more` is what `_read` gave, by `names`, then the tree."""
        named = dict(zip(names, more, strict=False))
        return self._staged(tokens, places, span, 0, tokens.shape[1], named, more[len(names) :])

    def _staged(
        self,
        tokens: torch.Tensor,
        places: torch.Tensor,
        span: int,
        least: int,
        keep: int,
        read: dict[str, torch.Tensor],
        tree: Sequence[torch.Tensor],
    ) -> Pass:
        positions = self.cache.stage(places, span, least, *tree).positions
        return self._call(tokens, positions, self._mask(), keep, read)

    def _call(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: Masks,
        keep: int,
        read: dict[str, torch.Tensor],
    ) -> Pass:
        extras = self._preparation.extras_of(tokens.shape[1]) if self._preparation and self._first else {}
        if self._positions is not None:
            positions = self._positions.positions_at(positions + self._padding)
        with nullcontext() if self._tap is None else self._tap.telling(positions):
            return self._run(
                keep,
                **self._named(input_ids=tokens, position_ids=positions, attention_mask=mask),
                **cache_argument(self._parameters, self._whole),
                **extras,
                **read,
            )

    def _mask(self) -> Masks:
        """The mask of the staged tokens, as the model reads it."""
        if self._own_masks is None:
            return self._as_model_mask(self.cache.mask())
        types = self._preparation.token_types(self.padding) if self._preparation and self._first else None
        masks = self._own_masks.of(self.cache, types)
        if isinstance(masks, dict):
            return {kind: self._as_model_mask(mask) for kind, mask in masks.items()}
        return self._as_model_mask(masks)

    def _as_model_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        if mask is None or not self._additive_mask:
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def rollback(self, ends: Sequence[int]) -> None:
        """A length change; see [`Decoder.rollback`]."""
        self.cached = [min(cached, end) for cached, end in zip(self.cached, ends, strict=True)]

    def release(self, failed: bool = False) -> None:
        """Keep the cache for the next call of its shape, unless this one failed; see [`Decoder.release`]."""
        if not failed:
            give_back(self.model, self._kept)

    def export(self) -> Cache:
        """Copy into a `DynamicCache` with the buffer's columns, left padding included; see [`Decoder.export`]."""
        columns = torch.arange(max(self.cached), device=self._device)
        slots = (columns - self._padding).clamp(0, self.cache.capacity)  # (batch, columns)
        exported = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        for index, layer in enumerate(self.cache.layers):
            assert isinstance(layer, RaggedLayer)
            if not layer.is_initialized:  # it reads the keys of another one
                continue
            rows = torch.arange(self.cache.batch, device=slots.device)[:, None]
            keys, values = (
                view[rows.to(view.device), :, slots.to(view.device)].transpose(1, 2) for view in layer.by_row()
            )
            exported.update(keys, values, index)
        if isinstance(self._whole, EncoderDecoderCache):
            return EncoderDecoderCache(exported, self._whole.cross_attention_cache)
        return exported


def context_length(model: PreTrainedModel) -> int:
    """Return how many positions a model was built for; unlimited where its configuration does not say."""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_target_positions")  # of a decoder behind an encoder of sounds
    return int(next((value for name in names if (value := getattr(config, name, None))), 2**62))
