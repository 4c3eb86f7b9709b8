"""
Token drafts cut out of a target: some of its layers, narrower feed-forward parts, and its embedding and head.

A draft is a plain, untrained model of the target's class. [`~hf_osd.drafts.depth`] chooses the layers. Not covered:
language models inside of multimodal ones, quantised targets, pruning of attention heads.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .._compat import attention_implementation, execution_device
from ..config import reason_of, shown
from ..errors import InputError, UnsupportedModelError, is_out_of_memory
from ..records import Observation
from .depth import Depth
from .states import layers_of
from .width import narrow

_TRIED = 8  # tokens of the pass that checks a draft
_TOLERANCE = 0.1  # standard deviations of the logits: largest difference to the target without the same layers


def prune(
    target: PreTrainedModel,
    layers: Sequence[int],
    *,
    width: int | None = None,
    observations: Sequence[Observation] = (),
) -> PreTrainedModel:
    """
    Make a draft of some layers of a target.

    Args:
        target (`PreTrainedModel`): A decoder-only model. Nothing of it changes.
        layers (`Sequence[int]`): Which layers, counted from 0, in ascending order; see
            [`~hf_osd.drafts.depth.choose_layers`].
        width (`int`, *optional*): Neurons of each feed-forward part; defaults to all.
        observations (`Sequence[Observation]`, defaults to `()`): Text by which neurons are chosen.

    Returns:
        [`~transformers.PreTrainedModel`]: A model of the target's class, in eval mode, on its device and in its dtype.
        Embedding and output head are the target's own parameters; all others are copies. What it saves is whole and
        is loaded by `from_pretrained`; [`borrow`] shares again.

    Raises:
        InputError: `layers` or `width` are out of range, or a width is given without observations.
        MissingDependencyError: A width is given and torch-pruning is not installed.
        UnsupportedModelError: The architecture does not allow it; says why.
    """
    _check(target, layers)
    stack = layers_of(target)
    try:
        with _without_bars():
            draft = _cut(target, layers, next(name for name, one in target.named_modules() if one is stack))
        borrow(draft, target)
        _compare(draft, target, layers)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise _cannot(target, reason_of(error)) from error  # as architectures fail
    return draft if width is None else narrow(draft, width, observations)


def borrow(draft: PreTrainedModel, target: PreTrainedModel) -> PreTrainedModel:
    """
    Make a token draft use the target's embedding and output head in place.

    Args:
        draft (`PreTrainedModel`): The draft, of the same vocabulary and hidden size.
        target (`PreTrainedModel`): The target.

    Returns:
        [`~transformers.PreTrainedModel`]: The draft.

    Raises:
        UnsupportedModelError: A weight of the target has another shape.
    """
    for part in ("get_input_embeddings", "get_output_embeddings"):
        own, theirs = getattr(draft, part)(), getattr(target, part)()
        for name, weight in own.named_parameters():
            if weight.shape != theirs.get_parameter(name).shape:
                raise UnsupportedModelError(
                    f"the draft's {part[4:]} have a {name} of shape {tuple(weight.shape)}, and those of "
                    f"{type(target).__name__} one of {tuple(theirs.get_parameter(name).shape)}",
                    "draft: made for another target",
                )
            setattr(own, name, theirs.get_parameter(name))
    return draft


def _check(target: PreTrainedModel, layers: Sequence[int]) -> None:
    config = target.config
    if config.get_text_config(decoder=True) is not config:
        raise _cannot(target, "its language model is a part of it: pass a model of that part alone")
    if getattr(config, "quantization_config", None) is not None:
        raise _cannot(target, "it is quantised: load it in bfloat16")
    count = len(layers_of(target))
    is_whole = all(isinstance(layer, int) for layer in layers)
    if not layers or not is_whole or not _ascend((-1, *layers, count)):
        raise InputError(f"layers must be ascending and in [0, {count - 1}], got {shown(list(layers))}")


def _ascend(layers: Sequence[int]) -> bool:
    return all(low < high for low, high in pairwise(layers))


def _cut(target: PreTrainedModel, layers: Sequence[int], stack: str) -> PreTrainedModel:
    """Load a copy of some of the weights into a smaller model of the same class."""
    loader: Any = type(target)
    draft, report = loader.from_pretrained(
        None,
        config=_config(target, layers),
        state_dict=_weights(target, layers, stack),
        dtype=target.dtype,
        attn_implementation=attention_implementation(target),
        output_loading_info=True,
    )
    wrong = {name: names for name, names in report.items() if names}
    if wrong:
        raise ValueError(f"its weights do not fit a smaller one: {shown(wrong)}")
    draft.generation_config = copy.deepcopy(target.generation_config)
    return draft.to(execution_device(target)).eval()  # type: ignore[no-any-return]


def _config(target: PreTrainedModel, layers: Sequence[int]) -> Any:
    """Return the target's configuration with fewer layers; lists that have an entry for each lose some, too."""
    config = copy.deepcopy(target.config)
    count = config.num_hidden_layers
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    return type(config).from_dict(config.to_dict())  # as loading does, which refuses some configurations


def _weights(target: PreTrainedModel, layers: Sequence[int], stack: str) -> dict[str, torch.Tensor]:
    places = {str(layer): str(place) for place, layer in enumerate(layers)}
    weights = {}
    for name, weight in target.state_dict().items():
        inside, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if not name.startswith(f"{stack}."):
            weights[name] = weight.clone()
        elif inside in places:
            weights[f"{stack}.{places[inside]}.{rest}"] = weight.clone()  # transformers may keep it
    return weights


@torch.no_grad()
def _compare(draft: PreTrainedModel, target: PreTrainedModel, layers: Sequence[int]) -> None:
    """Check that the draft equals the target without the other layers: some layers depend on their index."""
    ids = torch.arange(_TRIED, device=execution_device(target))[None] % target.config.vocab_size
    with Depth(target).only(layers):
        expected = target(input_ids=ids, use_cache=False).logits.float()
    found = draft(input_ids=ids, use_cache=False).logits.float()
    if not (found - expected).abs().max() <= _TOLERANCE * expected.std():
        raise ValueError("its layers work differently at another place")


def _cannot(target: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"no draft can be cut out of {type(target).__name__}: {why}", "draft: cannot be cut out of this target"
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' progress bar: the weights are in memory already."""
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            logging.enable_progress_bar()
