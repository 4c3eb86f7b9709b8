"""Which layers of a target make a draft: those without which it says something else."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .._compat import execution_device
from ..config import shown
from ..errors import InputError
from ..records import Observation
from .likeness import likeness
from .states import layers_of


class Depth:
    """
    A model that can be run without some of its layers: they return what they are given, and compute nothing.

    Args:
        model (`PreTrainedModel`): A decoder-only model in eval mode, which nobody else may run meanwhile.

    Raises:
        UnsupportedModelError: The layers of the model cannot be told.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = layers_of(model)
        self._bypasses: dict[nn.Module, _Bypass] = {}
        self._look(model)

    @torch.no_grad()
    def _look(self, model: PreTrainedModel) -> None:
        """Find out what the layers return: a tensor, or in older families a tuple or a list that begins with it."""

        def note(layer: nn.Module, inputs: Any, output: Any) -> None:
            self._bypasses[layer] = _Bypass(None if isinstance(output, torch.Tensor) else type(output), len(output))

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(note).remove)
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=execution_device(model)), use_cache=False)

    @contextmanager
    def only(self, kept: Collection[int]) -> Iterator[None]:
        """Run the model with a few layers, counted from 0."""
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                if index not in kept:
                    stack.callback(_restore, layer, layer.__dict__.get("forward"))
                    layer.forward = self._bypasses[layer]
            yield


def choose_layers(target: PreTrainedModel, count: int, observations: Sequence[Observation]) -> list[int]:
    """
    Choose the layers of a draft: again and again, the one that is missed least is left out.

    By what a layer does to the output when it is not there, after those that have gone before (SLEB,
    https://arxiv.org/abs/2402.09025), instead of by what it does to the state (ShortGPT,
    https://arxiv.org/abs/2403.03853).

    Args:
        target (`PreTrainedModel`): A decoder-only model in eval mode, which nobody else may run meanwhile.
        count (`int`): Layers of the draft.
        observations (`Sequence[Observation]`): Text to measure on; see [`~hf_osd.drafts.likeness.read`]. A few hundred
            tokens will do. It is read once for each layer that may go, in each turn.

    Returns:
        `list[int]`: Layers counted from 0, in ascending order.

    Raises:
        InputError: `count` is out of range, or there are no observations.
        UnsupportedModelError: The layers of the model cannot be told.
    """
    depth = Depth(target)
    kept = list(range(len(depth.layers)))
    if not 1 <= count <= len(kept):
        raise InputError(f"count must be in [1, {len(kept)}], got {shown(count)}")

    def acceptance_without(layer: int) -> float:
        with depth.only({*kept} - {layer}):
            return likeness(target, observations).acceptance

    while len(kept) > count:
        kept.remove(max(kept, key=acceptance_without))
    return kept


class _Bypass:
    """The forward of a layer that is left out."""

    def __init__(self, kind: Callable[[list[Any]], Any] | None, length: int) -> None:
        self._kind, self._others = kind, [None] * (length - 1)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self._kind is None else self._kind([hidden_states, *self._others])


def _restore(layer: nn.Module, forward: Any) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward  # of an offloading hook, which had replaced it as well
