"""The training copy of a draft: all of it in float32, or an adapter on a frozen copy; see `drafts/adapters.py`."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .._compat import attention_implementation
from ..drafts.adapters import add_adapter, carries_adapter, check_adapter, enable_adapter, merged, outermost
from ..drafts.sharing import copy_beside, in_float32
from ..errors import LearningError


class Student:
    """
    The copy of a draft that is trained; the live draft is only read.

    Without `peft_config` the copy is float32. Parameters that the draft has frozen stay so, unless all of them are. Of
    a draft that carries an adapter, that adapter alone is trained, and published under its own names.

    With `peft_config` a float32 adapter on the copy is trained (LoRA, https://arxiv.org/abs/2106.09685, and whatever
    else of peft can be merged). It is published merged, so the live draft keeps its modules and its speed. Where
    embedding and output layer share a weight, an adapter of the embedding changes both.

    What a draft shares with its target is read where it lies: it is neither copied, trained nor adapted.

    Args:
        draft ([`~transformers.PreTrainedModel`]):
            The live draft.
        peft_config (`peft.PeftConfig` or `Mapping[str, Any]`, *optional*):
            The adapter; see [`~hf_osd.drafts.adapters.add_adapter`]. Defaults to training everything.
        seed (`int`, defaults to 0):
            Seed of the adapter's weights.
        frozen (`Collection[str]`, *optional*):
            Parameters of the draft that are not to be trained; see [`~hf_osd.drafts.sharing.shared_with`].

    Attributes:
        model (`torch.nn.Module`): What the trainer trains.

    Raises:
        ConfigError: The adapter does not fit the draft, cannot be merged into it, or the draft has one already; or the
            one that it has is merged into it.
        MissingDependencyError: peft is not installed.
    """

    def __init__(
        self, draft: PreTrainedModel, peft_config: Any = None, seed: int = 0, frozen: Collection[str] = ()
    ) -> None:
        self._names = [name for name, _ in draft.named_parameters()]
        self._merges = peft_config is not None
        with torch.inference_mode(False):  # whoever calls may be in it
            base = _trainable_copy(draft, frozen)
            self.model: Any = add_adapter(base, peft_config, seed, frozen) if self._merges else _whole(base, frozen)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return what to publish, by the draft's names: the trained parameters, or an adapter merged in float32."""
        if not self._merges:
            return {name: weight.detach() for name, weight in self._trained()}
        return merged(self.model, self._names)

    def state(self, base: bool = False) -> dict[str, torch.Tensor]:
        """
        Return the trained parameters, by their names in `model`: what to go back to, and what to save.

        Args:
            base (`bool`, defaults to `False`): Whether to add the frozen weights under an adapter, which the live
                draft no longer has once a merged one was published to it.
        """
        return {name: weight.detach() for name, weight in (self._all() if base else self._trained())}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """
        Take an earlier state, with the base or without, in place: an optimiser of these parameters goes on working.

        Raises:
            LearningError: A parameter is missing, is unknown or has another shape; nothing has been changed.
        """
        known, needed = dict(self._all()), dict(self._trained())
        for name in needed:
            if name not in state:
                raise LearningError(f"the state of the training copy has no {name}")
        for name, value in state.items():
            if name not in known or known[name].shape != value.shape:
                expected = tuple(known[name].shape) if name in known else "no such parameter"
                raise LearningError(f"{name} has shape {tuple(value.shape)}, the training copy has {expected}")
        for name, value in state.items():
            known[name].copy_(value)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)

    def _all(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters, and those of the modules that they adapt."""
        adapted = outermost(self.model) if self._merges else ()
        inside = {id(weight) for _, module in adapted for weight in module.parameters()}
        for name, weight in self.model.named_parameters():
            if weight.requires_grad or id(weight) in inside:
                yield name, weight


def _trainable_copy(draft: PreTrainedModel, frozen: Collection[str]) -> Any:
    model = copy_beside(draft, frozen)
    if attention_implementation(draft) == "flex_attention" and draft.device.type == "cpu":
        model.set_attn_implementation("sdpa")  # flex attention has no backward pass there (torch 2.13)
    return model


def _whole(model: Any, frozen: Collection[str]) -> Any:
    """Turn a copy to float32, and have its adapter trained if it carries one, else all that is not frozen."""
    has_adapter = carries_adapter(model)
    if has_adapter:
        check_adapter(model)
    in_float32(model, frozen)
    if has_adapter:
        enable_adapter(model)
    own = [weight for name, weight in model.named_parameters() if name not in frozen]
    is_idle = not any(weight.requires_grad for weight in own)  # for serving, not on purpose
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen and (weight.requires_grad or (is_idle and not has_adapter)))
    return model
