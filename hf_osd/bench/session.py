"""What every suite gets: models, streams, settings, a race, and someone to tell how far it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..assistant import OnlineAssistant
from ..config import OnlineConfig
from ..demo.models import Inputs, Pair, generate_options
from .contenders import Assisted, Contender
from .floor import Floor
from .race import Race, run_race
from .scripted import Script
from .streams import Stream

Steps = Callable[[str, int], Callable[[], None]]
"""Announces a piece of work and its number of steps; what it returns is called after each."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """
    One run of the benchmark.

    Attributes:
        pair (`Pair`): The models.
        streams (`Sequence[Stream]`): What is served.
        next_topic (`Stream`, *optional*): Where the topic of the first stream suddenly changes to.
        floor (`Floor`): Replays the pair's forwards.
        max_new_tokens (`int`): Longest answer.
        steps (`Steps`): Shows progress.
        compiles (`bool`): Whether compiled plain decoding takes part.
        script (`Script`, *optional*): What the draft says, where it is scripted.
        seed (`int`): Seed of learning and of random weights.
        batch (`int`): Rows of a request in the suite `serving`.
        peers (`bool`): Whether other packages take part in it.
        eagle3 (`Path`, *optional*): economize's trained `eagle3`, for these.
    """

    pair: Pair
    streams: Sequence[Stream]
    floor: Floor
    max_new_tokens: int
    steps: Steps
    next_topic: Stream | None = None
    compiles: bool = False
    script: Script | None = None
    seed: int = 0
    batch: int = 1
    peers: bool = False
    eagle3: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What every contender's `generate` receives."""
        return generate_options(self.pair, self.max_new_tokens)

    def static(self, **settings: Any) -> OnlineConfig:
        """Return the settings of an assistant that does not learn."""
        return self.online(learn=False, **settings)

    def online(self, **settings: Any) -> OnlineConfig:
        """Return the settings of an assistant; prompt lookup would only find what random weights repeat."""
        if self.script is not None:
            settings |= {"prompt_lookup": False}
        return OnlineConfig(**{"seed": self.seed, **settings})

    def assisted(
        self, stack: ExitStack, name: str, config: OnlineConfig, draft: PreTrainedModel | None = None
    ) -> Assisted:
        """Set up a contender of ours, with the pair's draft where none is given, until the stack closes."""
        pair = self.pair
        assistant = OnlineAssistant(pair.draft if draft is None else draft, pair.target, config)
        return Assisted(name, pair.target, stack.enter_context(assistant))

    def race(
        self,
        contenders: Sequence[Contender],
        requests: Sequence[Inputs],
        title: str | None = None,
        *,
        warm_up: Inputs | None = None,
        floor: Floor | None = None,
    ) -> Race:
        """Run a race with the settings of this run; its progress is shown under the title. See [`run_race`]."""
        return run_race(
            contenders,
            requests,
            self.options,
            self.steps(title, len(requests)) if title else lambda: None,
            warm_up=warm_up,
            prepare=self._prepare,
            floor=floor,
        )

    def _prepare(self, request: Inputs) -> None:
        """Tell a scripted draft what the target is about to say."""
        if self.script is not None:
            self.script.learn_answer(self.pair.target, request, self.options)


@contextmanager
def without_eos(pair: Pair) -> Iterator[None]:
    """Let every row run to its full length, so that a point of measurement is what it says it is."""
    configs = [model.generation_config for model in (pair.target, pair.draft)]
    before = [config.eos_token_id for config in configs]
    for config in configs:
        config.eos_token_id = None
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.eos_token_id = value
