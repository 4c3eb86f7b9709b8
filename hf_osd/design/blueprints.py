"""Blueprints of drafts: which of the target's layers, how wide, and which states they read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..drafts.depth import choose_layers
from ..drafts.features import FeatureDraft, default_state_layers
from ..drafts.pruning import prune
from ..drafts.states import layers_of
from ..drafts.width import configured_width
from ..errors import UnsupportedModelError
from ..records import Observation

logger = logging.get_logger(__name__)

DEPTHS = (1, 2)
"""Layers of drafts that read the target's states."""

TOKEN_DEPTHS = (1, 2, 4)
"""Layers of drafts that read tokens alone."""

_NARROW = 2  # a narrow draft keeps one neuron in two of each feed-forward part, which has most weights of a layer
_TEXTS = 4  # texts on which layers and neurons are chosen; each is read once for each layer that may be left out


@dataclass(frozen=True, slots=True)
class Blueprint:
    """
    What a draft is made of.

    Attributes:
        layers (`tuple[int, ...]`): Layers of the target that it copies, counted from 0, in ascending order.
        state_layers (`tuple[int, ...]`): Layers of the target after which it reads its states, counted from 1; none
            for a draft that reads tokens alone.
        width (`int`, *optional*): Neurons of each feed-forward part; `None` for all that the target has.
    """

    layers: tuple[int, ...]
    state_layers: tuple[int, ...] = ()
    width: int | None = None

    @property
    def name(self) -> str:
        """Its name in tables and folders."""
        width = "" if self.width is None else f"-{self.width}-wide"
        return f"{len(self.layers)}-layer{width}{'' if self.state_layers else '-tokens'}"


def blueprints(target: PreTrainedModel) -> list[Blueprint]:
    """
    Return what drafts may be made of a target, as far as their cost depends on it.

    Drafts that read its states have one layer, two, or one with half of the neurons; those that read tokens alone have
    one, two or four. Each copies the last layers; see [`settled`].

    Args:
        target (`PreTrainedModel`): A decoder-only model.
    """
    count, states = len(layers_of(target)), default_state_layers(target)

    def last(depths: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(range(count - depth, count)) for depth in depths if depth < count] or [(count - 1,)]

    found = [Blueprint(layers, states) for layers in last(DEPTHS)]
    if find_spec("torch_pruning"):
        found += _narrower(target, found[0])
    return [*found, *(Blueprint(layers) for layers in last(TOKEN_DEPTHS))]


def _narrower(target: PreTrainedModel, one: Blueprint) -> list[Blueprint]:
    try:
        return [replace(one, width=max(configured_width(target) // _NARROW, 1))]
    except UnsupportedModelError as error:
        logger.warning("No draft with fewer neurons is considered: %s", error)
        return []


def settled(target: PreTrainedModel, blueprint: Blueprint, texts: Sequence[Observation]) -> Blueprint:
    """
    Return a blueprint with the layers that are really copied.

    A draft that reads states has the target's last layers. One that reads tokens alone has those whose absence changes
    the target's output most; see [`~hf_osd.drafts.depth.choose_layers`].

    Args:
        target (`PreTrainedModel`): The target, in eval mode, which must not run elsewhere meanwhile.
        blueprint ([`Blueprint`]): Of [`blueprints`].
        texts (`Sequence[Observation]`): What the target has said; the first few are read again and again.

    Raises:
        UnsupportedModelError: The architecture does not allow it.
    """
    if blueprint.state_layers:
        return blueprint
    depth = len(blueprint.layers)
    return replace(blueprint, layers=tuple(choose_layers(target, [depth], texts[:_TEXTS])[depth]))


def make_draft(
    target: PreTrainedModel, blueprint: Blueprint, general: torch.Tensor, texts: Sequence[Observation] = ()
) -> FeatureDraft:
    """
    Return a cold draft; the same every time, without touching the global random state.

    Args:
        target (`PreTrainedModel`): The target.
        blueprint ([`Blueprint`]): What to make.
        general (`torch.LongTensor` of shape `(tokens,)`): Tokens that it always proposes from.
        texts (`Sequence[Observation]`, defaults to `()`): By which the neurons of a narrower one are chosen.

    Raises:
        UnsupportedModelError: The architecture does not allow it.
    """
    count, depth = len(layers_of(target)), len(blueprint.layers)
    is_plain = blueprint.layers == tuple(range(count - depth, count)) and blueprint.width is None
    source = (
        target if is_plain else prune(target, blueprint.layers, width=blueprint.width, observations=texts[:_TEXTS])
    )
    with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):
        torch.manual_seed(0)
        return FeatureDraft.of(
            target, layers=depth, source=source, state_layers=blueprint.state_layers, general=general
        )
