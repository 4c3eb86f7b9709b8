"""Learners by recipe, the traffic they see before and after a restart, and whether weights are the same."""

from collections.abc import Mapping
from typing import Any

import torch
from traffic import Live, request

from hf_osd.learning.online import OnlineLearner
from hf_osd.records import Observation

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj"]}
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": LORA},
    "bfloat16": {},
    "no gate": {"gate": False, "positions": "rejected"},
    "archive": {"steps_per_update": 8},
}


def made(recipe: str = "full", draft: Mapping[str, torch.Tensor] | None = None, **settings: Any) -> tuple[Live, Any]:
    """A live draft, with weights of another where given, and its learner."""
    live = Live()
    if recipe == "bfloat16":
        live.draft.bfloat16()
    if draft is not None:
        live.draft.load_state_dict(draft)
    return live, live.learner(**{"steps_per_update": 2, **RECIPES[recipe], **settings})


def traffic(count: int, start: int = 0) -> list[Observation]:
    """Requests whose kind changes after the fortieth."""
    return [request(number, seed=1 if number < 40 else 2) for number in range(start, start + count)]


def observe(learner: OnlineLearner, observations: list[Observation]) -> None:
    for observation in observations:
        learner.observe(observation)


def same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
