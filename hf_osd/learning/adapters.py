"""Adapters of peft that a draft carries already: whether they can be trained, and a copy in which they are in use."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import ConfigError


def adapter_kinds() -> tuple[type[Any], ...]:
    """Layers with an adapter, and modules of which peft trains a copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, adapter_kinds()))


def carries_adapter(model: nn.Module) -> bool:
    """Whether a model has adapters in its layers; peft (0.18) leaves its config behind where it takes them out."""
    return hasattr(model, "peft_config") and any(True for _ in _adapted(model))


def check_adapter(draft: nn.Module) -> None:
    """
    Refuse an adapter that is merged into the draft: it has no part in what the draft computes, so it cannot learn.

    Args:
        draft ([`~transformers.PreTrainedModel`]): A draft that carries an adapter.

    Raises:
        ConfigError: Names a module.
    """
    for name, module in _adapted(draft):
        if getattr(module, "merged", False):
            raise ConfigError(
                f"the draft's adapter is merged into {name}, where it cannot learn: unmerge_adapter() before, or "
                "merge_and_unload() and pass the result"
            )


def enable_adapter(model: Any) -> None:
    """
    Put the active adapters of a copy in use, whatever the draft does at this moment: a request may have disabled them.

    Args:
        model ([`~transformers.PreTrainedModel`]): The copy. Where nothing in it is trainable, as in a draft loaded for
            inference, its active adapters are.
    """
    is_idle = not any(weight.requires_grad for weight in model.parameters())
    for _, module in _adapted(model):
        if module.disable_adapters:
            module.enable_adapters(True)
        elif is_idle:
            module.set_adapter(module.active_adapters)
