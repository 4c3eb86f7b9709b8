"""The ways to decode that the benchmark compares, each behind the same one method; rows of a batch share a call."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache

from .._compat import cache_argument
from ..assistant import OnlineAssistant
from ..demo.contenders import timed
from ..demo.models import Inputs
from ..generation import generate
from ..serving.stopwatch import STAGES
from ..stats import OnlineStats
from .shapes import CallRecorder, FeedRecorder, Shape, ShapeRecorder


@dataclass(frozen=True, slots=True)
class Sample:
    """
    One contender's answer to one request, in figures.

    Attributes:
        tokens (`int`): Columns generated times rows; padding behind a row's end counts.
        seconds (`float`): Wall-clock time of serving.
        learning_seconds (`float`): Time that the request further waited for an update of the draft.
        drafted, accepted (`int`): Proposed tokens that the target judged, and accepted; 0 where nobody says.
        lookups, accepted_lookups (`int`): The same of proposals that prompt lookup made, which are not among them.
        passes (`int`): Forwards of the target, counted once for each row that was still going on; 0 where nobody says.
        stages (`dict[str, float]`): Seconds by stage of a round, and of bookkeeping; empty where nobody says.
        forwards (`Sequence[Shape]`): All forwards, in order; empty where they cannot be seen.
        floor (`float`, *optional*): Seconds that these take when replayed, where they were.
    """

    tokens: int
    seconds: float
    learning_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    lookups: int = 0
    accepted_lookups: int = 0
    passes: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    forwards: Sequence[Shape] = ()
    floor: float | None = None

    @property
    def rounds(self) -> int:
        """Forwards of the target, the prompt's among them."""
        return sum(shape.model == "target" for shape in self.forwards)

    @property
    def efficiency(self) -> float | None:
        """Share of the time that the forwards alone would have taken."""
        return None if self.floor is None else self.floor / self.seconds


class Contender(Protocol):
    """Answers a request and says what it cost."""

    @property
    def name(self) -> str:
        """What tables and plots call it."""
        ...

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The models whose forwards it runs, as `"target"` and `"draft"`."""
        ...

    def recorder(self) -> ShapeRecorder:
        """Return what notes the forwards of an answer."""
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
    """

    def __init__(
        self,
        name: str,
        target: PreTrainedModel,
        draft: PreTrainedModel | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._target: Any = target
        self._draft = copy.copy(draft)  # shares the weights
        self._settings = dict(settings or {})
        if self._draft is not None:
            self._draft.generation_config = copy.deepcopy(self._draft.generation_config)
            self._draft.generation_config.update(**self._settings)
            self._settings = {"assistant_model": self._draft}

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """See [`Contender`]."""
        return {"target": self._target} | ({} if self._draft is None else {"draft": self._draft})

    def recorder(self) -> ShapeRecorder:
        """See [`Contender`]."""
        return CallRecorder(self.models)

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Sample]:
        """Generate with transformers alone."""
        options |= self._settings | inputs
        output, seconds = timed(lambda: self._target.generate(**options), self._target.device)
        new = _new_tokens(output, inputs)
        return new, Sample(tokens=new.numel(), seconds=seconds)


class CompiledGenerate:
    """
    Plain `generate` over transformers' static cache, which makes it compile the model's forward.

    Args:
        name (`str`): What to call it.
        target (`PreTrainedModel`): The model.
        capacity (`int`): Columns of the longest request, its answer included: one cache serves all of them, so that
            nothing is compiled again.
        compiles (`bool`, defaults to `True`): Whether to compile; on the CPU transformers would not by itself.
    """

    def __init__(self, name: str, target: PreTrainedModel, capacity: int, *, compiles: bool = True) -> None:
        self.name = name
        self.models = {"target": target}
        self._cache = StaticCache(config=target.config, max_cache_len=capacity)
        self._options: dict[str, Any] = {"disable_compile": not compiles}
        if compiles and target.device.type == "cpu":
            self._options["compile_config"] = CompileConfig()
            self._options["compile_config"]._compile_all_devices = True

    def recorder(self) -> ShapeRecorder:
        """Compiled forwards cannot be seen, and a hook would have them compiled again; see [`Contender`]."""
        return CallRecorder({})

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Sample]:
        """Generate into the one cache."""
        self._cache.reset()
        target: Any = self.models["target"]
        options |= {**self._options, **inputs, **cache_argument((), self._cache)}
        output, seconds = timed(lambda: target.generate(**options), target.device)
        new = _new_tokens(output, inputs)
        return new, Sample(tokens=new.numel(), seconds=seconds)


@dataclass(frozen=True, slots=True)
class Assisted:
    """`hf_osd.generate`; what the draft did is the change in the assistant's own counters."""

    name: str
    target: PreTrainedModel
    assistant: OnlineAssistant

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """See [`Contender`]."""
        return {"target": self.target, "draft": self.assistant.draft}

    def recorder(self) -> ShapeRecorder:
        """See [`Contender`]."""
        return FeedRecorder(self.models)

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Sample]:
        """Generate with the assistant, and tell serving from learning."""
        before = self.assistant.stats()
        options |= inputs
        output, seconds = timed(
            lambda: generate(self.target, online_assistant=self.assistant, **options), self.target.device
        )
        spent = self.assistant.stats() - before
        new = _new_tokens(output, inputs)
        return new, Sample(
            tokens=new.numel(),
            seconds=seconds - spent.learn_seconds,
            learning_seconds=spent.learn_seconds,
            drafted=spent.draft_tokens,
            accepted=spent.accepted_tokens,
            lookups=spent.lookup_tokens,
            accepted_lookups=spent.accepted_lookup_tokens,
            passes=spent.target_passes,
            stages=_stages(spent),
        )


def _stages(spent: OnlineStats) -> dict[str, float]:
    stages: dict[str, float] = {stage: getattr(spent, f"{stage}_seconds") for stage in STAGES}
    return stages | {"bookkeeping": spent.decode_seconds - sum(stages.values())}


def _new_tokens(output: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    return output[:, inputs["input_ids"].shape[1] :].cpu()
