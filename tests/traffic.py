"""Requests as a server would record them, of tiny targets, and a live draft that takes what learning publishes."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_osd.config import OnlineConfig
from hf_osd.learning.online import OnlineLearner
from hf_osd.records import Observation

VOCAB = 64


def llama(seed: int = 0, layers: int = 1, **options: Any) -> LlamaForCausalLM:
    """A model of a few thousand random weights, in float32."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = LlamaConfig(**{"vocab_size": VOCAB, "initializer_range": 0.2, **sizes, **options})
    model = LlamaForCausalLM(config).eval()
    torch.set_rng_state(state)
    return model


@torch.no_grad()
def recorded(
    target: PreTrainedModel, prompt: torch.Tensor, length: int = 12, greedy: bool = True, k: int = 16, seed: int = 0
) -> Observation:
    """What serving records of one request, with a draft that is always wrong."""
    generator = torch.Generator().manual_seed(seed)
    ids = prompt
    for _ in range(length):
        logits = target(ids[None]).logits[0, -1].float()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True) if greedy else drawn))
    log_probs = target(ids[None]).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    values, top = log_probs.topk(k)
    output, tail = ids[len(prompt) :], (1.0 - values.exp().sum(-1)).clamp(min=0.0)
    wrong = (output + 1) % log_probs.shape[-1]
    return Observation(prompt, output, top, values, tail, wrong, torch.zeros_like(output, dtype=torch.bool))


@cache
def target(seed: int = 1) -> LlamaForCausalLM:
    """The model whose outputs are the traffic; another seed makes other traffic."""
    return llama(seed, layers=2)


@cache
def request(number: int, seed: int = 1) -> Observation:
    """One of twelve requests of a small domain, decoded greedily."""
    generator = torch.Generator().manual_seed(number % 12)
    return recorded(target(seed), torch.randint(0, VOCAB, (4,), generator=generator))


class Live:
    """A live draft that takes published weights, and remembers them."""

    def __init__(self, **options: Any) -> None:
        self.draft = llama(**options)
        self.published: list[dict[str, torch.Tensor]] = []

    def publish(self, weights: Mapping[str, torch.Tensor], acceptance: float) -> None:
        """Copy the weights, as an assistant does."""
        parameters = dict(self.draft.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        self.published.append({name: weight.clone() for name, weight in weights.items()})

    def learner(self, **settings: Any) -> OnlineLearner:
        """A learner that updates often, at a rate that teaches so small a draft something."""
        chosen = {"update_every": 4, "batch_size": 4, "learning_rate": 1e-2, **settings}
        return OnlineLearner(self.draft, OnlineConfig(**chosen), self.publish)
