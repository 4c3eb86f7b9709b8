"""Decoder-only families in which every token sees all earlier ones."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .building import GPT2_LIKE, LLAMA_LIKE, SHARED, build, configure
from .cases import Case, family

_EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_GROUPED = dict(n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, **_EXPERTS)
LATENT = dict(
    num_key_value_heads=4, head_dim=8, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=8, **_GROUPED,
)  # fmt: skip
_MAMBA_NEVER_USED = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_expand=2)

# Title -> prefix of the configuration's class, base settings, and what differs from them.
_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "Llama": ("Llama", LLAMA_LIKE, {}),
    "Mistral without a window": ("Mistral", LLAMA_LIKE, dict(sliding_window=None)),
    "Mixtral": ("Mixtral", LLAMA_LIKE, _EXPERTS),
    "Qwen2": ("Qwen2", LLAMA_LIKE, {}),
    "Qwen2-MoE": ("Qwen2Moe", LLAMA_LIKE, dict(shared_expert_intermediate_size=16, **_EXPERTS)),
    "Qwen3": ("Qwen3", LLAMA_LIKE, dict(head_dim=8)),
    "Qwen3-MoE": ("Qwen3Moe", LLAMA_LIKE, dict(head_dim=8, **_EXPERTS)),
    "DeepSeek-V2": ("DeepseekV2", LLAMA_LIKE, LATENT),
    "DeepSeek-V3": ("DeepseekV3", LLAMA_LIKE, LATENT),
    "Gemma": ("Gemma", LLAMA_LIKE, dict(head_dim=8)),
    "Phi": ("Phi", LLAMA_LIKE, {}),
    "Phi-3 without a window": ("Phi3", LLAMA_LIKE, dict(sliding_window=None)),
    "OLMo": ("Olmo", LLAMA_LIKE, {}),
    "OLMo 2": ("Olmo2", LLAMA_LIKE, {}),
    "OLMoE": ("Olmoe", LLAMA_LIKE, _EXPERTS),
    "Granite": ("Granite", LLAMA_LIKE, {}),
    "GraniteMoE": ("GraniteMoe", LLAMA_LIKE, _EXPERTS),
    "GraniteMoeHybrid of attention only": (
        "GraniteMoeHybrid", LLAMA_LIKE,
        dict(layer_types=["attention"] * 2, shared_intermediate_size=32, **_EXPERTS, **_MAMBA_NEVER_USED),
    ),
    "Cohere": ("Cohere", LLAMA_LIKE, {}),
    "Falcon": (
        "Falcon", LLAMA_LIKE,
        dict(new_decoder_architecture=True, num_kv_heads=2, alibi=False, parallel_attn=True, bias=False,
             ffn_hidden_size=48),
    ),
    "Falcon with ALiBi": (
        "Falcon", LLAMA_LIKE,
        dict(new_decoder_architecture=False, alibi=True, multi_query=False, parallel_attn=False),
    ),
    "GLM-4": ("Glm4", LLAMA_LIKE, dict(head_dim=8)),
    "GLM-4-MoE": ("Glm4Moe", LLAMA_LIKE, dict(head_dim=8, **_GROUPED)),
    "SmolLM3": ("SmolLM3", LLAMA_LIKE, {}),
    "Seed-OSS": ("SeedOss", LLAMA_LIKE, dict(head_dim=8)),
    "ERNIE 4.5": ("Ernie4_5", LLAMA_LIKE, dict(head_dim=8)),
    "Hunyuan": ("HunYuanDenseV1", LLAMA_LIKE, dict(head_dim=8)),
    "Apertus": ("Apertus", LLAMA_LIKE, {}),
    "Nemotron": ("Nemotron", LLAMA_LIKE, {}),
    "MiniMax-M2": ("MiniMaxM2", LLAMA_LIKE, dict(head_dim=8, rotary_dim=8, **_EXPERTS)),
    "StableLM": ("StableLm", LLAMA_LIKE, {}),
    "Starcoder2 without a window": ("Starcoder2", LLAMA_LIKE, dict(sliding_window=None)),
    "BitNet": ("BitNet", LLAMA_LIKE, {}),
    "GPT": ("OpenAIGPT", GPT2_LIKE, {}),
    "GPT-2": ("GPT2", GPT2_LIKE, {}),
    "GPT-J": ("GPTJ", GPT2_LIKE, dict(rotary_dim=4)),
    "GPT-NeoX": ("GPTNeoX", LLAMA_LIKE, {}),
    "GPTBigCode": ("GPTBigCode", GPT2_LIKE, {}),
    "CodeGen": ("CodeGen", dict(GPT2_LIKE, n_ctx=256), dict(rotary_dim=4)),
    "BioGPT": ("BioGpt", LLAMA_LIKE, {}),
    "XGLM": (
        "XGLM", SHARED,
        dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=256),
    ),
    "OPT": (
        "OPT", SHARED,
        dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
             word_embed_proj_dim=32),
    ),
    "BLOOM": ("Bloom", SHARED, dict(hidden_size=32, n_head=4, n_layer=2)),
    "MPT": ("Mpt", SHARED, dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=256, expansion_ratio=2)),
}  # fmt: skip


def _case(name: str, base: Mapping[str, Any], settings: Mapping[str, Any]) -> Case:
    return family(lambda seed: build(configure(name, base, **settings), seed))


ROWS: Mapping[str, Callable[[], Case]] = {title: partial(_case, *about) for title, about in _FAMILIES.items()}
