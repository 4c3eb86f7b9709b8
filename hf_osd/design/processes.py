"""
Helpers for several processes of `accelerate launch`: the first one decides, for example by the clock, and all follow.

A single process does not touch accelerate's state, which is left to the trainer.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def _state() -> Any:
    return PartialState(
        cpu=not torch.accelerator.is_available()
    )  # it would not connect processes on the CPU by itself


def is_first() -> bool:
    """Return whether this is the first process, or the only one."""
    return _is_alone() or bool(_state().is_main_process)


def shared(value: Any) -> Any:
    """Return the value of the first process, for which the others wait."""
    return value if _is_alone() else broadcast_object_list([value])[0]


def first_alone() -> AbstractContextManager[None]:
    """Let the first process run the context before the others, which then find its files."""
    waiting: AbstractContextManager[None] = nullcontext() if _is_alone() else _state().main_process_first()
    return waiting


def wait() -> None:
    """Wait until all processes are here."""
    if not _is_alone():
        _state().wait_for_everyone()
