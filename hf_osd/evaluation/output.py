"""The files of a run: their folder is tried before the work, named where writing fails, and says what was run."""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from ..config import shown
from ..errors import ConfigError, MissingDependencyError
from .machine import machine, versions


def try_output(folder: Path) -> None:
    """
    Find out whether a folder can be made and written to, and leave everything as it was.

    Raises:
        ConfigError: It cannot.
    """
    made: list[Path] = []
    try:
        with writing(folder):
            made += _missing(folder)
            folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=folder, prefix=".hf-osd-") as trial:
                trial.write(b"hf-osd")
    finally:
        for path in made:
            with suppress(OSError):  # of somebody else by now, or never made
                path.rmdir()


def _missing(folder: Path) -> list[Path]:
    """Return what has to be made for a folder to exist, itself first."""
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot write to {shown(str(folder))} ({reason}): choose another output folder") from error


def require_matplotlib() -> None:
    """
    Check before a run of minutes, not after it, that its plot can be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("the plot needs matplotlib: pip install 'hf-osd[demo]', or pass --no-plot")


def command_line() -> str:
    """Return what was typed: `hf-osd` with its arguments, or `python -m` with a module and its own."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec is not None else None
    program = ["hf-osd"] if module is None or module.startswith("hf_osd") else ["python", "-m", module]
    return shlex.join([*program, *sys.argv[1:]])


def about(options: Any, device: torch.device, *packages: str) -> dict[str, Any]:
    """
    Return what figures depend on, ready for JSON: the command, its options, the machine and the versions.

    Args:
        options (`Any`): A dataclass of options.
        device (`torch.device`): Where the models are.
        packages (`str`): Others whose versions count.
    """
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    return {
        "command": command_line(),
        "options": plain,
        "threads": torch.get_num_threads(),
        "machine": machine(device),
        "versions": versions(*packages),
    }


def write_json(path: Path, document: Any) -> None:
    """Write a document with a line for each value, and make its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
