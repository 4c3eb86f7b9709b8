"""What a suite gets: models, streams, settings, a race, and someone to tell how far it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from transformers import PreTrainedModel

from ..config import OnlineConfig
from ..evaluation.contenders import Assisted, Contender, assistant_of
from ..evaluation.encoding import Inputs
from ..evaluation.models import Pair, generate_options
from ..evaluation.race import Race, run_race
from ..evaluation.streams import Stream
from .figures import report

Steps = Callable[[str, int], Callable[[], None]]
"""Announces a piece of work and its number of steps; what it returns is called after each."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """
    One run of the benchmark.

    Attributes:
        pair (`Pair`): The models.
        streams (`Sequence[Stream]`): What is served.
        max_new_tokens (`int`): Longest answer.
        steps (`Steps`): Shows progress.
        compiles (`bool`): Whether compiled plain decoding takes part.
        learns (`bool`): Whether a draft that learns takes part.
        seed (`int`): Seed of learning.
        batch (`int`): Rows of a request.
    """

    pair: Pair
    streams: Sequence[Stream]
    max_new_tokens: int
    steps: Steps
    compiles: bool = False
    learns: bool = True
    seed: int = 0
    batch: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """What every contender's `generate` receives."""
        return generate_options(self.pair, self.max_new_tokens)

    def static(self, **settings: Any) -> OnlineConfig:
        """Return the settings of an assistant that does not learn."""
        return self.online(learn=False, **settings)

    def online(self, **settings: Any) -> OnlineConfig:
        """Return the settings of an assistant; what they leave open, the draft recommends."""
        return OnlineConfig.for_draft(self.pair.draft, **{"seed": self.seed, **settings})

    def assisted(
        self, stack: ExitStack, name: str, config: OnlineConfig, draft: PreTrainedModel | None = None
    ) -> Assisted:
        """Set up a contender of ours, with the pair's draft where none is given, until the stack closes."""
        assistant = assistant_of(self.pair, config, draft)
        return Assisted(name, self.pair.target, stack.enter_context(assistant))

    def race(
        self, contenders: Sequence[Contender], requests: Sequence[Inputs], title: str = "", **settings: Any
    ) -> Race:
        """Run a race with the settings of this run; its progress is shown under the title. See [`run_race`]."""
        done = self.steps(title, len(requests)) if title else lambda: None
        return run_race(contenders, requests, self.options, lambda race: done(), seed=self.seed, **settings)

    def measure(
        self, contenders: Sequence[Contender], requests: Sequence[Inputs], title: str = "", **settings: Any
    ) -> tuple[Race, dict[str, Any]]:
        """Run a race whose figures count; return it with them. See [`race`]."""
        race = self.race(contenders, requests, title, **settings)
        return race, report(race)


@contextmanager
def open_steps(console: Console) -> Iterator[Steps]:
    """Show a bar for each piece of work on a terminal, and nothing elsewhere."""
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:

        def steps(description: str, total: int) -> Callable[[], None]:
            task = progress.add_task(escape(description), total=total)

            def done() -> None:
                progress.advance(task)
                if progress.tasks[task].finished:
                    progress.update(task, visible=False)

            return done

        yield steps
