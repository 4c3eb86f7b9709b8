"""Chooses the dtype that a device is fast in, by measuring its products in half precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter

import torch

_HALF = (torch.bfloat16, torch.float16)
_SHAPE = (3072, 2048)  # shape of the weights: 25 MB in float32, too large for the cache of a core, as a model's are
_ROWS = (1, 8)  # tokens of a pass: as in plain decoding, and as in checking a proposal
_REPEATS = 3  # products timed of each kind; the fastest counts, since others may have been interrupted


def multiplies_bfloat16(device: torch.device) -> bool:
    """
    Say whether a device multiplies bfloat16 natively: at least as fast as float32.

    A CPU is measured, once in a process, by products of a few rows with weights that do not fit into its cache: about
    50 ms on one thread. A CUDA device is asked for its compute capability. Other devices are taken not to.

    Args:
        device (`torch.device`): Where the models are.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            native: bool = torch.cuda.is_bf16_supported(including_emulation=False)
            return native
    return device.type == "cpu" and _is_fast_on_cpu(torch.bfloat16)


def choose_dtype(device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """
    Return the dtype to load a checkpoint in: its own, but float32 on a CPU that is slower in half precision.

    Args:
        device (`torch.device`): Where the model is to be.
        checkpoint (`torch.dtype`): What its weights are stored in.
    """
    if device.type == "cpu" and checkpoint in _HALF and not _is_fast_on_cpu(checkpoint):
        return torch.float32
    return checkpoint


@cache
def _is_fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether one pass of each size takes no longer than in float32."""
    with torch.inference_mode(), torch.autocast("cpu", enabled=False), _one_thread():
        return _seconds(dtype) <= _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    weight = torch.ones(_SHAPE, dtype=dtype, device="cpu")
    return sum(_fastest(torch.ones(rows, _SHAPE[1], dtype=dtype, device="cpu"), weight) for rows in _ROWS)


def _fastest(tokens: torch.Tensor, weight: torch.Tensor) -> float:
    """Time the product of tokens, `(rows, in)`, with a weight, `(out, in)`; the first one sets up its kernel."""
    seconds = []
    for _ in range(1 + _REPEATS):
        start = perf_counter()
        torch.nn.functional.linear(tokens, weight)
        seconds.append(perf_counter() - start)
    return min(seconds[1:])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Time on one thread: where other work keeps a core busy, threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
