"""Small real models for the tests: random weights, and drafts that are wrong in every way we could think of."""

import copy
import inspect
import os
from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3Config,
    RwkvConfig,
)
from transformers.masking_utils import create_chunked_causal_mask

DEVICE = os.environ.get("HF_OSD_TEST_DEVICE", "cpu")  # of the models and the prompts below
VOCAB = 61
CONTEXT = 128
ARCHITECTURES = ("llama", "qwen3", "gpt2", "neox", "gemma")

# Up to 5.17, transformers' own function makes no masks of chunks for `generate`.
_TAKES_CHUNKS = "block_sequence_ids" in inspect.signature(create_chunked_causal_mask).parameters
RECURRENT = ("mamba2", "qwen3.5", "lfm2")
WINDOWED = ("mistral", "gemma3", *["llama4"][: int(_TAKES_CHUNKS)])

_SHARED = dict(vocab_size=VOCAB, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None)
_LLAMA_LIKE = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, max_position_embeddings=CONTEXT, **_SHARED
)
_CONFIGS: dict[str, Callable[..., object]] = {
    "llama": lambda **k: LlamaConfig(num_key_value_heads=2, **{**_LLAMA_LIKE, **k}),
    "qwen3": lambda **k: Qwen3Config(num_key_value_heads=2, head_dim=8, **{**_LLAMA_LIKE, **k}),
    "gpt2": lambda num_hidden_layers, **k: GPT2Config(
        **{**_SHARED, "n_embd": 32, "n_head": 4, "n_positions": CONTEXT, "n_layer": num_hidden_layers, **k}
    ),
    "neox": lambda **k: GPTNeoXConfig(**{**_LLAMA_LIKE, **k}),
    "gemma": lambda **k: GemmaConfig(num_key_value_heads=1, head_dim=8, **{**_LLAMA_LIKE, **k}),
    "mistral": lambda **k: MistralConfig(num_key_value_heads=2, **{**_LLAMA_LIKE, "sliding_window": 8, **k}),
    "gemma3": lambda **k: Gemma3TextConfig(
        num_key_value_heads=1, head_dim=8, **{**_LLAMA_LIKE, "sliding_window": 8, **k}
    ),
    "gemma3n": lambda num_hidden_layers, **k: Gemma3nTextConfig(
        num_key_value_heads=1,
        head_dim=8,
        num_hidden_layers=2 * num_hidden_layers,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 2 * num_hidden_layers,
        layer_types=["sliding_attention", "full_attention"] * num_hidden_layers,
        num_kv_shared_layers=2,
        **{**_LLAMA_LIKE, "sliding_window": 8, **k},
    ),
    "llama4": lambda **k: Llama4TextConfig(
        num_key_value_heads=2,
        head_dim=8,
        no_rope_layers=[1, 0],
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        **{**_LLAMA_LIKE, "attention_chunk_size": 8, **k},
    ),
    "bloom": lambda num_hidden_layers, **k: BloomConfig(
        **{**_SHARED, "hidden_size": 32, "n_head": 4, "n_layer": num_hidden_layers, **k}
    ),
    "neo": lambda num_hidden_layers, **k: GPTNeoConfig(
        **{
            **_SHARED,
            "hidden_size": 32,
            "num_heads": 4,
            "max_position_embeddings": CONTEXT,
            "num_layers": num_hidden_layers,
            "attention_types": [[["global", "local"], num_hidden_layers // 2]],
            "window_size": 16,
            **k,
        }
    ),
    "gpt1": lambda num_hidden_layers, **k: OpenAIGPTConfig(
        **{**_SHARED, "n_embd": 32, "n_head": 4, "n_positions": CONTEXT, "n_layer": num_hidden_layers, **k}
    ),
    "mamba": lambda **k: MambaConfig(hidden_size=32, **{**_SHARED, **k}),
    "mamba2": lambda **k: Mamba2Config(
        hidden_size=32, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8, **{**_SHARED, **k}
    ),
    "qwen3.5": lambda num_hidden_layers, **k: Qwen3_5TextConfig(
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=num_hidden_layers,
        layer_types=["linear_attention", "full_attention"] * (num_hidden_layers // 2),
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **{**_LLAMA_LIKE, **k},
    ),
    "lfm2": lambda num_hidden_layers, **k: Lfm2Config(
        num_key_value_heads=2,
        num_hidden_layers=num_hidden_layers,
        layer_types=["conv", "full_attention"] * (num_hidden_layers // 2),
        **{**_LLAMA_LIKE, **k},
    ),
    "rwkv": lambda **k: RwkvConfig(
        hidden_size=32, attention_hidden_size=32, intermediate_size=48, context_length=CONTEXT, **{**_SHARED, **k}
    ),
}


def tiny_model(
    kind: str = "llama", seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float64, **overrides: object
) -> PreTrainedModel:
    """A model of a few thousand random weights; in float64, so that ties between logits are out of the question."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = _CONFIGS[kind](num_hidden_layers=layers, **overrides)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if model.device.type != "meta":
        model = model.to(DEVICE)
    torch.set_rng_state(state)
    return model


def wrong_draft(target: PreTrainedModel, how: str) -> PreTrainedModel:
    """A draft for a target: another model, or the target with its choices shifted, inverted, kept or blurred."""
    if how == "random":
        return tiny_model("llama", seed=99, layers=1, vocab_size=target.config.vocab_size)
    draft = copy.deepcopy(target)
    if how == "shifted":
        draft.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits.roll(1, -1))
    elif how == "adversarial":
        draft.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: -logits)
    elif how == "noisy":
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in draft.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.04 * noise.to(parameter.device))
    else:
        assert how == "perfect", how
    return draft


DRAFTS = ("random", "shifted", "adversarial", "noisy", "perfect")


def prompts(batch: int, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded prompts of different lengths; the first row is full."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, batch):
        padding = (3 * row) % length
        input_ids[row, :padding] = 0
        attention_mask[row, :padding] = 0
    return {"input_ids": input_ids.to(DEVICE), "attention_mask": attention_mask.to(DEVICE)}


def add_adapter(draft: PreTrainedModel, config: object, name: str | None = None) -> None:
    """By transformers' own way, which wants a newer peft than there is from one of its releases on (5.24)."""
    try:
        draft.add_adapter(config, name)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers cannot add adapters here: {error}")


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.ended += 1
