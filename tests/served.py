"""Requests as a live draft has served them, and its learner, whose publishing can be held up."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from traffic import VOCAB, llama
from transformers import LlamaForCausalLM

from hf_osd.config import OnlineConfig
from hf_osd.learning.online import OnlineLearner
from hf_osd.records import Observation

Weights = dict[str, torch.Tensor]

TARGET = llama(seed=1, layers=2)


def request(draft: LlamaForCausalLM, number: int, k: int = 16) -> Observation:
    """A request from a small domain, served greedily: the target's tokens, and what the draft would propose."""
    generator = torch.Generator().manual_seed(number % 12)
    prompt = torch.randint(0, VOCAB, (4,), generator=generator)
    with torch.inference_mode():
        ids = TARGET.generate(prompt[None], max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0]
        log_probs = TARGET(ids[None]).logits[0, 3:-1].log_softmax(-1)
        proposed = draft(ids[None]).logits[0, 3:-1].argmax(-1)
        values, top = log_probs.topk(k)
    tail = (1.0 - values.exp().sum(-1)).clamp(min=0.0)
    return Observation(prompt, ids[4:], top, values, tail, proposed, proposed == ids[4:])


class Live:
    """A live draft that takes published weights, and remembers them."""

    def __init__(self) -> None:
        self.draft = llama()
        self.published: list[Weights] = []
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def publish(self, weights: Mapping[str, torch.Tensor], acceptance: float) -> None:
        self.entered.set()
        assert self.go_on.wait(60.0)
        parameters = dict(self.draft.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        self.published.append({name: weight.clone() for name, weight in weights.items()})


def learner_of(live: Live, **settings: Any) -> OnlineLearner:
    """Without the gate, so that every update is published, and can be counted."""
    chosen = {"update_every": 4, "batch_size": 4, "gate": False, **settings}
    return OnlineLearner(live.draft, OnlineConfig(**chosen), live.publish)
