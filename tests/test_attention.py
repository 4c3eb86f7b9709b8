"""Attention of heads that share keys, packed as tokens of one head."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_osd.serving.attention import _Packing, grouped_attention

CPU = torch.device("cpu")


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def attended(attend, query, key, mask, **options):
    """What a layer of transformers gets."""
    layer = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
    return attend(layer, query, key, key.flip(-1), mask, scaling=0.3, **options)[0]


@pytest.mark.parametrize("heads_masked", [1, 6])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_packed_heads_attend_as_before(rows, tokens, heads_masked):
    """Catches heads that read another head's keys, or masks and outputs that are put in another order."""
    query, key = drawn(rows, 6, tokens, 8), drawn(rows, 2, 11, 8)
    mask = drawn(rows, heads_masked, tokens, 11) > -0.5
    mask[..., 0] = True
    with grouped_attention(CPU):
        packed = attended(ALL_ATTENTION_FUNCTIONS["sdpa"], query, key, mask)
    expected = attended(sdpa_attention_forward, query, key, mask)
    assert packed.shape == (rows, tokens, 6, 8)
    torch.testing.assert_close(packed, expected)


def test_a_mask_that_is_broadcast():
    """Catches one mask for all tokens or rows that is not stretched as transformers does."""
    query, key = drawn(3, 4, 5, 8), drawn(3, 2, 7, 8)
    for shape in ((1, 1, 5, 7), (3, 1, 1, 7), (1, 4, 1, 7)):
        mask = drawn(*shape) > -0.5
        mask[..., 0] = True
        with grouped_attention(CPU):
            packed = attended(ALL_ATTENTION_FUNCTIONS["sdpa"], query, key, mask)
        torch.testing.assert_close(packed, attended(sdpa_attention_forward, query, key, mask))


def test_a_single_token_without_a_mask_sees_everything():
    """Catches heads that are packed as tokens and then hide keys from one another, as tokens do."""
    query, key = drawn(2, 4, 1, 8), drawn(2, 2, 5, 8)
    with grouped_attention(CPU):
        packed = attended(ALL_ATTENTION_FUNCTIONS["sdpa"], query, key, None, is_causal=True)
    torch.testing.assert_close(packed, attended(sdpa_attention_forward, query, key, None))


def test_what_is_not_packed():
    """Catches packing where it does not apply: elsewhere, prompts without a mask, heads of their own, biases."""
    seen = []

    def attend(layer, query, *given, **options):
        seen.append(query.shape[1])
        return query, None

    packing, mask = _Packing(attend), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    query, key = drawn(1, 4, 3, 8), drawn(1, 2, 3, 8)
    attended(packing, query, key, mask)
    with grouped_attention(torch.device("meta")):
        attended(packing, query, key, mask)
    with grouped_attention(CPU):
        attended(packing, query, key, None)
        attended(packing, query, query, mask)
        attended(packing, query, key, mask, position_bias=mask.float())
    assert seen == [4] * 5


def test_it_is_installed_once_and_never_over_the_users_own():
    """Catches a wrapper around a wrapper with each call, and a function of the user's that is passed over."""
    for _ in range(2):
        with grouped_attention(CPU):
            pass
    packing = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert packing._attend is sdpa_attention_forward

    def own(*given, **options):
        raise AssertionError

    AttentionInterface.register("sdpa", own)
    try:
        with grouped_attention(CPU):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        AttentionInterface.register("sdpa", packing)
