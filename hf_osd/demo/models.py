"""The models of a run, and prompts turned into their inputs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError, InputError, UnsupportedModelError
from .prompts import Prompt

EMBEDDED_PAIR = Path(__file__).parent / "pair"

Inputs = dict[str, torch.Tensor]
"""`input_ids` and `attention_mask`, each of shape `(1, prompt)`."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A target, the draft that starts the run, and the tokenizer they share."""

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_pair(target: str | None, assistant: str | None, device: str = "auto", dtype: str = "auto") -> Pair:
    """
    Load a target and its draft.

    Args:
        target (`str`, *optional*): Hub id or folder; with `assistant` left out too, the embedded pair is loaded.
        assistant (`str`, *optional*): Hub id or folder of the draft.
        device (`str`, defaults to `"auto"`): A torch device; `"auto"` takes an accelerator where there is one.
        dtype (`str`, defaults to `"auto"`):
            A torch dtype by name. `"auto"` is that of the checkpoint, but float32 on the CPU, where bf16 is slow.

    Raises:
        ConfigError: Only one of the two models is given, or the device or dtype has no meaning.
        UnsupportedModelError: A model cannot be loaded.
    """
    if (target is None) != (assistant is None):
        raise ConfigError("target and assistant are a pair: give both, or neither for the embedded pair")
    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    names = (target or str(EMBEDDED_PAIR / "target"), assistant or str(EMBEDDED_PAIR / "draft"))
    models = [_load(AutoModelForCausalLM, name, dtype=kind).to(where).eval() for name in names]
    return Pair(target=models[0], draft=models[1], tokenizer=_load(AutoTokenizer, names[0]))


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; `"auto"` is the accelerator where there is one, else the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {name!r}") from error


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Return the dtype of that name, or `"auto"` for that of the checkpoint."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"dtype must be 'auto' or a floating torch dtype such as 'bfloat16', got {name!r}")
    return kind


def _load(factory: Any, name: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(f"cannot load {name!r}: {reason}") from error


def encode_prompts(pair: Pair, prompts: Iterable[Prompt], max_new_tokens: int) -> list[Inputs]:
    """
    Turn prompts into inputs, by the tokenizer's chat template where it has one.

    Prompts that leave no room for `max_new_tokens` in the context of target or draft are left out: contenders that
    stop at different lengths could not be compared.

    Raises:
        InputError: No prompt fits.
    """
    room = context_of(pair) - max_new_tokens
    encoded = [_to_device(_encode(pair.tokenizer, prompt), pair.target.device) for prompt in prompts]
    if fitting := [inputs for inputs in encoded if 0 < inputs["input_ids"].shape[1] <= room]:
        return fitting
    raise InputError(f"none of {len(encoded)} prompts fits into the context with max_new_tokens={max_new_tokens}")


def context_of(pair: Pair) -> int:
    """Return the shorter of the two models' contexts."""
    return min(_lengths(pair.target), _lengths(pair.draft))


def _lengths(model: PreTrainedModel) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def _encode(tokenizer: Any, prompt: Prompt) -> Any:
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    text = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
    return tokenizer(text, return_tensors="pt")


def _to_device(encoding: Any, device: torch.device) -> Inputs:
    return {name: encoding[name].to(device) for name in ("input_ids", "attention_mask")}


def generate_options(pair: Pair, max_new_tokens: int, *, sample: bool = False) -> dict[str, Any]:
    """Return what every contender's `generate` receives."""
    pad = pair.tokenizer.pad_token_id
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "pad_token_id": pair.tokenizer.eos_token_id if pad is None else pad,
    }
    if not sample:  # a checkpoint's own sampling settings would each raise a warning
        options |= {"temperature": None, "top_p": None, "top_k": None}
    return options
