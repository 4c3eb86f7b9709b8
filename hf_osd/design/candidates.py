"""Chooses the drafts that are worth a distillation, by measured cost and expected acceptance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..config import shown
from ..drafts.prediction import predict
from ..drafts.profiles import Profile
from ..errors import ConfigError
from ..records import Observation
from .blueprints import Blueprint, make_draft
from .costs import context_for, step_seconds

_HOPED = 0.5  # expected acceptance of one layer that reads states: that of SmolLM2's draft after twenty minutes
_HOPED_OF_TOKENS = 0.2  # expected acceptance of one layer that reads tokens alone, likewise
_FEWER_MISSES = 0.05  # share of the refused tokens that each further layer is expected to save
_MORE_MISSES = 0.02  # share of the accepted tokens that half of the neurons are expected to cost
_CLOSE = 0.97  # share of the best expected speed that a second draft needs to be distilled, too
_MOST = 2  # drafts that are distilled, at most


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
        """Its name in tables and folders."""
        return self.blueprint.name


def weigh(
    target: PreTrainedModel,
    costs: Profile,
    general: torch.Tensor,
    blueprints: Sequence[Blueprint],
    texts: Sequence[Observation] = (),
) -> list[Candidate]:
    """
    Measure the costs of drafts, and predict the speed of each at the acceptance that it is expected to reach.

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
    """Return the expected acceptance of a draft, extrapolated from SmolLM2's drafts; see `docs/design.md`."""
    shallow = _HOPED if one.state_layers else _HOPED_OF_TOKENS
    deep = 1 - (1 - shallow) * (1 - _FEWER_MISSES) ** (len(one.layers) - 1)
    return deep if one.width is None else deep * (1 - _MORE_MISSES)


def named(blueprints: Sequence[Blueprint], names: Sequence[str]) -> list[Blueprint]:
    """
    Return the blueprints of some names; all without any.

    Raises:
        ConfigError: There is none of such a name.
    """
    known = {one.name: one for one in blueprints}
    for name in names:
        if name not in known:
            raise ConfigError(f"candidates: no draft is called {shown(name)}; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def promising(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates to distil: the first, and the next if it is close."""
    best = candidates[0].speedup
    return [candidate for candidate in candidates if candidate.speedup >= _CLOSE * best][:_MOST]
