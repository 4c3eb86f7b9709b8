"""Reads hidden states of chosen layers during a target's own forward, without a further pass."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import LearningError, UnsupportedModelError
from ..records import Observation

Pass = dict[int, torch.Tensor]
"""States of one forward by layer, each `(batch, time, hidden)`."""


class StateTap:
    """
    Reads a model's hidden states after some of its layers, in whatever forward [`read`] runs.

    Its hooks stay on the model, one for each layer, and do nothing outside of [`read`]; other threads may run the
    model meanwhile.

    Args:
        model (`PreTrainedModel`): The model.
        layers (`Sequence[int]`): After which layers, counted from 1 as in `output_hidden_states`; the number of
            layers means the last state, behind the final norm.

    Raises:
        UnsupportedModelError: The layers of the model cannot be told, or it has fewer.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._passes: dict[int, Pass] = {}  # by thread
        decoder, stack = decoder_of(model), layers_of(model)
        for layer in self.layers:
            if not 1 <= layer <= len(stack):
                raise UnsupportedModelError(
                    f"the draft reads layer {layer} of its target, and {type(model).__name__} has {len(stack)}: "
                    "design a draft for this target",
                    "draft: made for another target",
                )
            tapped = decoder if layer == len(stack) else stack[layer - 1]
            tapped.register_forward_hook(_Hook(layer, self._passes))

    @classmethod
    def of(cls, model: PreTrainedModel, layers: Sequence[int]) -> "StateTap":
        """Return the tap of a model at these layers; the same one every time."""
        with _lock:
            taps = _taps.setdefault(model, {})
            key = tuple(layers)
            if key not in taps:
                taps[key] = cls(model, key)
            return taps[key]

    def read(self, forward: Callable[[], Any]) -> tuple[Any, torch.Tensor]:
        """
        Run one forward of the model.

        Args:
            forward (`Callable`): Runs it.

        Returns:
            `tuple[Any, torch.Tensor]`: What it returns, and the states side by side: `(batch, time, layers * hidden)`.
        """
        with self.reading() as found:
            output = forward()
        return output, torch.cat([found[layer] for layer in self.layers], dim=-1)

    @contextmanager
    def reading(self) -> Iterator[Pass]:
        """Collect the states of the one forward that this thread runs inside, by layer."""
        thread = threading.get_ident()
        before = self._passes.get(thread)
        found = self._passes[thread] = {}
        try:
            yield found
        finally:
            if before is None:
                del self._passes[thread]
            else:
                self._passes[thread] = before


class _Hook:
    """A hook that keeps the output of a layer. A copy of the model has its own copy of it, which is never read."""

    def __init__(self, layer: int, passes: dict[int, Pass]) -> None:
        self._layer, self._passes = layer, passes

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        found = self._passes.get(threading.get_ident())
        if found is not None:
            found[self._layer] = output if isinstance(output, torch.Tensor) else output[0]


_lock = threading.Lock()
_taps: "weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[int, ...], StateTap]]" = weakref.WeakKeyDictionary()


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a language model that turns embeddings into the states that its head reads."""
    decoder: Any = model.get_decoder()
    if decoder is None or decoder is model:
        raise _unknown(model)
    found: nn.Module = decoder
    return found


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """
    Return the layers of a decoder-only model, whatever its family calls them.

    Raises:
        UnsupportedModelError: No list of modules has as many entries as the configuration has layers.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in decoder_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise _unknown(model)


def _unknown(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the layers of {type(model).__name__} cannot be told from its modules: use a draft that reads tokens alone",
        "target: its layers are not known",
    )


@torch.no_grad()
def with_states(draft: Any, observations: Sequence[Observation]) -> list[Observation]:
    """
    Return requests with the target's states; where none are kept, the target reads that request again.

    Args:
        draft ([`~hf_osd.drafts.features.FeatureDraft`]): The draft, or a copy of it, which reads these states.
        observations (`Sequence[Observation]`): The requests.

    Raises:
        LearningError: A request has to be read, and the target is gone.
    """
    return [one if one.states is not None else replace(one, states=_read(draft, one)) for one in observations]


def _read(draft: Any, observation: Observation) -> torch.Tensor:
    target: Any = draft.target
    if target is None:
        raise LearningError("the target is gone, whose states the draft learns from")
    tap = StateTap.of(target, draft.state_layers)
    ids = torch.cat((observation.prompt_ids, observation.output_ids))[None, :-1].to(target.device)
    with torch.autocast(target.device.type, enabled=False):
        _, states = tap.read(lambda: target.get_decoder()(ids, use_cache=False))
    return states[0].to("cpu", torch.bfloat16)
