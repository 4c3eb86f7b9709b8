"""
Which draft a state belongs to: a sample of its weights, which tells drafts apart whatever dtype they are loaded in.

A state holds two of them, of the weights that its draft began with and of those that are live. Not covered: drafts
that were quantised, and two drafts that differ by less than the rounding of bfloat16.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import LearningError, StateError
from .store import read_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

STATE_FOLDER = "hf_osd"  # inside a saved draft; other tools load the draft and ignore it

INITIAL, LIVE = "identity-initial", "identity-live"  # names of a snapshot's groups of tensors

Sample = Mapping[str, torch.Tensor]
"""Some values of each weight, by its name and shape; see [`sample`]."""

_VALUES = 256  # values of each weight in a sample, at most
_STRIDE = 2_654_435_761  # values between two of them; a prime, so that they are of all rows and columns
_RELATIVE = torch.finfo(torch.bfloat16).eps  # difference of equal weights, one rounded to bfloat16, one to float16
_ABSOLUTE = 2.0**-24  # the same next to zero: one step of float16


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


def check_draft(draft: "PreTrainedModel", state: Mapping[str, Sample] | None, directory: Path) -> None:
    """
    Refuse the state of another draft.

    A draft is that of a state if its weights are those that the state's draft began with, or those that were live
    there. So is a draft that was saved at another moment, if the state beside it began with the same weights.

    Args:
        draft ([`~transformers.PreTrainedModel`]): As it was loaded.
        state (`Mapping[str, Mapping[str, torch.Tensor]]`, *optional*): Groups of a snapshot, if there is one.
        directory (`Path`): Where it lies, for the message.

    Raises:
        LearningError: It is the state of another draft, or says nothing of its draft.
    """
    if state is None:
        return
    if not state.keys() >= {INITIAL, LIVE}:
        raise LearningError(f"{directory} does not hold the state of a learner: it does not say of which draft it is")
    own = sample(draft.named_parameters())
    if _is_of(own, state):
        return
    saved = _saved_with(draft)
    if saved is None or not _is_of(own, saved) or difference(saved[INITIAL], state[INITIAL]) is not None:
        raise LearningError(
            f"{directory} holds the state of another draft: {difference(own, state[INITIAL])} is not as it was there, "
            "neither at the beginning nor at the end. Load that draft, use another state directory, or delete this one"
        )


def _is_of(own: Sample, state: Mapping[str, Sample]) -> bool:
    return any(difference(own, state[group]) is None for group in (INITIAL, LIVE))


def _saved_with(draft: "PreTrainedModel") -> Mapping[str, Sample] | None:
    """What the state beside a draft says of it, if `save_pretrained` has put one there."""
    if not draft.name_or_path:
        return None
    try:
        state = read_groups(Path(draft.name_or_path) / STATE_FOLDER, (INITIAL, LIVE))
    except StateError as error:
        logger.warning("The state beside the draft does not say which draft it is of: %s.", error)
        return None
    return state if state is not None and state.keys() >= {INITIAL, LIVE} else None
