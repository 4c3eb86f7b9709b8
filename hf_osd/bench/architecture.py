"""Llama-shaped models of a chosen size, with random weights: to be trained here, or to be timed as they are."""

import re

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ..errors import ConfigError

CONTEXT = 4096  # positions; the longest context measured and its answer fit in


def llama_config(shape: str, vocab_size: int, eos_token_id: int | None = None) -> LlamaConfig:
    """
    Return the configuration of a Llama with Llama 3's proportions.

    Args:
        shape (`str`): Hidden size and layers, as `"4096x32"`, which with 128,256 tokens is the 8B model's own.
        vocab_size (`int`): Tokens.
        eos_token_id (`int`, *optional*): What ends a text; without one, every answer has its full length.

    Raises:
        ConfigError: The shape cannot be read, or its hidden size cannot be split into heads.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", shape)
    hidden, layers = map(int, match.groups()) if match else (0, 0)
    if hidden < 16 or hidden % 16 or layers < 1:
        raise ConfigError(
            f"a model's shape is HIDDENxLAYERS, such as '2048x16', with a hidden size in steps of 16, got {shape!r}"
        )
    head = next(size for size in (128, 64, 32, 16, 8) if hidden % size == 0 and hidden // size >= 2)
    heads = hidden // head
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=hidden < 4096,
        eos_token_id=eos_token_id,
    )


def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Return a model with random weights, made on the device that it will run on."""
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    drawn: PreTrainedModel = model.eval()
    return drawn
