"""Which drafts are worth a distillation: what each costs, and what it promises."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..drafts.features import FeatureDraft
from ..drafts.prediction import predict
from ..drafts.profiles import Profile
from .costs import context_for, step_seconds

LAYERS = (1, 2)
"""Layers of the drafts that are considered."""

_HOPED = 0.5  # acceptance of a draft of one layer, such as SmolLM2's reaches in twenty minutes
_FEWER_MISSES = 0.05  # share of the refused tokens that each further layer is expected to get right
_CLOSE = 0.97  # of the best promise: what is below cannot be expected to catch up
_MOST = 2  # drafts that are distilled


@dataclass(frozen=True, slots=True)
class Candidate:
    """
    A draft that may be distilled.

    Attributes:
        layers (`int`): Its layers.
        step_seconds (`float`): Measured time to propose a token.
        speedup (`float`): Over plain decoding at the acceptance that is hoped for.
    """

    layers: int
    step_seconds: float
    speedup: float

    @property
    def name(self) -> str:
        """What tables and folders call it."""
        return f"{self.layers}-layer"


def make_draft(target: PreTrainedModel, layers: int, general: torch.Tensor) -> FeatureDraft:
    """Return a cold draft; the same every time, without touching the global random state."""
    with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):
        torch.manual_seed(0)
        return FeatureDraft.of(target, layers=layers, general=general)


def weigh(
    target: PreTrainedModel, costs: Profile, general: torch.Tensor, depths: Sequence[int] = LAYERS
) -> list[Candidate]:
    """
    Measure what drafts cost, and predict what each would be worth if it learned as well as may be hoped.

    Args:
        target (`PreTrainedModel`): The target.
        costs ([`~hf_osd.drafts.profiles.Profile`]): Of its passes.
        general (`torch.LongTensor` of shape `(tokens,)`): Tokens that the drafts propose from.
        depths (`Sequence[int]`, defaults to `(1, 2)`): Their layers; those that the target itself does not have are
            left out.

    Returns:
        `list[Candidate]`: The most promising one first.
    """
    most = target.config.get_text_config(decoder=True).num_hidden_layers
    found = []
    for layers in [depth for depth in depths if depth < most] or [1]:
        seconds = step_seconds(make_draft(target, layers, general))
        hoped = 1 - (1 - _HOPED) * (1 - _FEWER_MISSES) ** (layers - 1)
        promise = predict(costs, seconds, hoped, context=context_for(target))
        found.append(Candidate(layers, seconds, promise.speedup))
    return sorted(found, key=lambda candidate: -candidate.speedup)


def promising(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that are worth a distillation: the first, and the next where it is close."""
    best = candidates[0].speedup
    return [candidate for candidate in candidates if candidate.speedup >= _CLOSE * best][:_MOST]
