"""A learner that is wired to a draft and its target as an assistant does it, and requests of a small domain."""

from typing import Any

import torch
from traffic import recorded
from transformers import PreTrainedModel

from hf_osd.config import OnlineConfig
from hf_osd.drafts.sharing import shared_with
from hf_osd.learning.online import OnlineLearner
from hf_osd.records import Observation
from hf_osd.serving.weights import LiveWeights


def requests(target: PreTrainedModel, count: int, greedy: bool = True) -> list[Observation]:
    """Four prompts again and again, which hold the last token of the target's vocabulary, and any other."""
    size = target.config.vocab_size
    prompts = torch.randint(0, size, (4, 5), generator=torch.Generator().manual_seed(0))
    prompts[:, 1] = size - 1
    return [recorded(target, prompts[number % 4], greedy=greedy, seed=number % 4) for number in range(count)]


def learner_of(draft: PreTrainedModel, target: PreTrainedModel, **settings: Any) -> OnlineLearner:
    """Without the gate, so that every update goes live."""
    frozen = shared_with(draft, target)
    live = LiveWeights(draft, frozen)

    def publish(weights: Any, acceptance: float) -> None:
        live.publish(weights)

    chosen = {"update_every": 4, "batch_size": 4, "steps_per_update": 2, "learning_rate": 1e-2, "gate": False}
    learner = OnlineLearner(
        draft,
        OnlineConfig(**{**chosen, **settings}),
        publish,
        target=target,
        frozen=frozen,
        proposed=target.config.vocab_size,
    )
    learner.keep = publish  # type: ignore[attr-defined] # which the learner itself does not
    return learner
