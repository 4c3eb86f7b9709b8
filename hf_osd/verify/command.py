"""`hf-osd verify`, from options to a table and a file."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ..config import check_fields, optional
from ..demo.environment import machine, quiet, versions
from ..demo.models import encode_prompts, load_pair, resolve_device
from ..demo.options import NAME, NAMES, OPTIONS
from ..demo.output import try_output, writing
from ..demo.prompts import Prompt, load_prompts
from ..errors import ConfigError
from .report import print_verification
from .results import Verification
from .runner import BATCH, verify

_RULES = {
    name: OPTIONS[name] for name in ("target", "assistant", "requests", "max_new_tokens", "device", "threads")
} | {
    "prompts": NAME,
    "dtypes": NAMES,
    "output": optional(OPTIONS["output"]),
}
_EMBEDDED_THREADS = 1  # CPU threads for the embedded pair, whose operations are too small for more


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """
    Options of `hf-osd verify`; its help explains each.

    Raises:
        ConfigError: A value is out of its range.

    Example:

    ```python
    >>> VerifyCommand(target="HuggingFaceTB/SmolLM2-135M-Instruct", dtypes=["bfloat16", "float32"]).run()
    ```
    """

    target: str | None = None
    assistant: str | None = None
    prompts: str | None = None
    requests: int = 24
    max_new_tokens: int = 64
    dtypes: Sequence[str] = ("auto",)
    device: str = "auto"
    threads: int | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self, _RULES)
        if not self.dtypes:
            raise ConfigError("dtypes must name at least one, got none")

    def run(self, console: Console | None = None) -> bool:
        """
        Verify in each dtype, print what differs, and write the figures where a file is given.

        Args:
            console (`Console`, *optional*): Where to print; standard output by default.

        Returns:
            `bool`: Whether rounding explains every output of hf_osd that differs.

        Raises:
            HfOsdError: The run cannot start, or its file cannot be written, after the figures were printed.
        """
        console = console or Console()
        if self.output is not None:
            _try_file(self.output)
        threads = self.threads or (_EMBEDDED_THREADS if self.target is None else None)
        if threads is not None:
            torch.set_num_threads(threads)
        with quiet():
            prompts = load_prompts(self.prompts, self.requests)
            runs = [self._run_dtype(dtype, prompts, console) for dtype in self.dtypes]
        if self.output is not None:
            self._write(self.output, runs)
            console.print(f"Figures: {self.output}", soft_wrap=True, markup=False)
        return all(found.is_lossless for found in runs)

    def _run_dtype(self, dtype: str, prompts: Sequence[Prompt], console: Console) -> Verification:
        pair = load_pair(self.target, self.assistant, self.device, dtype)
        requests = encode_prompts(pair, prompts, self.max_new_tokens)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task(f"verifying in {pair.target.dtype}", total=-(-len(requests) // BATCH))
            found = verify(
                pair,
                requests,
                max_new_tokens=self.max_new_tokens,
                observer=lambda: progress.advance(task),
            )
        print_verification(console, found)
        return found

    def _write(self, path: Path, runs: Sequence[Verification]) -> None:
        about: dict[str, Any] = {
            "command": shlex.join(["hf-osd", *sys.argv[1:]]),
            "options": asdict(self) | {"output": str(path)},
            "threads": torch.get_num_threads(),
            "machine": machine(resolve_device(self.device)),
            "versions": versions(),
        }
        text = json.dumps({"about": about, "runs": [found.to_dict() for found in runs]}, indent=1)
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")


def _try_file(path: Path) -> None:
    """Refuse a place where the figures could not be written."""
    if path.is_dir():
        raise ConfigError(f"the file for the figures is a folder: {str(path)!r}")
    try_output(path.parent)
