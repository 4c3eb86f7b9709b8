"""The benchmark from options to files: load, measure, print, write, draw."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import FLAG, check_fields, integer, optional
from ..errors import ConfigError
from ..evaluation.machine import quiet, use_threads
from ..evaluation.models import Pair, describe, load_pair
from ..evaluation.options import NAMES, OPTIONS
from ..evaluation.output import about, require_matplotlib, try_output, write_json, writing
from ..evaluation.streams import Stream, load_prompt_streams, make_stream
from . import serving, tables
from .compiled import try_compiling
from .figures import has_mismatch, rounded
from .plots import Draw, draw_serving, write_plot
from .session import Session, open_steps

_RULES = OPTIONS | {"prompts": NAMES, "compiled": optional(FLAG), "batch": integer(1, 2**16)}
_FILE_WIDTH = 160  # characters of a line that nobody wraps


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """
    Options of `hf-osd bench`; its help explains each.

    Raises:
        ConfigError: A value is out of its range.

    Example:

    ```python
    >>> BenchCommand(target="Qwen/Qwen3-4B", assistant="Qwen/Qwen3-0.6B", prompts=["my.jsonl"]).run()
    ```
    """

    target: str | None = None
    assistant: str | None = None
    prompts: Sequence[str] = ()
    requests: int = 32
    max_new_tokens: int = 64
    compiled: bool | None = None
    batch: int = 1
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    output: Path = Path("runs/bench")
    plot: bool = True

    def __post_init__(self) -> None:
        check_fields(self, _RULES)

    def run(self, console: Console | None = None) -> bool:
        """
        Measure every way to decode on every stream; print the figures and write them.

        Args:
            console (`Console`, *optional*): Where to print; standard output by default.

        Returns:
            `bool`: Whether every output was the target's own, near ties of its two best tokens apart.

        Raises:
            HfOsdError: The run cannot start, or its files cannot be written, after all figures were printed.
        """
        console = console or make_console()
        self.prepare(is_embedded=self.target is None)
        with quiet(), open_steps(console) as steps:
            prompts = load_prompt_streams(self.prompts, max(self.requests, self.batch) + self.batch)
            pair = load_pair(self.target, self.assistant, self.device, self.dtype)
            session = Session(
                pair=pair,
                streams=[self.stream(pair, name, rows) for name, rows in prompts.items()],
                max_new_tokens=self.max_new_tokens,
                steps=steps,
                compiles=self.compiles(pair),
                seed=self.seed,
                batch=self.batch,
            )
            figures = serving.run(session)
        models = {"kind": "embedded" if self.target is None else "given", **describe(pair)}
        self.report(console, Suite("serving", tables.serving, draw_serving), figures, pair, models)
        return not has_mismatch(figures)

    def prepare(self, *, is_embedded: bool) -> None:
        """Find out before the work what would end it, and set torch's threads."""
        if self.plot:
            require_matplotlib()
        try_output(self.output)
        if self.compiled:
            try_compiling(self.device)
        use_threads(self.threads, is_embedded=is_embedded)

    def stream(self, pair: Pair, name: str, prompts: Sequence[Any]) -> Stream:
        """Encode the prompts of a stream."""
        return make_stream(pair, name, prompts, self.max_new_tokens, self.requests)

    def compiles(self, pair: Pair) -> bool:
        """
        Say whether compiled decoding takes part.

        Raises:
            ConfigError: It is asked for, and the target has an encoder: there is no static cache for both here.
        """
        if pair.has_encoder and self.compiled:
            raise ConfigError("compiled=True does not go with a target that has an encoder: leave it out")
        if self.compiled is not None or pair.has_encoder:
            return bool(self.compiled)
        return pair.target.device.type == "cuda" and find_spec("triton") is not None

    def report(
        self,
        console: Console,
        suite: "Suite",
        figures: dict[str, Any],
        pair: Pair,
        models: dict[str, Any],
        *packages: str,
    ) -> None:
        """Write the figures of a suite over those of an earlier run in the same folder, print them, draw them."""
        where = about(self, pair.target.device, *packages) | {"models": models}
        document = {"suite": suite.name, "about": where, "figures": rounded(figures)}
        path = self.output / f"{suite.name}.json"
        try:
            with writing(self.output):
                write_json(path, document)
        finally:  # the figures are worth more than their file, and the file more than a terminal that has gone
            for table in suite.tables(document["figures"]):
                console.print(table)
        console.print(f"Figures: {path}", soft_wrap=True, markup=False)
        if self.plot:
            with writing(self.output):
                png = write_plot(document, suite.draw, path.with_suffix(".png"))
            console.print(f"Plot:    {png}", soft_wrap=True, markup=False)


@dataclass(frozen=True, slots=True)
class Suite:
    """How the figures of a suite are shown; its name is that of its files."""

    name: str
    tables: Callable[[dict[str, Any]], Iterator[Table]]
    draw: Draw


def make_console() -> Console:
    """Return standard output, wide enough for the tables where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)
