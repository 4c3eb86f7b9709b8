"""Attention of few tokens on a CPU: heads that share keys and values read them together."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "sdpa"

Attend = Callable[..., tuple[torch.Tensor, Any]]
"""An attention function as transformers registers them."""


class _Grouped(threading.local):
    """Whether attention in this thread lets heads that share keys read them together."""

    on = False


_grouped = _Grouped()
_SPECIAL = ("dropout", "position_bias", "softcap")  # options that are left to transformers' own function, unless 0


@contextmanager
def grouped_attention(device: torch.device) -> Iterator[None]:
    """
    On a CPU, let heads that share keys and values read them together, as if they were more tokens of one head.

    With a mask, transformers copies keys and values for each head (5.24: for several tokens), and torch's kernel (2.11
    to 2.13) takes several times as long for one token of a head in bfloat16 as for two. Packed as tokens, the heads
    avoid both. transformers packs single tokens with a mask itself (5.24).
    """
    before, _grouped.on = _grouped.on, device.type == "cpu"
    if _grouped.on:
        _install()
    try:
        yield
    finally:
        _grouped.on = before


def _install() -> None:
    if ALL_ATTENTION_FUNCTIONS[_NAME] is sdpa_attention_forward:  # neither installed before, nor the user's own
        AttentionInterface.register(_NAME, _Packing(sdpa_attention_forward))


class _Packing:
    """Packs heads before another attention function, where [`grouped_attention`] is on and it is worth it."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *given: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        """
        Attend as transformers does.

        Args:
            module (`torch.nn.Module`): The layer.
            query (`torch.Tensor` of shape `(batch, heads, q, head_dim)`): Of the tokens.
            key, value (`torch.Tensor` of shape `(batch, shared heads, keys, head_dim)`): What they may look at.
            attention_mask (`torch.Tensor` of shape `(batch or 1, heads or 1, q, keys)`, *optional*): Where they may.
            given, options (`Any`): Passed on.

        Returns:
            `tuple[torch.Tensor, Any]`: The output, `(batch, q, heads, head_dim)`, and what else the function returns.
        """
        is_special = bool(given) or any(torch.is_tensor(value) or value for value in map(options.get, _SPECIAL))
        if not _grouped.on or is_special or query.shape[0] != key.shape[0] or query.shape[1] == key.shape[1]:
            return self._attend(module, query, key, value, attention_mask, *given, **options)
        if query.shape[2] > 1 and attention_mask is None:  # a prompt, which has a faster path
            return self._attend(module, query, key, value, attention_mask, **options)
        attend = _attend_packed if query.shape[2] == 1 or query.shape[0] > 1 else _attend_shared
        return attend(query, key, value, attention_mask, options.get("scaling")), None


def _attend_shared(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """For several tokens of one row, reordering them would take longer than it saves."""
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).contiguous()


def _attend_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    heads, shared = query.shape[1], key.shape[1]
    packed = query.reshape(query.shape[0], shared, -1, query.shape[3])  # (batch, shared heads, group * q, head_dim)
    mask = mask if mask is None else _packed_mask(mask.expand(-1, -1, query.shape[2], -1), heads, shared)
    output = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    return output.reshape(query.shape[0], heads, query.shape[2], -1).transpose(1, 2).contiguous()


def _packed_mask(mask: torch.Tensor, heads: int, shared: int) -> torch.Tensor:
    if mask.shape[1] == heads:
        return mask.reshape(mask.shape[0], shared, -1, mask.shape[3])
    return mask.repeat(1, 1, heads // shared, 1)
