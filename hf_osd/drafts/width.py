"""
Makes the feed-forward parts of a draft narrower: the neurons that change its states least are left out.

torch-pruning traces a forward pass to find weights that go together, such as those of a gate and of what it gates. A
neuron's importance is the norm of its weights in the down projection, times its mean activation (Wanda,
https://arxiv.org/abs/2306.11695, by neuron instead of by weight). Not covered: mixtures of experts, and models whose
configuration does not give the width.
"""

import importlib
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .._compat import execution_device
from ..config import reason_of, shown
from ..errors import InputError, MissingDependencyError, UnsupportedModelError, is_out_of_memory
from ..records import Observation
from .states import layers_of

_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")  # fields of a configuration: of most models, GPT-2, OPT
_TRACED = 8  # tokens of the pass that torch-pruning traces


def narrow(draft: PreTrainedModel, width: int, observations: Sequence[Observation]) -> PreTrainedModel:
    """
    Leave neurons of every feed-forward part out, in place.

    Args:
        draft (`PreTrainedModel`): A draft with layers of its own; embedding and output head are left alone.
        width (`int`): Neurons to keep in each layer.
        observations (`Sequence[Observation]`): Text that activations are measured on.

    Returns:
        [`~transformers.PreTrainedModel`]: The draft.

    Raises:
        InputError: `width` is out of range, or there are no observations.
        MissingDependencyError: torch-pruning is not installed.
        UnsupportedModelError: The feed-forward parts of this architecture cannot be told or made narrower.
    """
    if find_spec("torch_pruning") is None:
        raise MissingDependencyError('a narrower draft needs torch-pruning: pip install "hf-osd[prune]"')
    name, full = _width_field(draft)
    if not 1 <= width <= full:
        raise InputError(f"width must be in [1, {full}], got {shown(width)}")
    if not observations:
        raise InputError("neurons are chosen by what they do along some text: pass at least one observation")
    down = [_projection_down(draft, layer, full) for layer in layers_of(draft)]
    kept = [found.topk(width).indices for found in _importance(draft, down, observations)]
    try:
        _take_out(draft, {one: _others(indices, full) for one, indices in zip(down, kept, strict=True)})
        setattr(draft.config, name, width)
        _check_loads(draft)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise _cannot(draft, reason_of(error)) from error  # as torch-pruning and architectures fail
    return draft


def configured_width(model: PreTrainedModel) -> int:
    """
    Return how many neurons each feed-forward part of a model has.

    Raises:
        UnsupportedModelError: Its configuration cannot say.
    """
    return _width_field(model)[1]


def _width_field(draft: PreTrainedModel) -> tuple[str, int]:
    config = draft.config
    name = next((name for name in _WIDTHS if hasattr(config, name)), None)
    if name is None:
        raise _cannot(draft, "its configuration cannot say how wide its feed-forward parts are")
    full = getattr(config, name) or 4 * config.hidden_size  # what `None` means to GPT-2
    if not isinstance(full, int):
        raise _cannot(draft, f"its layers differ in width: {name} is {shown(full)}")
    return name, full


def _projection_down(draft: PreTrainedModel, layer: nn.Module, full: int) -> nn.Module:
    """Return the one projection from as many neurons as the feed-forward part has to the state."""
    found = [
        module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "att" not in name and _by_neuron(module).shape[0] == full
    ]
    if len(found) > 1 and full == draft.config.hidden_size:
        found = found[-1:]  # every projection looks alike, and this one comes last
    if len(found) != 1:
        raise _cannot(draft, f"{len(found)} projections of a layer read {full} neurons")
    return found[0]


def _by_neuron(module: nn.Module) -> torch.Tensor:
    """Return the weights by what they read: `(inputs, outputs)`. GPT-2's lie that way, those of others the other."""
    weight: torch.Tensor = module.get_parameter("weight")
    return weight if isinstance(module, Conv1D) else weight.T


@torch.no_grad()
def _importance(
    draft: PreTrainedModel, down: Sequence[nn.Module], observations: Sequence[Observation]
) -> list[torch.Tensor]:
    """Return how much each neuron of each projection adds to the state: `(neurons,)` float32."""
    sums = [torch.zeros(len(_by_neuron(module)), device=execution_device(draft)) for module in down]
    with ExitStack() as stack:
        for module, total in zip(down, sums, strict=True):
            stack.callback(module.register_forward_pre_hook(_Sum(total)).remove)
        for one in observations:
            ids = torch.cat([one.prompt_ids, one.output_ids])[None].to(execution_device(draft))
            draft(input_ids=ids, use_cache=False)
    return [total * _by_neuron(module).float().norm(dim=1) for module, total in zip(down, sums, strict=True)]


class _Sum:
    """A hook that adds up activations."""

    def __init__(self, total: torch.Tensor) -> None:
        self._total = total

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._total += inputs[0].float().abs().flatten(0, -2).sum(0)  # a sum: the mean up to a constant


def _others(kept: torch.Tensor, full: int) -> list[int]:
    return sorted({*range(full)} - {*kept.tolist()})


def _take_out(draft: PreTrainedModel, neurons: dict[nn.Module, list[int]]) -> None:
    """Remove inputs of some projections, and whatever makes them."""
    tp: Any = importlib.import_module("torch_pruning")
    pruner = _Conv1DPruner()
    ids = torch.arange(_TRACED, device=execution_device(draft))[None] % draft.config.vocab_size
    with warnings.catch_warnings(action="ignore"), torch.inference_mode(False), torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(
            draft,
            example_inputs={"input_ids": ids, "use_cache": False},
            output_transform=lambda output: output.logits,
            customized_pruners={Conv1D: pruner},
        )
        for module, taken in neurons.items():
            prunes = pruner.prune_in_channels if isinstance(module, Conv1D) else tp.prune_linear_in_channels
            if taken:
                graph.get_pruning_group(module, prunes, idxs=taken).prune()


class _Conv1DPruner:
    """What torch-pruning (1.6.1) lacks: GPT-2's linear layer, whose weights are `(inputs, outputs)`."""

    pruning_dim = 1

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs."""
        kept = _others(torch.tensor(idxs), layer.nf)
        layer.weight, layer.bias = nn.Parameter(layer.weight.data[:, kept]), nn.Parameter(layer.bias.data[kept])
        layer.nf = len(kept)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove inputs."""
        kept = _others(torch.tensor(idxs), layer.nx)
        layer.weight, layer.nx = nn.Parameter(layer.weight.data[kept]), len(kept)
        return layer

    def get_out_channels(self, layer: Any) -> int:
        """Return how many outputs there are."""
        return int(layer.nf)

    def get_in_channels(self, layer: Any) -> int:
        """Return how many inputs there are."""
        return int(layer.nx)


def _check_loads(draft: PreTrainedModel) -> None:
    """Compare the weights with those of a model that is made of the configuration."""
    with torch.device("meta"):
        made = type(draft)(draft.config).state_dict()
    wrong = [
        name for name, weight in draft.state_dict().items() if name not in made or made[name].shape != weight.shape
    ]
    if wrong:
        raise ValueError(f"its configuration would make other shapes of {shown(wrong)}")


def _cannot(draft: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(draft).__name__} cannot be made narrower: {why}", "draft: cannot be narrower")
