"""The forward pass of a batch of recorded requests, for training and for judging alike."""

import inspect
from typing import Any

import torch
from torch import nn


def forward_parameters(model: nn.Module) -> set[str]:
    """Return what a model's forward takes; to be asked for before anybody replaces that method."""
    unwrap = getattr(model, "get_base_model", None)  # of a PEFT model
    return set(inspect.signature((unwrap() if callable(unwrap) else model).forward).parameters)


def forward_options(inputs: dict[str, torch.Tensor], parameters: set[str]) -> dict[str, Any]:
    """
    Return the arguments of a forward pass over a batch.

    Args:
        inputs (`dict[str, torch.Tensor]`): A batch of [`ObservationCollator`].
        parameters (`set[str]`): What the model's forward takes.
    """
    options: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if "position_ids" in parameters:  # models without it count from the attention mask
        options["position_ids"] = inputs["position_ids"]
    if "logits_to_keep" in parameters:
        options["logits_to_keep"] = inputs["learn_mask"].shape[1]
    return {**options, "use_cache": False}


def verified_logits(model: nn.Module, inputs: dict[str, torch.Tensor], parameters: set[str]) -> torch.Tensor:
    """
    Run a model over a batch.

    Args:
        model (`torch.nn.Module`): The model.
        inputs (`dict[str, torch.Tensor]`): A batch of [`ObservationCollator`], on the model's device.
        parameters (`set[str]`): What its forward takes.

    Returns:
        `torch.FloatTensor` of shape `(batch, verified, vocab)`: Logits where the recorded target said something.
    """
    logits: torch.Tensor = model(**forward_options(inputs, parameters)).logits
    return logits[:, -inputs["learn_mask"].shape[1] :]


def longest_request(model: nn.Module, max_length: int) -> int:
    """Return how many tokens of a request both the settings and the model allow."""
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(max_length, positions) if isinstance(positions, int) and positions > 0 else max_length
