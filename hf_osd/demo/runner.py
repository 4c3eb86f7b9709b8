"""The run itself: every request goes to every contender, interleaved, in one process, with the same weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ..config import FLAG, OnlineConfig, check_fields, integer, optional
from .contenders import Contender, open_contenders
from .models import Inputs, Pair, encode_prompts, generate_options
from .options import OPTIONS, SECONDS, SEEDS
from .prompts import Prompt
from .results import PLAIN, DemoResult, Difference, Round

NEAR_TIE = 1e-4
_RULES = {
    "requests": OPTIONS["requests"],
    "max_new_tokens": OPTIONS["max_new_tokens"],
    "draft_length": integer(1, 1024),
    "sample": FLAG,
    "seed": OPTIONS["seed"],
    "budget_seconds": optional(SECONDS),
}


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """
    Settings of a run.

    Args:
        requests (`int`, defaults to 160): Requests to serve.
        max_new_tokens (`int`, defaults to 48): Longest answer.
        draft_length (`int`, defaults to 8): Tokens that our contenders draft in a round, at most.
        update_every (`int`, defaults to 8): Requests between two updates of the online draft.
        sample (`bool`, defaults to `False`): Sample instead of decoding greedily; outputs are then not compared.
        seed (`int`, defaults to 0): Seed of sampling and of learning.
        budget_seconds (`float`, *optional*): Time after which no further request starts.

    Raises:
        ConfigError: A value is out of its range.
    """

    requests: int = 160
    max_new_tokens: int = 48
    draft_length: int = 8
    update_every: int = 8
    sample: bool = False
    seed: int = 0
    budget_seconds: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, _RULES)
        OnlineConfig(**self._online)  # checks the rest

    @property
    def _online(self) -> dict[str, Any]:
        return {"draft_length": self.draft_length, "update_every": self.update_every, "seed": self.seed}

    def online_config(self, draft: PreTrainedModel) -> OnlineConfig:
        """Return the settings of the online contender; what they leave open, the draft recommends."""
        return OnlineConfig.for_draft(draft, **self._online)


class Observer(Protocol):
    """Watches a run."""

    def on_round(self, result: DemoResult) -> None:
        """Take note that `result` has one more round."""
        ...


def run_demo(
    pair: Pair, prompts: Sequence[Prompt], settings: DemoSettings, observer: Observer, started: float | None = None
) -> DemoResult:
    """
    Serve the prompts by every contender and compare them.

    Args:
        pair (`Pair`): The models.
        prompts (`Sequence[Prompt]`): One more than the requests, where there are enough: the last one warms up.
        settings (`DemoSettings`): What to run.
        observer (`Observer`): Hears of every round.
        started (`float`, *optional*): When the time budget began, by `time.perf_counter`; now by default.

    Returns:
        `DemoResult`: Figures of every round.
    """
    deadline = (perf_counter() if started is None else started) + (settings.budget_seconds or float("inf"))
    inputs = encode_prompts(pair, prompts, settings.max_new_tokens)
    options = generate_options(pair, settings.max_new_tokens, sample=settings.sample)
    config = settings.online_config(pair.draft)
    result = DemoResult()
    with open_contenders(pair, config, replace(config, learn=False)) as contenders:
        _warm_up(contenders, inputs[-1], options)
        for index, request in enumerate(inputs[: settings.requests]):
            if result.rounds and perf_counter() > deadline:
                result.stopped_early = True
                break
            result.rounds.append(_play(contenders, request, index, pair, settings, options))
            observer.on_round(result)
    return result


def _warm_up(contenders: Sequence[Contender], request: Inputs, options: dict[str, Any]) -> None:
    """Answer one request that does not count: first calls pay for allocations that later ones do not."""
    for contender in contenders:
        contender.answer(request, **options)


def _play(
    contenders: Sequence[Contender],
    request: Inputs,
    index: int,
    pair: Pair,
    settings: DemoSettings,
    options: dict[str, Any],
) -> Round:
    """Let every contender answer one request; who goes first changes with every request."""
    turn = index % len(contenders)
    outputs, measures = {}, {}
    for contender in (*contenders[turn:], *contenders[:turn]):
        torch.manual_seed((settings.seed + index) % SEEDS)
        outputs[contender.name], measures[contender.name] = contender.answer(request, **options)
    if settings.sample:
        return Round(measures)
    return Round(measures, tuple(find_differences(pair.target, request, outputs, index)))


def find_differences(target: Any, request: Inputs, outputs: dict[str, torch.Tensor], index: int) -> list[Difference]:
    """
    Compare greedy outputs with plain decoding, token for token.

    Args:
        target (`PreTrainedModel`): Says how far apart its two best tokens are where an output differs.
        request (`Inputs`): The request.
        outputs (`dict[str, torch.LongTensor]`): New tokens by contender, each of shape `(new,)`.
        index (`int`): Index of the request.
    """
    reference = outputs[PLAIN]
    found = []
    for name, output in outputs.items():
        if not torch.equal(output, reference):
            position = _first_difference(output, reference)
            gap, tolerance = _gap(target, request, reference[:position])
            found.append(Difference(index, name, position, gap, near_tie=gap <= tolerance))
    return found


def _first_difference(output: torch.Tensor, reference: torch.Tensor) -> int:
    shared = min(len(output), len(reference))
    unequal = (output[:shared] != reference[:shared]).nonzero()
    return int(unequal[0]) if len(unequal) else shared


@torch.no_grad()
def _gap(target: Any, request: Inputs, committed: torch.Tensor) -> tuple[float, float]:
    """
    Return the distance between the two largest logits after `committed`, and the largest one that rounding explains.

    One pass over several tokens and several passes over one round differently. In float32 that is below 1e-4; in half
    precision it is a few units in the last place of the logits themselves.
    """
    ids = torch.cat([request["input_ids"], committed.to(request["input_ids"]).unsqueeze(0)], dim=1)
    logits = target(ids).logits[0, -1]
    best, second = logits.float().topk(2).values.tolist()
    return best - second, max(NEAR_TIE, 4 * torch.finfo(logits.dtype).eps * abs(best))
