"""Which dtype a device is fast in; what a measurement finds is scripted here, since no test depends on time."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from hf_osd import precision
from hf_osd.precision import choose_dtype, multiplies_bfloat16

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
FULL, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Each test begins and ends with nothing measured."""
    precision._is_fast_on_cpu.cache_clear()
    yield
    precision._is_fast_on_cpu.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """A CPU that multiplies bfloat16 faster than float32, and float16 slower; lists what was measured."""
    seconds, asked = {FULL: 2.0, BRAIN: 1.0, HALF: 3.0}, []
    monkeypatch.setattr(precision, "_seconds", lambda dtype: asked.append(dtype) or seconds[dtype])
    return asked


def test_a_checkpoint_in_half_precision_keeps_it_where_that_is_fast(measured: list[torch.dtype]) -> None:
    """Would catch float32 on a CPU that multiplies bfloat16, at half its speed, and float16 where it is slow."""
    assert choose_dtype(CPU, BRAIN) is BRAIN
    assert choose_dtype(CPU, HALF) is FULL


def test_a_cpu_that_is_slow_in_bfloat16_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch bfloat16 on processors that emulate it, where it is several times slower."""
    monkeypatch.setattr(precision, "_seconds", lambda dtype: 1.0 if dtype is FULL else 1.1)
    assert choose_dtype(CPU, BRAIN) is FULL
    assert not multiplies_bfloat16(CPU)


@pytest.mark.parametrize("dtype", [FULL, torch.float64])
def test_full_precision_is_kept_and_nothing_measured(measured: list[torch.dtype], dtype: torch.dtype) -> None:
    """Would catch a float32 checkpoint that is rounded because it would be faster."""
    assert choose_dtype(CPU, dtype) is dtype
    assert measured == []


@pytest.mark.parametrize("dtype", [FULL, BRAIN, HALF])
def test_accelerators_keep_the_checkpoints_dtype(measured: list[torch.dtype], dtype: torch.dtype) -> None:
    """Would catch a figure of the CPU that decides for a GPU."""
    assert choose_dtype(CUDA, dtype) is dtype
    assert measured == []


def test_a_cpu_is_measured_once(measured: list[torch.dtype]) -> None:
    """Would catch 50 ms with every model that is loaded, and two answers within one process."""
    assert multiplies_bfloat16(CPU)
    assert choose_dtype(CPU, BRAIN) is BRAIN
    assert measured == [BRAIN, FULL]


def test_a_real_measurement_leaves_everything_as_it_was() -> None:
    """Would catch one thread for the rest of the process, and a measurement that its caller's settings change."""
    before = torch.get_num_threads()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert multiplies_bfloat16(CPU) in (True, False)
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("native", [True, False])
def test_cuda_is_asked_for_the_device_itself(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """Would catch the answer of another GPU, and emulation that counts as native."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
    assert multiplies_bfloat16(CUDA) == native
    assert asked == [CUDA]


def test_other_devices_are_taken_not_to(measured: list[torch.dtype]) -> None:
    """Would catch an answer that nobody has tried."""
    assert not multiplies_bfloat16(torch.device("meta"))
    assert measured == []


@pytest.mark.gpu
def test_a_gpu_says_what_its_capability_is() -> None:
    """Would catch a torch that names the question otherwise."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert multiplies_bfloat16(device) == (torch.cuda.get_device_capability(device) >= (8, 0))
