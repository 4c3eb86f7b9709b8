"""Measures how fast drafts serve, against plain decoding, request by request in turn."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..assistant import OnlineAssistant
from ..config import OnlineConfig
from ..demo.contenders import timed
from ..drafts.features import FeatureDraft
from ..generation import generate
from .writing import end_tokens

PLAIN = "plain"
NEW_TOKENS = 64
"""Most tokens of a timed answer."""

Answer = Callable[[torch.Tensor], Any]


@dataclass(frozen=True, slots=True)
class Speed:
    """
    The speed of a way of decoding.

    Attributes:
        tokens (`int`): Tokens generated.
        seconds (`float`): Time they took.
    """

    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second; 0 where nothing was timed."""
        return self.tokens / self.seconds if self.seconds else 0.0


def measure_speeds(
    target: PreTrainedModel,
    drafts: Mapping[str, FeatureDraft],
    prompts: Sequence[torch.Tensor],
    new_tokens: int = NEW_TOKENS,
    tell: Callable[[int], object] = lambda done: None,
) -> dict[str, Speed]:
    """
    Serve prompts greedily, plainly and with each draft. The drafts do not learn.

    The first prompt warms up and is not counted. The order changes with every prompt.

    Args:
        target (`PreTrainedModel`): The target.
        drafts (`Mapping[str, FeatureDraft]`): The drafts, by name.
        prompts (`Sequence[torch.LongTensor]`): At least two, each of shape `(prompt,)`.
        new_tokens (`int`, defaults to 64): Longest answer.
        tell (`Callable[[int], object]`, *optional*): Told how many prompts are answered.

    Returns:
        `dict[str, Speed]`: By name of the draft, and `"plain"`.
    """
    spent: dict[str, list[Speed]] = {name: [] for name in (PLAIN, *drafts)}
    with ExitStack() as stack:
        ways = {PLAIN: _plain(target, new_tokens)}
        for name, draft in drafts.items():
            assistant = stack.enter_context(OnlineAssistant(draft, target, OnlineConfig(learn=False)))
            ways[name] = _assisted(target, assistant, new_tokens)
        for number, prompt in enumerate(prompts):
            ids, turn = prompt[None].to(target.device), number % len(ways)
            for name in ([*ways] * 2)[turn : turn + len(ways)]:
                output, seconds = timed(partial(ways[name], ids), target.device)
                spent[name].append(Speed(output.shape[1] - ids.shape[1], seconds))
            tell(number + 1)
    return {name: _total(counted[1:]) for name, counted in spent.items()}


def _total(counted: Sequence[Speed]) -> Speed:
    return Speed(sum(one.tokens for one in counted), sum(one.seconds for one in counted))


def _options(target: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    ends = end_tokens(target)
    settings = {
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }  # a checkpoint's own values would warn
    return {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": ends[0] if ends else 0,
        **settings,
    }


def _plain(target: Any, new_tokens: int) -> Answer:
    return lambda ids: target.generate(ids, **_options(target, ids, new_tokens))


def _assisted(target: PreTrainedModel, assistant: OnlineAssistant, new_tokens: int) -> Answer:
    return lambda ids: generate(target, ids, online_assistant=assistant, **_options(target, ids, new_tokens))
