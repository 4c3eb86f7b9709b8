"""Families that carry a state from token to token, in all of their layers or in some."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .building import LLAMA_LIKE, SHARED, build, configure
from .cases import Case, family

_MAMBA = dict(hidden_size=32, num_hidden_layers=2, state_size=8, **SHARED)
_MAMBA2 = dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=8)
_MAMBA2_LAYERS = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
_DELTA = dict(
    head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
_EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

# Title -> prefix of the configuration's class, base settings, and what differs from them.
_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "Mamba": ("Mamba", _MAMBA, {}),
    "Mamba 2": ("Mamba2", _MAMBA, _MAMBA2),
    "Falcon-Mamba": ("FalconMamba", _MAMBA, {}),
    "RWKV": (
        "Rwkv", SHARED,
        dict(hidden_size=32, attention_hidden_size=32, intermediate_size=48, num_hidden_layers=2, context_length=256),
    ),
    "xLSTM": ("xLSTM", SHARED, dict(hidden_size=128, num_hidden_layers=2, num_heads=4)),
    "RecurrentGemma": (
        "RecurrentGemma", LLAMA_LIKE,
        dict(num_hidden_layers=3, lru_width=32, attention_window_size=8, w_init_variance_scale=1.0),
    ),
    "Jamba": (
        "Jamba", LLAMA_LIKE,
        dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
             expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False, **_EXPERTS),
    ),
    "Bamba": ("Bamba", LLAMA_LIKE, dict(attn_layer_indices=[1], **_MAMBA2_LAYERS)),
    "Zamba 2": (
        "Zamba2", LLAMA_LIKE,
        dict(num_key_value_heads=4, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8,
             n_mamba_heads=8, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1, use_mamba_kernels=False,
             adapter_rank=4),
    ),
    "Falcon-H1": ("FalconH1", LLAMA_LIKE, dict(mamba_d_ssm=64, **_MAMBA2_LAYERS)),
    "GraniteMoeHybrid": (
        "GraniteMoeHybrid", LLAMA_LIKE,
        dict(layer_types=["mamba", "attention"], mamba_expand=2, shared_intermediate_size=32, **_EXPERTS,
             **_MAMBA2_LAYERS),
    ),
    "Nemotron-H": (
        "NemotronH", LLAMA_LIKE,
        dict(layers_block_type=["linear_attention", "full_attention", "mlp"], mamba_num_heads=8, mamba_head_dim=8,
             n_groups=1, ssm_state_size=8, chunk_size=8, head_dim=8),
    ),
    "Qwen3-Next": ("Qwen3Next", LLAMA_LIKE, dict(shared_expert_intermediate_size=16, **_DELTA, **_EXPERTS)),
    "Qwen3.5": ("Qwen3_5Text", LLAMA_LIKE, _DELTA),
    "Kimi Linear": (
        "KimiLinear", LLAMA_LIKE,
        dict(num_key_value_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
             layer_types=["linear_attention", "full_attention"], linear_num_heads=4, linear_head_dim=8,
             num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ),
    "OLMo Hybrid": ("OlmoHybrid", LLAMA_LIKE, _DELTA),
    "MiniMax": (
        "MiniMax", LLAMA_LIKE,
        dict(head_dim=8, layer_types=["linear_attention", "full_attention"], block_size=8, **_EXPERTS),
    ),
    "LFM2": ("Lfm2", LLAMA_LIKE, dict(layer_types=["conv", "full_attention"], conv_L_cache=3)),
}  # fmt: skip


def _case(name: str, base: Mapping[str, Any], settings: Mapping[str, Any]) -> Case:
    return family(lambda seed: build(configure(name, base, **settings), seed))


ROWS: Mapping[str, Callable[[], Case]] = {title: partial(_case, *about) for title, about in _FAMILIES.items()}
