"""`hf-osd verify`, from options to a table and a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..config import check_fields, optional
from ..errors import ConfigError
from ..evaluation.encoding import encode_prompts
from ..evaluation.machine import quiet, use_threads
from ..evaluation.models import load_pair, resolve_device
from ..evaluation.options import NAME, NAMES, OPTIONS
from ..evaluation.output import about, try_output, write_json, writing
from ..evaluation.prompts import Prompt, load_prompts
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
        use_threads(self.threads, is_embedded=self.target is None)
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
        device = resolve_device(self.device)
        with writing(path.parent):
            write_json(path, {"about": about(self, device), "runs": [found.to_dict() for found in runs]})


def _try_file(path: Path) -> None:
    """Refuse a place where the figures could not be written."""
    if path.is_dir():
        raise ConfigError(f"the file for the figures is a folder: {str(path)!r}")
    try_output(path.parent)
