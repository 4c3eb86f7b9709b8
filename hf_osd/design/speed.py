"""Measures how fast drafts serve, against plain decoding, request by request in turn."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from ..assistant import OnlineAssistant
from ..config import OnlineConfig
from ..drafts.features import FeatureDraft
from ..evaluation.contenders import Assisted, Generate, Sample
from ..evaluation.encoding import as_inputs, end_tokens
from ..evaluation.models import greedy_options
from ..evaluation.race import run_race, total

PLAIN = "plain"
NEW_TOKENS = 64
"""Most tokens of a timed answer."""


def measure_speeds(
    target: PreTrainedModel,
    drafts: Mapping[str, FeatureDraft],
    prompts: Sequence[torch.Tensor],
    new_tokens: int = NEW_TOKENS,
    tell: Callable[[int], object] = lambda done: None,
) -> dict[str, Sample]:
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
        `dict[str, Sample]`: By name of the draft, and `"plain"`.
    """
    ends = end_tokens(target)
    warm_up, *requests = (as_inputs(prompt.to(target.device)) for prompt in prompts)
    options = greedy_options(ends[0] if ends else 0, new_tokens)
    with ExitStack() as stack:
        served = {
            name: stack.enter_context(OnlineAssistant(draft, target, OnlineConfig(learn=False)))
            for name, draft in drafts.items()
        }
        ours = [Assisted(name, target, one) for name, one in served.items()]
        race = run_race(
            [Generate(PLAIN, target), *ours],
            requests,
            options,
            lambda race: tell(len(race.rounds) + 1),
            warm_up=warm_up,
        )
    return {name: total(race.rounds, name) for name in (PLAIN, *drafts)}
