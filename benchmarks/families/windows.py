"""Families in which a token sees a window, a chunk or a selection of the earlier ones."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .attention import LATENT
from .building import LLAMA_LIKE, SHARED, build, configure
from .cases import Case, family

WITHIN, PAST = 64, 8  # tokens of a window that holds prompt and output, and of one that does not

_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_HEADS = dict(head_dim=8, query_pre_attn_scalar=8)
_TURNS = dict(layer_types=["sliding_attention", "full_attention"])
_GEMMA3N = dict(
    head_dim=8, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
    vocab_size_per_layer_input=LLAMA_LIKE["vocab_size"], hidden_size_per_layer_input=8, laurel_rank=4,
    activation_sparsity_pattern=[0.0] * 4, intermediate_size=[48] * 4,
)  # fmt: skip
_GEMMA4 = dict(
    head_dim=8, global_head_dim=8, vocab_size_per_layer_input=LLAMA_LIKE["vocab_size"], hidden_size_per_layer_input=8,
    **_TURNS,
)  # fmt: skip
_LLAMA4 = dict(
    head_dim=8, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48, interleave_moe_layer_step=1,
    no_rope_layers=[1, 0],
)  # fmt: skip
_GPT_NEO = dict(
    hidden_size=32, num_heads=4, num_layers=2, attention_types=[[["global", "local"], 1]],
    max_position_embeddings=256,
)  # fmt: skip
_SWITCHED_ON = dict(use_sliding_window=True, max_window_layers=1)

# Title -> prefix of the configuration's class, base settings, what differs from them, the setting of the window.
_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any], str]] = {
    "Mistral": ("Mistral", LLAMA_LIKE, {}, "sliding_window"),
    "Qwen2 with windows": ("Qwen2", LLAMA_LIKE, _SWITCHED_ON, "sliding_window"),
    "Phi-3": ("Phi3", LLAMA_LIKE, {}, "sliding_window"),
    "Starcoder2": ("Starcoder2", LLAMA_LIKE, {}, "sliding_window"),
    "Gemma 2": ("Gemma2", LLAMA_LIKE, _HEADS, "sliding_window"),
    "Gemma 3": ("Gemma3Text", LLAMA_LIKE, {**_HEADS, **_TURNS}, "sliding_window"),
    "Gemma 3n": ("Gemma3nText", LLAMA_LIKE, {**_GEMMA3N, "num_kv_shared_layers": 0}, "sliding_window"),
    "Gemma 3n with shared layers": (
        "Gemma3nText", LLAMA_LIKE, {**_GEMMA3N, "num_kv_shared_layers": 2}, "sliding_window",
    ),
    "Gemma 4": ("Gemma4Text", LLAMA_LIKE, _GEMMA4, "sliding_window"),
    "GPT-OSS": ("GptOss", LLAMA_LIKE, dict(head_dim=8, **_EXPERTS), "sliding_window"),
    "Cohere 2": ("Cohere2", LLAMA_LIKE, _TURNS, "sliding_window"),
    "OLMo 3": ("Olmo3", LLAMA_LIKE, _TURNS, "sliding_window"),
    "EXAONE 4": ("Exaone4", LLAMA_LIKE, dict(sliding_window_pattern=2, **_TURNS), "sliding_window"),
    "Llama 4": ("Llama4Text", LLAMA_LIKE, _LLAMA4, "attention_chunk_size"),
    "GPT-Neo": ("GPTNeo", SHARED, _GPT_NEO, "window_size"),
}  # fmt: skip

# An index selects as many of the earlier tokens as a window would hold.
_SPARSE = {"DeepSeek-V3.2": "DeepseekV32", "GLM-5": "GlmMoeDsa"}


def _windowed(size: int) -> Mapping[str, Callable[[], Case]]:
    return {title: partial(_case, *about, size) for title, about in _FAMILIES.items()}


def _case(name: str, base: Mapping[str, Any], settings: Mapping[str, Any], window: str, size: int) -> Case:
    return family(lambda seed: build(configure(name, base, **settings, **{window: size}), seed))


def _selected(size: int) -> Mapping[str, Callable[[], Case]]:
    return {title: partial(_sparse, name, size) for title, name in _SPARSE.items()}


def _sparse(name: str, size: int) -> Case:
    settings = dict(LATENT, index_topk=size, index_n_heads=2, index_head_dim=16)
    return family(lambda seed: build(configure(name, **settings), seed), tries=8)


WITHIN_WINDOW, PAST_WINDOW = _windowed(WITHIN), _windowed(PAST)
WITHIN_SELECTION, PAST_SELECTION = _selected(WITHIN), _selected(PAST)
