"""Which drafts are worth a distillation: what each costs, and what it promises."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..drafts.prediction import predict
from ..drafts.profiles import Profile
from ..records import Observation
from .blueprints import Blueprint, make_draft
from .costs import context_for, step_seconds

_HOPED = 0.5  # acceptance of a draft of one layer that reads states, such as SmolLM2's reaches in twenty minutes
_HOPED_OF_TOKENS = 0.2  # of one that reads tokens alone, after as long
_FEWER_MISSES = 0.05  # share of the refused tokens that each further layer is expected to get right
_MORE_MISSES = 0.02  # share of the accepted tokens that half of the neurons are expected to lose
_CLOSE = 0.97  # of the best promise: what is below cannot be expected to catch up
_MOST = 2  # drafts that are distilled


@dataclass(frozen=True, slots=True)
class Candidate:
    """
    A draft that may be distilled.

    Attributes:
        blueprint ([`~hf_osd.design.blueprints.Blueprint`]): What it is made of.
        step_seconds (`float`): Measured time to propose a token.
        speedup (`float`): Over plain decoding at the acceptance that is hoped for.
    """

    blueprint: Blueprint
    step_seconds: float
    speedup: float

    @property
    def name(self) -> str:
        """What tables and folders call it."""
        return self.blueprint.name


def weigh(
    target: PreTrainedModel,
    costs: Profile,
    general: torch.Tensor,
    blueprints: Sequence[Blueprint],
    texts: Sequence[Observation] = (),
) -> list[Candidate]:
    """
    Measure what drafts cost, and predict what each would be worth if it learned as well as may be hoped.

    Args:
        target (`PreTrainedModel`): The target.
        costs ([`~hf_osd.drafts.profiles.Profile`]): Of its passes.
        general (`torch.LongTensor` of shape `(tokens,)`): Tokens that the drafts propose from.
        blueprints (`Sequence[Blueprint]`): The drafts; at least one.
        texts (`Sequence[Observation]`, defaults to `()`): See [`~hf_osd.design.blueprints.make_draft`].

    Returns:
        `list[Candidate]`: The most promising one first.
    """
    found = []
    for one in blueprints:
        seconds = step_seconds(make_draft(target, one, general, texts))
        promise = predict(costs, seconds, _hoped(one), context=context_for(target))
        found.append(Candidate(one, seconds, promise.speedup))
    return sorted(found, key=lambda candidate: -candidate.speedup)


def _hoped(one: Blueprint) -> float:
    """Return the acceptance that a draft may be hoped to reach, by what SmolLM2's did; see `docs/design.md`."""
    shallow = _HOPED if one.state_layers else _HOPED_OF_TOKENS
    deep = 1 - (1 - shallow) * (1 - _FEWER_MISSES) ** (len(one.layers) - 1)
    return deep if one.width is None else deep * (1 - _MORE_MISSES)


def promising(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that are worth a distillation: the first, and the next where it is close."""
    best = candidates[0].speedup
    return [candidate for candidate in candidates if candidate.speedup >= _CLOSE * best][:_MOST]
