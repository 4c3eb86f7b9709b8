"""The demo from options to files: load, run, print, write."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from ..config import FLAG, OnlineConfig, check_fields, integer, optional
from ..evaluation.machine import quiet, use_threads
from ..evaluation.models import Pair, describe, load_pair
from ..evaluation.options import NAME, OPTIONS, SECONDS
from ..evaluation.output import about, require_matplotlib, try_output, write_json, writing
from ..evaluation.prompts import load_prompts
from ..evaluation.race import Race
from . import smollm2
from .display import open_display
from .plot import write_plot
from .report import print_report, run_paths, to_json
from .results import mismatches
from .runner import run_demo

_BUDGET = 300.0  # seconds of a run without options; with loading and reporting, it stays below six minutes
_RULES = {
    **OPTIONS,
    "prompts": NAME,
    "embedded": FLAG,
    "sample": FLAG,
    "draft_length": integer(1, 1024),
    "budget_seconds": optional(SECONDS),
}


@dataclass(frozen=True, kw_only=True)
class DemoCommand:
    """
    Options of `hf-osd demo`; its help explains each.

    Raises:
        ConfigError: A value is out of its range.

    Example:

    ```python
    >>> DemoCommand(target="Qwen/Qwen3-4B", assistant="Qwen/Qwen3-0.6B", prompts="my.jsonl").run()
    ```
    """

    target: str | None = None
    assistant: str | None = None
    embedded: bool = False
    prompts: str | None = None
    requests: int = 160
    max_new_tokens: int = 48
    draft_length: int = 8
    update_every: int = 8
    sample: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    budget_seconds: float | None = None
    output: Path = Path("runs")
    plot: bool = True

    def __post_init__(self) -> None:
        check_fields(self, _RULES)
        OnlineConfig(**self._online)  # checks the rest

    def run(self, console: Console | None = None) -> bool:
        """
        Run the demo, print what it finds, and write its files.

        Args:
            console (`Console`, *optional*): Where to print; standard output by default.

        Returns:
            `bool`: Whether every greedy output was the target's own.

        Raises:
            HfOsdError: The run cannot start, or its files cannot be written, after the figures were printed.
        """
        console, started = console or Console(), perf_counter()
        target, assistant = self._names(console)
        if self.plot:
            require_matplotlib()
        try_output(self.output)
        use_threads(self.threads, is_embedded=target is None)
        with quiet(), console.status("Loading prompts and models ..."):
            prompts = load_prompts(self.prompts, self.requests + 1)
            pair = load_pair(target, assistant, self.device, self.dtype)
        requests = min(self.requests, len(prompts))
        console.print(self._headline(pair, requests), soft_wrap=True)
        with quiet(), open_display(console, requests) as on_round:
            race = run_demo(
                pair,
                prompts,
                OnlineConfig.for_draft(pair.draft, **self._online),
                on_round,
                requests=self.requests,
                max_new_tokens=self.max_new_tokens,
                sample=self.sample,
                deadline=started + self._budget,
            )
        try:
            written = self._write(race, pair)
        finally:  # the figures are worth more than their files, and the files more than a terminal that has gone
            print_report(console, race, sample=self.sample)
        for line in written:
            console.print(line, soft_wrap=True, markup=False)
        return not mismatches(race)

    def _names(self, console: Console) -> tuple[str | None, str | None]:
        """What to load; without options the real model where this machine has it, else the embedded pair."""
        if self._is_given or self.embedded:
            return self.target, self.assistant
        found = smollm2.find_target()
        if found is not None and smollm2.DRAFT.is_dir():
            return found, str(smollm2.DRAFT)
        console.print(
            f"{smollm2.HUB_ID} is not on this machine, so a tiny embedded pair takes its place. To get it: "
            f"{smollm2.HOW_TO_GET}",
            soft_wrap=True,
            markup=False,
        )
        return None, None

    @property
    def _is_given(self) -> bool:
        return self.target is not None or self.assistant is not None

    @property
    def _online(self) -> dict[str, Any]:
        return {"draft_length": self.draft_length, "update_every": self.update_every, "seed": self.seed}

    @property
    def _budget(self) -> float:
        if self.budget_seconds is not None:
            return self.budget_seconds
        return float("inf") if self._is_given else _BUDGET

    def _headline(self, pair: Pair, requests: int) -> str:
        target, draft = (f"{model.num_parameters() / 1e6:,.1f}M" for model in (pair.target, pair.draft))
        return (
            f"Target {target} and draft {draft} parameters on {pair.target.device}: {requests} requests of up to "
            f"{self.max_new_tokens} tokens, an update every {self.update_every}"
        )

    def _write(self, race: Race, pair: Pair) -> list[str]:
        with writing(self.output):
            json_path, png_path = run_paths(self.output)
            write_json(json_path, to_json(race, about(self, pair.target.device) | {"models": describe(pair)}))
            if not self.plot:
                return [f"Figures: {json_path}"]
            write_plot(race, png_path)
            return [f"Figures: {json_path}", f"Plot:    {png_path}"]
