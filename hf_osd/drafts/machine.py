"""Describes what the time of a forward depends on besides its shape: machine, versions, model."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .._compat import attention_implementation, execution_device

_NAMES = (
    "_name_or_path",
    "name_or_path",
    "transformers_version",
)  # fields that do not change the speed


def processor_name() -> str:
    """Return the processor's name: Linux says it in a file, other systems to `platform`."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def describe_machine(device: torch.device) -> dict[str, Any]:
    """
    Say what any latency depends on here, as plain data.

    Args:
        device (`torch.device`): Where the work is done.

    Returns:
        `dict[str, Any]`: Device, processor, threads, and versions of torch and transformers.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """
    Say what the latency of a model depends on here, as plain data.

    Args:
        model (`PreTrainedModel`): The model, where it is going to run.

    Returns:
        `dict[str, Any]`: Class, parameters, a digest of the configuration, dtype, attention implementation, and all of
        [`describe_machine`].
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NAMES}
    return {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": digest(config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_implementation(model),
        **describe_machine(execution_device(model)),
    }


def digest(values: Any) -> str:
    """Return 16 hexadecimal digits that stand for plain data, whatever the order of its keys."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator's queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
