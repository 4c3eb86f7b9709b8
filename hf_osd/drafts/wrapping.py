"""
Unwraps models: finds the transformers model inside of a PEFT model, a compiled one, or both.

Not covered: wrappers that spread a model over devices or processes; they are refused by name.
"""

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import HfOsdError, ModelTypeError, UnsupportedModelError

# Adapters of peft that work in the wrapper's own `forward`, besides those of prompt learning.
_OUTSIDE = ("POLY", "XLORA")
# Bases of models whose weights are spread over processes in place (`fully_shard` of torch).
_SHARDED = ("FSDPModule", "FullyShardedDataParallel")


def unwrap(model: Any) -> PreTrainedModel:
    """
    Return the transformers model that a draft consists of.

    Args:
        model (`PreTrainedModel`, `peft.PeftModel` or the result of `torch.compile`):
            The draft. The base of a PEFT model carries its adapter layers, so nothing is lost; what `torch.compile`
            returned serves uncompiled, since serving captures its own graphs.

    Returns:
        [`~transformers.PreTrainedModel`]: The model itself; no copy.

    Raises:
        UnsupportedModelError: Another wrapper, such as `DistributedDataParallel`, or an adapter that works outside of
            the model, such as a soft prompt.
        ModelTypeError: No model at all. A `TypeError`, too.
    """
    if isinstance(model, PreTrainedModel):
        _check_whole(model)
        return model
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"the draft must be a transformers model, got {type(model).__name__}")
    if is_peft(model):
        _check_adapters(model)
        base: Any = model.base_model
        return unwrap(base.model)
    compiled = getattr(model, "_orig_mod", None)  # set by torch.compile, whose class takes seconds to import
    if isinstance(compiled, nn.Module):
        return unwrap(compiled)
    raise UnsupportedModelError(
        f"the draft must be a transformers model, got {type(model).__name__}{held_model_hint(model)}"
    )


def is_peft(model: nn.Module) -> bool:
    """Whether a model is wrapped by peft."""
    peft: Any = sys.modules.get("peft")  # without an import of peft there is no such model
    return peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel)


def _check_adapters(model: Any) -> None:
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning or kind in _OUTSIDE:
            raise UnsupportedModelError(
                f"the draft's adapter {name!r} is a {kind}, which works outside of the model and cannot draft: pass "
                "the model without it, get_base_model(), or use an adapter of its layers, such as LoRA"
            )


def _check_whole(model: PreTrainedModel) -> None:
    if any(base.__name__ in _SHARDED for base in type(model).__mro__):
        raise UnsupportedModelError(
            f"the draft is a {type(model).__name__}, whose weights are spread over processes: pass one that this "
            "process holds whole"
        )


def held_model_hint(model: Any) -> str:
    """Say under which name a wrapper holds a model that can be passed instead."""
    for name, child in getattr(model, "named_children", list)():
        try:
            unwrap(child)
        except HfOsdError:
            continue
        return f", which wraps one: pass model.{name}"
    return ""
