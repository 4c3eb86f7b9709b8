"""The benchmark from options to files: load or train, run each suite, print, write, draw."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ..config import FLAG, check_fields, integer, optional, reason_of, shown
from ..demo.environment import machine, quiet, versions
from ..demo.models import Pair, resolve_device
from ..demo.options import NAMES, OPTIONS
from ..demo.output import try_output, writing
from ..demo.plot import require_matplotlib
from ..demo.prompts import Prompt
from ..errors import ConfigError
from . import engine, lengths, promise, serving
from .floor import Floor
from .models import ModelOptions, Models, open_models
from .peers import PACKAGES, missing_peers
from .plots import replot, write_plot
from .results import SUITES, read_result, rounded, write_result
from .session import Session, Steps
from .streams import Stream, load_prompt_streams, make_stream, other_topic
from .tables import print_result

_RUN: dict[str, Callable[[Session], dict[str, Any]]] = {
    "serving": serving.run,
    "engine": engine.run,
    "lengths": lengths.run,
    "promise": promise.run,
}
_SCRIPTED_SUITES = ("serving", "engine")  # the others ask what a draft knows
_RULES = {name: OPTIONS[name] for name in ("requests", "max_new_tokens", "threads", "output", "plot")} | {
    "suites": NAMES,
    "prompts": NAMES,
    "compiled": optional(FLAG),
    "batch": integer(1, 2**16),
    "peers": FLAG,
    "eagle3": optional(OPTIONS["output"]),
}
_FILE_WIDTH = 160  # characters of a line that nobody wraps
_EMBEDDED_THREADS = 1  # more of them only wait for one another in a model of this size


@dataclass(frozen=True, kw_only=True)
class BenchCommand(ModelOptions):
    """
    Options of `hf-osd bench`; its help explains each, and [`ModelOptions`] those of the models.

    Raises:
        ConfigError: A value is out of its range or contradicts another one.

    Example:

    ```python
    >>> BenchCommand(suites=["serving"], prompts=["gsm8k.jsonl", "spider.jsonl"]).run()
    ```
    """

    suites: Sequence[str] = ()
    prompts: Sequence[str] = ()
    requests: int = 32
    max_new_tokens: int = 64
    compiled: bool | None = None
    batch: int = 1
    peers: bool = False
    eagle3: Path | None = None
    threads: int | None = None
    output: Path = Path("runs/bench")
    plot: bool = True

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
        """
        Run the suites; each is printed and written as soon as it is done.

        Args:
            console (`Console`, *optional*): Where to print; standard output by default.

        Returns:
            `bool`: Whether every output was the target's own, near ties of its two best tokens apart.

        Raises:
            HfOsdError: The run cannot start, or its files cannot be written, after all figures were printed.
        """
        console = console or make_console()
        for line in missing_peers() if self.peers else ():
            console.print(line, soft_wrap=True, markup=False)
        if self.plot:
            require_matplotlib()
        try_output(self.output)
        if self.compiled:
            try_compiling(self.device)
        threads = self.threads or (_EMBEDDED_THREADS if self.is_embedded else None)
        if threads is not None:
            torch.set_num_threads(threads)
        with quiet(), _progress(console) as steps:
            prompts = load_prompt_streams(self.prompts, self._prompt_count())
            models = open_models(self, steps)
            return self._run_suites(console, models, self._session(models, prompts, steps))

    def _run_suites(self, console: Console, models: Models, session: Session) -> bool:
        lossless, unwritten = True, None
        for suite in self._chosen():
            figures = _RUN[suite](session)
            try:
                self._report(console, suite, models, figures)
            except ConfigError as error:  # the other suites may take hours, and are printed all the same
                unwritten = error
            lossless = lossless and not _mismatches(figures)
        if unwritten is not None:
            raise unwritten
        return lossless

    def _chosen(self) -> list[str]:
        known = _SCRIPTED_SUITES if self.models == "scripted" else SUITES
        return [suite for suite in known if suite in self.suites or not self.suites]

    def _session(self, models: Models, prompts: dict[str, Any], steps: Steps) -> Session:
        pair = models.pair
        streams = [self._stream(pair, name, rows) for name, rows in prompts.items()]
        on_gpu = pair.target.device.type == "cuda"
        return Session(
            pair=pair,
            streams=streams,
            next_topic=self._next_topic(pair, streams) if "promise" in self._chosen() else None,
            floor=Floor({"target": pair.target, "draft": pair.draft}),
            max_new_tokens=self.max_new_tokens,
            steps=steps,
            compiles=on_gpu and find_spec("triton") is not None if self.compiled is None else self.compiled,
            script=models.script,
            seed=self.seed,
            batch=self.batch,
            peers=self.peers,
            eagle3=self.eagle3,
        )

    def _next_topic(self, pair: Pair, streams: Sequence[Stream]) -> Stream:
        if len(streams) > 1:
            return streams[1]
        return self._stream(pair, "code", other_topic(self._prompt_count()))

    def _stream(self, pair: Pair, name: str, prompts: Sequence[Prompt]) -> Stream:
        return make_stream(pair, name, prompts, self.max_new_tokens, self.requests)

    def _prompt_count(self) -> int:
        """Return how many prompts of a stream to read: a batch of them warms up, and the promise has larger ones."""
        batched = promise.BATCH * promise.BATCHES if "promise" in self._chosen() else self.batch
        return max(self.requests, batched) + self.batch

    def _report(self, console: Console, suite: str, models: Models, figures: dict[str, Any]) -> None:
        about = {
            "command": shlex.join(["hf-osd", *sys.argv[1:]]),
            "options": asdict(self) | {"output": str(self.output), "eagle3": self.eagle3 and str(self.eagle3)},
            "models": models.about,
            "threads": torch.get_num_threads(),
            "machine": machine(models.pair.target.device),
            "versions": versions(*(PACKAGES if self.peers else ())),
        }
        try:
            with writing(self.output):
                path = write_result(self.output, suite, about, figures)
        finally:  # the figures are worth more than their file, and the file more than a terminal that has gone
            print_result(console, suite, rounded(figures))
        console.print(f"Figures: {path}", soft_wrap=True, markup=False)
        if self.plot:
            with writing(self.output):
                png = write_plot(read_result(path), path.with_suffix(".png"))
            console.print(f"Plot:    {png}", soft_wrap=True, markup=False)


def make_console() -> Console:
    """Return standard output, wide enough for the tables where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def try_compiling(device: str) -> None:
    """
    Compile a sum, which takes seconds: without a compiler, a run would end at its last contender.

    Raises:
        ConfigError: Nothing can be compiled for the device, or there is no such device.
    """
    ones = torch.ones(2, device=resolve_device(device))
    try:
        torch.compile(lambda x: x + 1)(ones)
    except Exception as error:  # compilers, caches and drivers each fail in their own way
        raise ConfigError(f"compiled=True, but nothing can be compiled here: {reason_of(error)}") from error


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


def _mismatches(figures: Any) -> bool:
    """Find a mismatch anywhere in a suite's figures: each race reports its own."""
    if isinstance(figures, dict):
        return bool(figures.get("mismatches")) or any(_mismatches(item) for item in figures.values())
    return isinstance(figures, list) and any(_mismatches(item) for item in figures)


@contextmanager
def _progress(console: Console) -> Iterator[Steps]:
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
