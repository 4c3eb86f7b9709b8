"""
Masks of models in which tokens do not simply see all that come before them: windows, chunks, images read both ways.

The model's own functions make them, by the call with which `generate` prepares masks for a static cache. Only where
these functions ask for the positions, which differ from row to row here, something of our own answers: a kind of mask
that transformers lets one register (https://huggingface.co/docs/transformers/attention_interface).
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from .._caches import cache_argument
from .._compat import parameters_of
from .cache import RaggedCache, Staged

_KIND = "hf_osd_ragged"  # the attention implementation by whose name transformers finds the function below

Masks = torch.Tensor | dict[str, torch.Tensor | None] | None
"""For all layers, or for each kind of layer by its name."""


class _Rows(Cache):
    """A ragged cache as mask functions see it: with the staged tokens in place of one offset for all rows."""

    def __init__(self, cache: RaggedCache) -> None:
        super().__init__(layers=cache.layers)
        self._staged = cache.staged

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Return what [`_mask`] gets as `q_offset`."""
        return self._staged


class OwnMasks:
    """
    Makes the masks of a model for the tokens that are staged on a ragged cache.

    Args:
        model (`PreTrainedModel`): The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._make: Callable[..., Masks] = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        self._config = copy.deepcopy(model.config)
        self._config._attn_implementation = _KIND
        self._dtype = model.dtype

    def of(self, cache: RaggedCache, token_types: Mapping[str, torch.Tensor] | None = None) -> Masks:
        """
        Return boolean masks `(batch, 1, q, keys)`, True where a query may look.

        Args:
            cache (`RaggedCache`): Holds the staged tokens.
            token_types (`Mapping[str, torch.LongTensor]`, *optional*): In the first pass, which tokens are of an
                image and the like, by the name of the model's argument: `(batch, prompt)` each, by position.
        """
        positions = cache.staged.positions
        return self._make(
            config=self._config,
            inputs_embeds=torch.empty((*positions.shape, 0), dtype=self._dtype, device=positions.device),
            attention_mask=None,
            position_ids=positions,
            is_first_iteration=bool(token_types),
            **cache_argument(parameters_of(self._make), _Rows(cache)),
            **(token_types or {}),
        )


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    q_offset: Staged,
    kv_offset: int,
    mask_function: Callable[..., torch.Tensor],
    **unused: Any,
) -> torch.Tensor:
    """Evaluate a mask function at the positions of each row; `q_offset` is [`_Rows`]'s."""
    staged = q_offset
    rows = torch.arange(batch_size, device=staged.positions.device)[:, None, None, None]
    heads, last = rows.new_zeros(1, 1, 1, 1), staged.positions.amax(1)[:, None, None, None]

    def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """As the model's function says; in slots behind the row's last token is nothing to be seen."""
        return mask_function(rows, heads, queries, keys) & (keys <= last)

    return staged.mask(torch.arange(kv_offset, kv_offset + kv_length, device=rows.device), sees)


AttentionMaskInterface.register(_KIND, _mask)
