"""The state of an optimiser in forms that safetensors and JSON hold, and back."""

from collections.abc import Mapping
from typing import Any

import torch


def flat_moments(state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return tensors and numbers of an optimiser's state, named `"PARAMETER.KEY"`; copies, on the CPU."""
    flat = {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in flat.items()
        if isinstance(value, torch.Tensor)
    }
    return tensors, {name: value for name, value in flat.items() if isinstance(value, int | float)}


def by_parameter(tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]) -> dict[int, dict[str, Any]]:
    """Undo `flat_moments`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **numbers}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return state
