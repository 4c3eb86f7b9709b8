"""Chooses the layers of a target that make a draft: those whose absence changes its output most."""

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
    Runs a model without some of its layers, which then return their input.

    Args:
        model (`PreTrainedModel`): A decoder-only model in eval mode, which must not run elsewhere meanwhile.

    Raises:
        UnsupportedModelError: The layers of the model cannot be identified.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = layers_of(model)
        self._bypasses: dict[nn.Module, _Bypass] = {}
        self._look(model)

    @torch.no_grad()
    def _look(self, model: PreTrainedModel) -> None:
        """Note what the layers return: a tensor, or in older families a tuple or list that begins with it."""

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


def choose_layers(
    target: PreTrainedModel, counts: Collection[int], observations: Sequence[Observation]
) -> dict[int, list[int]]:
    """
    Choose the layers of drafts greedily: leave out the layer whose absence costs least acceptance, and repeat.

    Layers are judged by the output of the model without them and those left out before (SLEB,
    https://arxiv.org/abs/2402.09025), not by how much they change the state (ShortGPT,
    https://arxiv.org/abs/2403.03853).

    Args:
        target (`PreTrainedModel`): A decoder-only model in eval mode, which must not run elsewhere meanwhile.
        counts (`Collection[int]`): How many layers the drafts have; one search serves all.
        observations (`Sequence[Observation]`): What the target has said, to measure on. A few hundred tokens will do:
            they are read once for each layer that may go, in each turn.

    Returns:
        `dict[int, list[int]]`: By their number, layers counted from 0, in ascending order.

    Raises:
        InputError: A count is out of range, or there are no observations.
        UnsupportedModelError: The layers of the model cannot be identified.
    """
    depth = Depth(target)
    kept = list(range(len(depth.layers)))
    if not counts or not all(1 <= count <= len(kept) for count in counts):
        raise InputError(f"counts must be in [1, {len(kept)}], got {shown([*counts])}")

    def acceptance_without(layer: int) -> float:
        with depth.only({*kept} - {layer}):
            return likeness(target, observations).acceptance

    chosen = {len(kept): [*kept]}
    while len(kept) > min(counts):
        kept.remove(max(kept, key=acceptance_without))
        chosen[len(kept)] = [*kept]
    return {count: chosen[count] for count in counts}


class _Bypass:
    """The forward of a layer that is left out: returns its input."""

    def __init__(self, kind: Callable[[list[Any]], Any] | None, length: int) -> None:
        self._kind, self._others = kind, [None] * (length - 1)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self._kind is None else self._kind([hidden_states, *self._others])


def _restore(layer: nn.Module, forward: Any) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward  # of an offloading hook, which had replaced it as well
