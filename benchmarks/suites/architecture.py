"""Llama-shaped models of a chosen size, with random weights: to be trained here, or to be timed as they are."""

import os
import re

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_osd.config import reason_of, shown
from hf_osd.errors import ConfigError

CONTEXT = 4096  # positions; the longest context measured and its answer fit in
MOST_HIDDEN, MOST_LAYERS = 2**16, 1024  # beyond any model there is


def read_shape(shape: str) -> tuple[int, int]:
    """
    Read a hidden size and a number of layers, as `"4096x32"`.

    Raises:
        ConfigError: The shape cannot be read, is larger than any model, or its hidden size cannot be split into heads.
    """
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", shape)
    hidden, layers = map(int, match.groups()) if match else (0, 0)
    if not 16 <= hidden <= MOST_HIDDEN or hidden % 16 or not 1 <= layers <= MOST_LAYERS:
        raise ConfigError(
            "a model's shape is HIDDENxLAYERS, such as '2048x16', with a hidden size in steps of 16 up to "
            f"{MOST_HIDDEN} and at most {MOST_LAYERS} layers, got {shown(shape)}"
        )
    return hidden, layers


def llama_config(shape: str, vocab_size: int, eos_token_id: int | None = None) -> LlamaConfig:
    """
    Return the configuration of a Llama with Llama 3's proportions.

    Args:
        shape (`str`): Hidden size and layers, as `"4096x32"`, which with 128,256 tokens is the 8B model's own.
        vocab_size (`int`): Tokens.
        eos_token_id (`int`, *optional*): What ends a text; without one, every answer has its full length.

    Raises:
        ConfigError: The shape cannot be read.
    """
    hidden, layers = read_shape(shape)
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
    """
    Return a model with random weights, made on the device that it will run on.

    Raises:
        ConfigError: The device has no room for it.
    """
    torch.manual_seed(seed)
    try:
        _check_room(config, device, dtype)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (RuntimeError, MemoryError) as error:  # torch has an error of its own for accelerators alone
        size = f"{config.hidden_size}x{config.num_hidden_layers} with {config.vocab_size} tokens"
        raise ConfigError(f"a model of shape {size} has no room on {device}: {reason_of(error)}") from error
    drawn: PreTrainedModel = model.eval()
    return drawn


def _check_room(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Compare with all memory there is: Linux promises more, and ends the process when it is used."""
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    with torch.device("meta"):
        needed = AutoModelForCausalLM.from_config(config).num_parameters() * dtype.itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise MemoryError(f"it needs {needed / 2**30:,.1f} GiB of {there / 2**30:,.1f}")
