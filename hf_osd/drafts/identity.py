"""
Which draft a state belongs to: a sample of its weights, which tells drafts apart whatever dtype they are loaded in.

A state holds two of them, of the weights that its draft began with and of those that are live. Not covered: drafts
that were quantised, and two drafts that differ by less than the rounding of bfloat16.
"""

from collections.abc import Iterable, Mapping

import torch

Sample = Mapping[str, torch.Tensor]

# Groups of a snapshot's tensors.
INITIAL, LIVE = "identity-initial", "identity-live"
_VALUES = 256  # values of each weight in a sample, at most
# A prime, so that its multiples are places all over a weight, in other rows and columns each.
_STRIDE = 2_654_435_761
# One step of bfloat16, relative: weights that were rounded to bfloat16 and to float16 are not further apart.
_RELATIVE = torch.finfo(torch.bfloat16).eps
# One step of float16 next to zero.
_ABSOLUTE = 2.0**-24


def sample(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    Take some values of each weight, always the same ones.

    Args:
        weights (`Iterable[tuple[str, torch.Tensor]]`): Of the whole draft, such as `draft.named_parameters()`.

    Returns:
        `dict[str, torch.Tensor]`: By name and shape, so that these count too: 1-D, float32, on the CPU; empty where a
            weight cannot be looked at, such as an offloaded one.
    """
    return {f"{name} {tuple(weight.shape)}": _values(weight.detach()) for name, weight in weights}


def _values(weight: torch.Tensor) -> torch.Tensor:
    try:
        weight = weight.reshape(-1)
        if weight.numel() > _VALUES:
            places = torch.arange(_VALUES) * _STRIDE % weight.numel()
            weight = weight[places.to(weight.device)]
        return weight.to("cpu", torch.float32, copy=True)
    except RuntimeError:  # on the meta device, or of a type that has no such functions
        return torch.empty(0)


def identity_groups(initial: Sample, live: Mapping[str, torch.Tensor]) -> dict[str, Sample]:
    """
    What a snapshot says of its draft.

    Args:
        initial (`Mapping[str, torch.Tensor]`): Sample of the weights that it began with.
        live (`Mapping[str, torch.Tensor]`): Weights that are live, by name; those that are missing never change.
    """
    return {INITIAL: initial, LIVE: {**initial, **sample(live.items())}}


def difference(one: Sample, other: Sample) -> str | None:
    """Return a weight in which two samples differ by more than rounding, `None` where they are of the same draft."""
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or not _close(one[name], other[name]):
            return name
    return None


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.numel() or not other.numel():
        return True
    return one.shape == other.shape and torch.allclose(one, other, _RELATIVE, _ABSOLUTE, equal_nan=True)
