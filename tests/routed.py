"""Small drafts for one target, and what tests of routes ask of an assistant that has them."""

from collections.abc import Sequence
from typing import Any

import torch
from fakes import prompts, tiny_model

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig

TARGET = tiny_model("llama", dtype=torch.float32)
ALWAYS = {"draft_length_schedule": "constant", "draft_length": 3}
FAST = OnlineConfig(update_every=2, steps_per_update=1, batch_size=2, learning_rate=3e-3, gate=False, **ALWAYS)
STATIC = OnlineConfig(learn=False, **ALWAYS)


def small(seed: int = 5) -> Any:
    return tiny_model("llama", seed=seed, layers=1, dtype=torch.float32)


def serve(assistant: OnlineAssistant, batch: int = 4, seed: int = 0, target: Any = TARGET, **options: Any) -> Any:
    settings = {"max_new_tokens": 12, "do_sample": False, **options}
    return hf_osd.generate(target, **prompts(batch, seed=seed), online_assistant=assistant, **settings)


def plain(batch: int = 4, seed: int = 0, target: Any = TARGET, **options: Any) -> Any:
    return target.generate(**prompts(batch, seed=seed), **{"max_new_tokens": 12, "do_sample": False, **options})


def weights_of(assistant: OnlineAssistant, name: str) -> list[torch.Tensor]:
    return [weight.clone() for weight in assistant.routes[name].draft.parameters()]


def kept(assistant: OnlineAssistant, name: str) -> list[Any]:
    return assistant.routes[name].learner.learner.replay.observations()


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
