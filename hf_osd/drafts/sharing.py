"""
Weights that a draft shares with its target: which they are, and a copy of the draft that reads them where they lie.

A draft may borrow the target's embedding and output layer, in part or whole. Learning leaves what is borrowed alone.
Not covered: weights that an offloading hook keeps in place of the target's parameters.
"""

import copy
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn

Extent = tuple[int, int]
"""First address of a tensor, and the one behind its last."""


def shared_with(draft: nn.Module, target: nn.Module) -> frozenset[str]:
    """
    Name the draft's parameters that lie in the memory of the target's parameters or buffers.

    Memory counts, not objects: a `Parameter` of its own over the target's storage is shared, and so is a view of a
    part of it.

    Args:
        draft ([`~transformers.PreTrainedModel`]): The draft.
        target ([`~transformers.PreTrainedModel`]): The target.

    Returns:
        `frozenset[str]`: Names as in `draft.named_parameters()`.
    """
    taken = _Memory((*target.parameters(), *target.buffers()))
    return frozenset(name for name, weight in draft.named_parameters() if taken.overlaps(weight))


def share_encoder(draft: Any, target: Any) -> None:
    """
    Let a draft use its target's own encoder, where its own is the same in every weight.

    From then on, what moves or casts the draft (`draft.to(...)`) does so to the encoder of the target as well.

    Args:
        draft, target ([`~transformers.PreTrainedModel`]): Models with encoders.
    """
    own, other = (model.get_encoder() for model in (draft, target))
    if type(own) is type(other) and _are_equal(own.state_dict(), other.state_dict()):
        draft.set_encoder(other)


def _are_equal(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    kinds = [{name: (one.shape, one.dtype, one.device) for name, one in each.items()} for each in (ours, theirs)]
    return kinds[0] == kinds[1] and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


class _Memory:
    """The memory of some tensors, by device."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        extents: dict[torch.device, list[Extent]] = {}
        for device, extent in (found for tensor in tensors for found in _extents(tensor)):
            extents.setdefault(device, []).append(extent)
        ordered = {device: sorted(found) for device, found in extents.items()}
        self._begins = {device: [begin for begin, _ in found] for device, found in ordered.items()}
        self._reach = {device: [*accumulate((end for _, end in found), max)] for device, found in ordered.items()}

    def overlaps(self, tensor: torch.Tensor) -> bool:
        return any(self._is_taken(device, *extent) for device, extent in _extents(tensor))

    def _is_taken(self, device: torch.device, begin: int, end: int) -> bool:
        before = bisect_left(self._begins.get(device, ()), end)  # those that begin before this one ends
        return before > 0 and self._reach[device][before - 1] > begin


def _extents(tensor: torch.Tensor) -> Iterator[tuple[torch.device, Extent]]:
    """Where a tensor lies, or what a wrapper such as a quantised tensor is made of; nowhere without memory."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _extents(getattr(tensor, name))
    elif tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.data_ptr()
        yield tensor.device, (begin, begin + (last + 1) * tensor.element_size())


def has_own_weights(draft: nn.Module, frozen: Collection[str]) -> bool:
    """Whether a draft has parameters besides those that are not to be trained."""
    return any(name not in frozen for name, _ in draft.named_parameters())


def copy_beside(draft: nn.Module, frozen: Collection[str] = ()) -> Any:
    """
    Copy a draft, for training, except the parameters that are not to be trained: they are read where they lie.

    Args:
        draft ([`~transformers.PreTrainedModel`]): The draft. It may have been made in inference mode.
        frozen (`Collection[str]`): Names of parameters.

    Returns:
        `torch.nn.Module`: The copy, whose tensors can be trained; those of `frozen` are marked as not to be.
    """
    with torch.inference_mode(False):  # whoever calls may be in it, and its tensors take no gradient
        memo: dict[int, Any] = {
            id(weight): _alias(weight) for name, weight in draft.named_parameters() if name in frozen
        }
        return copy.deepcopy(draft, memo)


def _alias(weight: nn.Parameter) -> nn.Parameter:
    """Another parameter over the same memory. Those with a class of their own know more than that: a copy."""
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        copied = copy.deepcopy(weight)
        copied.requires_grad_(False)
        return copied
    # A view would be an inference tensor where the weight is one.
    place = (weight.storage_offset(), weight.shape, weight.stride())
    data = torch.empty(0, dtype=weight.dtype, device=weight.device).set_(weight.untyped_storage(), *place)
    return nn.Parameter(data, requires_grad=False)


def in_float32(model: nn.Module, frozen: Collection[str] = ()) -> None:
    """
    Turn a copy of a draft to float32, in place, except what it reads in the target's memory and can compute with.

    These are linear layers and embeddings in bfloat16, whose results turn to float32 instead: a copy of the target's
    output layer would take more memory than everything else. float16 has no range for gradients.

    Args:
        model (`torch.nn.Module`): Of [`copy_beside`].
        frozen (`Collection[str]`): Likewise.
    """
    borrowed = {id(weight) for name, weight in model.named_parameters() if name in frozen}
    module: Any
    for module in [*model.modules()]:
        own = [*module.parameters(recurse=False)]
        in_half = all(id(weight) in borrowed and weight.dtype == torch.bfloat16 for weight in own)
        if own and in_half and isinstance(module, nn.Linear | nn.Embedding):
            module.register_forward_pre_hook(_to_own_type)
            module.register_forward_hook(_to_float32)
        else:
            module._apply(_float32, recurse=False)


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _to_own_type(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.to(module.weight.dtype) if value.is_floating_point() else value for value in inputs)


def _to_float32(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.float()


def modules_of(model: nn.Module, frozen: Collection[str]) -> list[str]:
    """Name the modules that own a parameter which is not to be trained."""
    borrowed: Mapping[int, str] = {id(weight): name for name, weight in model.named_parameters() if name in frozen}
    return [
        name
        for name, module in model.named_modules()
        if any(id(weight) in borrowed for weight in module.parameters(recurse=False))
    ]
