"""The four ways to answer a request that the demo compares, each behind the same one method."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import torch

from ..assistant import OnlineAssistant
from ..config import OnlineConfig
from ..generation import generate
from .models import Inputs, Pair, stock_helper
from .results import ONLINE, PLAIN, STATIC, STOCK, Measure


class Contender(Protocol):
    """Answers a request and says what it cost."""

    @property
    def name(self) -> str:
        """One of `results.CONTENDERS`."""
        ...

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Measure]:
        """
        Generate the answer to one request.

        Returns:
            `tuple[torch.LongTensor, Measure]`: The new tokens, of shape `(new,)`, and their figures.
        """
        ...


@dataclass(frozen=True, slots=True)
class TransformersContender:
    """`model.generate` as it comes: plain, or assisted with transformers' own defaults."""

    name: str
    target: Any
    helper: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Measure]:
        """Generate with transformers alone."""
        options |= self.helper
        output, seconds = timed(lambda: self.target.generate(**inputs, **options), self.target.device)
        new = _new_tokens(output, inputs)
        return new, Measure(tokens=len(new), seconds=seconds)


@dataclass(frozen=True, slots=True)
class AssistantContender:
    """`hf_osd.generate`; what the draft did is the change in the assistant's own counters."""

    name: str
    target: Any
    assistant: OnlineAssistant

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Measure]:
        """Generate with the assistant, and tell serving from learning."""
        before = self.assistant.stats()
        options |= inputs
        output, seconds = timed(
            lambda: generate(self.target, online_assistant=self.assistant, **options), self.target.device
        )
        spent = self.assistant.stats() - before
        new = _new_tokens(output, inputs)
        return new, Measure(
            tokens=len(new),
            seconds=seconds - spent.learn_seconds,
            learning_seconds=spent.learn_seconds,
            drafted=spent.draft_tokens,
            accepted=spent.accepted_tokens,
            passes=spent.target_passes,
            updates=spent.updates,
        )


@contextmanager
def open_contenders(pair: Pair, config: OnlineConfig, static: OnlineConfig) -> Iterator[list[Contender]]:
    """
    Set up plain, transformers' assisted, static and online decoding over one target.

    Args:
        pair (`Pair`): The models. Each contender gets a copy of the draft, so that none sees what another one learns.
        config (`OnlineConfig`): Settings of the online contender.
        static (`OnlineConfig`): Settings of the static one, the same but for `learn=False`.
    """
    with ExitStack() as stack:
        fixed, learner = (
            stack.enter_context(OnlineAssistant(copy.deepcopy(pair.draft), pair.target, config=one))
            for one in (static, config)
        )
        yield [
            TransformersContender(PLAIN, pair.target),
            TransformersContender(STOCK, pair.target, stock_helper(copy.deepcopy(pair.draft))),
            AssistantContender(STATIC, pair.target, fixed),
            AssistantContender(ONLINE, pair.target, learner),
        ]


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Run `work` and return its result and wall-clock seconds, the accelerator's queue included."""
    synchronize(device)
    start = perf_counter()
    result = work()
    synchronize(device)
    return result, perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator's queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _new_tokens(output: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    return output[0, inputs["input_ids"].shape[1] :].cpu()
