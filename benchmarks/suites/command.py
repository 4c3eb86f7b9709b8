"""The suites from options to files: load, train or make the models, run each suite, print, write, draw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_osd.bench.command import Suite, make_console
from hf_osd.bench.figures import has_mismatch
from hf_osd.bench.session import Steps, open_steps
from hf_osd.config import FLAG, check_fields, optional, shown
from hf_osd.errors import ConfigError
from hf_osd.evaluation.machine import quiet
from hf_osd.evaluation.models import Pair
from hf_osd.evaluation.options import NAMES, OPTIONS
from hf_osd.evaluation.output import require_matplotlib
from hf_osd.evaluation.prompts import Prompt
from hf_osd.evaluation.streams import Stream, load_prompt_streams

from . import engine, lengths, promise, serving
from .floor import Floor
from .models import ModelOptions, Models, open_models
from .peers import PACKAGES, missing_peers
from .plots import DRAW, replot
from .results import SUITES
from .session import Session
from .tables import TABLES

_RUN: dict[str, Callable[[Session], dict[str, Any]]] = {
    "serving": serving.run,
    "engine": engine.run,
    "lengths": lengths.run,
    "promise": promise.run,
}
_SCRIPTED_SUITES = ("serving", "engine")  # the others ask what a draft knows
_RULES = {"suites": NAMES, "peers": FLAG, "eagle3": optional(OPTIONS["output"])}


@dataclass(frozen=True, kw_only=True)
class SuitesCommand(ModelOptions):
    """
    Options of `python -m benchmarks.suites`; its help explains each, and [`ModelOptions`] those of the models.

    Raises:
        ConfigError: A value is out of its range or contradicts another one.
    """

    suites: Sequence[str] = ()
    peers: bool = False
    eagle3: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _RULES)
        for suite in self.suites:
            if suite not in SUITES:
                raise ConfigError(f"suites are {', '.join(SUITES)}, got {shown(suite)}")
        unscripted = [suite for suite in self.suites if suite not in _SCRIPTED_SUITES]
        if self.models == "scripted" and unscripted:
            raise ConfigError(
                f"models='scripted' says nothing about {', '.join(unscripted)}: run {' or '.join(_SCRIPTED_SUITES)}"
            )
        if self.peers and self.models == "scripted":
            raise ConfigError(
                "peers=True means nothing with models='scripted': other packages cannot follow the script"
            )
        if self.eagle3 is not None and not (self.peers and self.eagle3.is_dir()):
            raise ConfigError(f"eagle3 must be a folder that exists, and peers=True, got {str(self.eagle3)!r}")

    def run(self, console: Console | None = None) -> bool:
        """Run the suites; each is printed and written as soon as it is done. See [`BenchCommand`]."""
        console = console or make_console()
        for line in missing_peers() if self.peers else ():
            console.print(line, soft_wrap=True, markup=False)
        self.prepare(is_embedded=self.is_embedded)
        with quiet(), open_steps(console) as steps:
            prompts = load_prompt_streams(self.prompts, self._prompt_count())
            models = open_models(self, steps)
            return self._run_suites(console, models, self._session(models, prompts, steps))

    def _run_suites(self, console: Console, models: Models, session: Session) -> bool:
        lossless, unwritten = True, None
        packages = PACKAGES if self.peers else ()
        for name in self._chosen():
            figures = _RUN[name](session)
            try:
                self.report(
                    console, Suite(name, TABLES[name], DRAW[name]), figures, models.pair, models.about, *packages
                )
            except ConfigError as error:  # the other suites may take hours, and are printed all the same
                unwritten = error
            lossless = lossless and not has_mismatch(figures)
        if unwritten is not None:
            raise unwritten
        return lossless

    def _chosen(self) -> list[str]:
        known = _SCRIPTED_SUITES if self.models == "scripted" else SUITES
        return [suite for suite in known if suite in self.suites or not self.suites]

    def _session(self, models: Models, prompts: dict[str, list[Prompt]], steps: Steps) -> Session:
        pair = models.pair
        streams = [self.stream(pair, name, rows) for name, rows in prompts.items()]
        return Session(
            pair=pair,
            streams=streams,
            next_topic=self._next_topic(pair, streams) if "promise" in self._chosen() else None,
            floor=Floor({"target": pair.target, "draft": pair.draft}),
            max_new_tokens=self.max_new_tokens,
            steps=steps,
            compiles=self.compiles(pair),
            learns=models.script is None,
            script=models.script,
            seed=self.seed,
            batch=self.batch,
            peers=self.peers,
            eagle3=self.eagle3,
        )

    def _next_topic(self, pair: Pair, streams: Sequence[Stream]) -> Stream:
        if len(streams) > 1:
            return streams[1]
        return self.stream(pair, "code", promise.other_topic(self._prompt_count()))

    def _prompt_count(self) -> int:
        """Return how many prompts of a stream to read: a batch of them warms up, and the promise has larger ones."""
        batched = promise.BATCH * promise.BATCHES if "promise" in self._chosen() else self.batch
        return max(self.requests, batched) + self.batch


def run_replot(folder: Path, console: Console | None = None) -> None:
    """
    Draw the plots of a folder of results again.

    Raises:
        InputError: There is no result in the folder.
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    for path in replot(folder):
        (console or make_console()).print(f"Plot:    {path}", soft_wrap=True, markup=False)
