"""Rows, each in a process of its own: a crash, or a hang, costs that row alone."""

import logging
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import hf_osd.learning.trainer  # noqa: F401 -- TRL takes seconds to import: once, before processes fork

from .building import Missing
from .checks import check, first_words
from .models import ROWS

# Threads would only wait for one another, and nothing may come from the Hub.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

Found = dict[str, Any]


def run_row(name: str) -> Found:
    """
    Build and check one row, here and now.

    Args:
        name (`str`): Key of `ROWS`.

    Returns:
        `dict`: `group`, `label`, and `cells`: what each check found. `missing` in place of the cells where this
        installation lacks a class or a package, `failed` where the row cannot be built.
    """
    row = ROWS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = row.make()
        except Missing as missing:
            return {**row.about, "missing": str(missing)}
        except Exception as error:
            return {**row.about, "failed": first_words(error)}
        return {**row.about, "cells": {key: cell.to_dict() for key, cell in check(case).items()}}


def run_rows(names: Sequence[str], jobs: int, limit: float) -> Iterator[tuple[str, Found]]:
    """
    Yield rows as they end.

    Args:
        names (`Sequence[str]`): Keys of `ROWS`.
        jobs (`int`): Rows at a time.
        limit (`float`): Seconds that one may take; a row that takes longer, or dies, has `failed` in place of cells.
    """
    os.environ.update(_ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(run_apart, context, name, limit): name for name in names}
        for one in as_completed(waiting):
            yield waiting[one], one.result()


def run_apart(context: BaseContext, name: str, limit: float) -> Found:
    """Return what [`run_row`] gives in a process of its own; see [`run_rows`]."""
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        child = context.Process(target=_send, args=(name, folder, theirs), daemon=True)
        child.start()
        theirs.close()
        try:
            return ours.recv() if ours.poll(limit) else _failed(name, f"no end within {limit:g} seconds")
        except EOFError:
            return _failed(name, "its process died")
        finally:
            child.kill()
            child.join()


def _failed(name: str, why: str) -> Found:
    return {**ROWS[name].about, "failed": why}


def _send(name: str, folder: str, connection: Connection) -> None:
    tempfile.tempdir = folder  # what is left there goes with it, however the process ends
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    logging.getLogger("hf_osd").setLevel(logging.WARNING)
    logging.getLogger("hf_osd").propagate = False  # the cells say what was served how, and what failed
    connection.send(run_row(name))
