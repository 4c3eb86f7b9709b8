"""What a run depends on beside its options: the machine, its threads, the versions, and how loud others are."""

import logging as python_logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers.utils import logging

from ..drafts.machine import processor_name

_EMBEDDED_THREADS = 1  # CPU threads for the embedded pair, whose operations are too small for more
_PACKAGES = ("hf-osd", "torch", "transformers", "trl", "datasets", "accelerate")


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """
    Describe the machine in words that a reader of the figures understands.

    Args:
        device (`torch.device`, *optional*): Where the models are; a GPU is named.
    """
    described = {
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "system": platform.system(),
        "architecture": platform.machine(),
    }
    if device is not None and device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def versions(*others: str) -> dict[str, str]:
    """Return the versions of Python, of the packages that serve or learn, and of others by name."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *others):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def use_threads(threads: int | None, *, is_embedded: bool = False) -> None:
    """Set torch's threads; without a number, to one for the embedded pair, and not at all for others."""
    if threads is not None or is_embedded:
        torch.set_num_threads(threads or _EMBEDDED_THREADS)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars, advice about settings and deprecations of other packages from tearing the display."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    own = python_logging.getLogger("hf_osd")  # follows transformers' verbosity where it has no level of its own
    level = own.level
    own.setLevel(verbosity)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        own.setLevel(level)
        if bars:
            logging.enable_progress_bar()
