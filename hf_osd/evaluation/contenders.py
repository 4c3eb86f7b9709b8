"""The ways to decode that are compared, each behind the same one method; rows of a batch share a call."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from time import perf_counter
from typing import Any, Protocol, Self

import torch
from transformers import PreTrainedModel

from ..assistant import OnlineAssistant
from ..config import OnlineConfig
from ..drafts.machine import synchronize
from ..generation import generate
from ..serving.stopwatch import STAGES
from ..stats import OnlineStats
from .encoding import Inputs, columns_before
from .models import Pair, stock_helper


@dataclass(frozen=True, slots=True)
class Sample:
    """
    One contender's answers in figures: to one request, or the sum over several.

    Attributes:
        tokens (`int`): Columns generated times rows; padding behind a row's end counts.
        seconds (`float`): Wall-clock time of serving.
        learning_seconds (`float`): Time that the request further waited for an update of the draft.
        drafted, accepted (`int`):
            Drafted tokens that the target judged, up to and including the first refusal of each round, and those that
            it accepted; 0 where nobody says.
        lookups, accepted_lookups (`int`): The same of proposals that prompt lookup made, which are not among them.
        passes (`int`): Forwards of the target, counted once for each row that was still going on; 0 where nobody says.
        updates (`int`): Updates of the draft meanwhile.
        stages (`dict[str, float]`): Seconds by stage of a round, and of bookkeeping; empty where nobody says.
    """

    tokens: int = 0
    seconds: float = 0.0
    learning_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    lookups: int = 0
    accepted_lookups: int = 0
    passes: int = 0
    updates: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    @classmethod
    def total(cls, samples: Iterable[Self]) -> "Sample":
        """Sum up samples, but for their stages."""
        names = [one.name for one in fields(Sample) if one.name != "stages"]
        columns = zip(*([getattr(sample, name) for name in names] for sample in samples), strict=True)
        sums: dict[str, Any] = dict(zip(names, map(sum, columns), strict=False))
        return Sample(**sums)

    @property
    def tokens_per_second(self) -> float:
        """Speed of serving alone."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second_with_learning(self) -> float:
        """Speed with the waiting for updates counted in."""
        seconds = self.seconds + self.learning_seconds
        return self.tokens / seconds if seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """Share of the judged tokens of the draft that the target accepted; `None` where none is known."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def lookup_acceptance(self) -> float | None:
        """The same of prompt lookup's."""
        return self.accepted_lookups / self.lookups if self.lookups else None

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens for each forward of the target; `None` where the forwards are not known."""
        return self.tokens / self.passes if self.passes else None


class Contender(Protocol):
    """Answers a request and says what it cost."""

    @property
    def name(self) -> str:
        """What tables and plots call it."""
        ...

    @property
    def target(self) -> PreTrainedModel:
        """The model whose answers it gives."""
        ...

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Sample]:
        """
        Generate the answer to one request or one batch of them.

        Returns:
            `tuple[torch.LongTensor, Sample]`: The new tokens, of shape `(batch, new)`, and their figures.
        """
        ...


class Generate:
    """
    `model.generate` with whatever settings: plain, assisted, prompt lookup.

    Args:
        name (`str`): What to call it.
        target (`PreTrainedModel`): The model.
        draft (`PreTrainedModel`, *optional*): The assistant; a copy, since transformers keeps its schedule's state in
            the draft's generation config, where `settings` that name one of its fields go too.
        settings (`Mapping[str, Any]`, *optional*): Of the draft's generation config, or else of `generate`.
        tokenizers (`Mapping[str, Any]`, *optional*): Those of target and draft, as `generate` names them.
    """

    def __init__(
        self,
        name: str,
        target: PreTrainedModel,
        draft: PreTrainedModel | None = None,
        settings: Mapping[str, Any] | None = None,
        tokenizers: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.target = name, target
        self.draft = copy.copy(draft)  # shares the weights
        self._settings = dict(settings or {})
        if self.draft is not None:
            self.draft.generation_config = copy.deepcopy(self.draft.generation_config)
            self.draft.generation_config.update(**self._settings)
            self._settings = {"assistant_model": self.draft, **(tokenizers or {})}

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Sample]:
        """Generate with transformers alone."""
        target: Any = self.target
        return timed_answer(target.generate, inputs, options | self._settings | inputs, target)


def stock(name: str, pair: Pair) -> Generate:
    """Return transformers' assisted generation by its defaults; its prompt lookup where it cannot take the draft."""
    if takes_draft(pair):
        return assisted_by_stock(name, pair)
    return Generate(name, pair.target, settings=stock_helper(pair))


def takes_draft(pair: Pair) -> bool:
    """Whether transformers' assisted generation can take a draft."""
    return "assistant_model" in stock_helper(pair)


def assisted_by_stock(name: str, pair: Pair, settings: Mapping[str, Any] | None = None) -> Generate:
    """Return transformers' assisted generation by a draft that it takes, with settings of its own."""
    tokenizers = {which: one for which, one in stock_helper(pair).items() if which.endswith("tokenizer")}
    return Generate(name, pair.target, pair.draft, settings, tokenizers)


def assistant_of(pair: Pair, config: OnlineConfig, draft: PreTrainedModel | None = None) -> OnlineAssistant:
    """Return an assistant of a pair's draft, or of a copy of it."""
    given: dict[str, Any] = {"tokenizer": pair.draft_tokenizer, "target_tokenizer": pair.tokenizer}
    return OnlineAssistant(pair.draft if draft is None else draft, pair.target, config, **given)


@dataclass(frozen=True, slots=True)
class Assisted:
    """`hf_osd.generate`; what the draft did is the change in the assistant's own counters."""

    name: str
    target: PreTrainedModel
    assistant: OnlineAssistant

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Sample]:
        """Generate with the assistant, and tell serving from learning."""
        before = self.assistant.stats()
        decode = partial(generate, self.target, online_assistant=self.assistant)
        new, sample = timed_answer(decode, inputs, options | inputs, self.target)
        spent = self.assistant.stats() - before
        return new, Sample(
            tokens=sample.tokens,
            seconds=sample.seconds - spent.learn_seconds,
            learning_seconds=spent.learn_seconds,
            drafted=spent.draft_tokens,
            accepted=spent.accepted_tokens,
            lookups=spent.lookup_tokens,
            accepted_lookups=spent.accepted_lookup_tokens,
            passes=spent.target_passes,
            updates=spent.updates,
            stages=_stages(spent),
        )


def _stages(spent: OnlineStats) -> dict[str, float]:
    stages: dict[str, float] = {stage: getattr(spent, f"{stage}_seconds") for stage in STAGES}
    return stages | {"bookkeeping": spent.decode_seconds - sum(stages.values())}


def timed_answer(
    decode: Callable[..., Any], inputs: Inputs, options: Mapping[str, Any], target: PreTrainedModel
) -> tuple[torch.Tensor, Sample]:
    """Call what returns prompts with their answers; return the answers, `(batch, new)`, and what they took."""
    output, seconds = timed(lambda: decode(**options), target.device)
    new = output[:, columns_before(target, inputs) :].cpu()
    return new, Sample(tokens=new.numel(), seconds=seconds)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Run `work` and return its result and wall-clock seconds, the accelerator's queue included."""
    synchronize(device)
    start = perf_counter()
    result = work()
    synchronize(device)
    return result, perf_counter() - start
