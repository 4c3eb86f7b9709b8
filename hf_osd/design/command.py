"""`hf-osd design`, from options to a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..config import check_fields, integer, number
from ..evaluation.machine import quiet, use_threads
from ..evaluation.models import cold_draft, load_pair
from ..evaluation.options import NAMES, OPTIONS
from ..evaluation.output import command_line, require_matplotlib
from .designing import design_draft
from .processes import is_first
from .recipe import Recipe
from .results import Design

_RULES = {name: OPTIONS[name] for name in ("device", "dtype", "threads", "output", "plot")} | {
    "target": OPTIONS["target"],
    "prompts": NAMES,
    "texts": integer(1, 10**7),
    "candidates": NAMES,
    "minutes": number(1e-3, 1e5),
    "seed": integer(0, 2**31),
}


@dataclass(frozen=True, kw_only=True)
class DesignCommand:
    """
    Options of `hf-osd design`; its help explains each.

    Raises:
        ConfigError: A value is out of its range.

    Example:

    ```python
    >>> DesignCommand(target="HuggingFaceTB/SmolLM2-135M-Instruct", prompts=["my.jsonl"], output="draft").run()
    ```
    """

    target: str
    output: Path
    prompts: Sequence[str] = ()
    texts: int = 2000
    candidates: Sequence[str] = ()
    minutes: float = Recipe.minutes
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    plot: bool = True

    def __post_init__(self) -> None:
        check_fields(self, _RULES)
        self._recipe()  # checks the rest

    def run(self, console: Console | None = None) -> Design:
        """
        Design a draft, say how far it is, and write it.

        Args:
            console (`Console`, *optional*): Where to print; standard output by default.

        Returns:
            [`~hf_osd.design.results.Design`]: What was made.

        Raises:
            HfOsdError: The run cannot start, or its folder cannot be written.
        """
        console = console or Console()
        if self.plot:
            require_matplotlib()
        use_threads(self.threads)
        with quiet():
            pair = load_pair(self.target, cold_draft, self.device, self.dtype)
            design = design_draft(
                pair.target,
                pair.tokenizer,
                self.output,
                prompts=self.prompts,
                texts=self.texts,
                candidates=self.candidates,
                recipe=self._recipe(),
                plot=self.plot,
                console=console,
                command=command_line(),
            )
        if is_first():
            console.print(f"Draft: {self.output}", soft_wrap=True, markup=False, highlight=False)
        return design

    def _recipe(self) -> Recipe:
        return Recipe(minutes=self.minutes, seed=self.seed)
