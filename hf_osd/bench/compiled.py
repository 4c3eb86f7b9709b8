"""Plain decoding as transformers compiles it."""

from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache

from .._caches import cache_argument
from ..config import reason_of
from ..errors import ConfigError
from ..evaluation.contenders import Sample, timed_answer
from ..evaluation.encoding import Inputs
from ..evaluation.models import resolve_device


class CompiledGenerate:
    """
    Plain `generate` over transformers' static cache, which makes it compile the model's forward.

    Args:
        name (`str`): What to call it.
        target (`PreTrainedModel`): The model.
        capacity (`int`): Columns of the longest request, its answer included: one cache serves all of them, so that
            nothing is compiled again.
        compiles (`bool`, defaults to `True`): Whether to compile; on the CPU transformers would not by itself.
    """

    def __init__(self, name: str, target: PreTrainedModel, capacity: int, *, compiles: bool = True) -> None:
        self.name, self.target = name, target
        self._cache = StaticCache(config=target.config, max_cache_len=capacity)
        self._options: dict[str, Any] = {"disable_compile": not compiles}
        if compiles and target.device.type == "cpu":
            self._options["compile_config"] = CompileConfig()
            self._options["compile_config"]._compile_all_devices = True

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Sample]:
        """Generate into the one cache."""
        self._cache.reset()
        target: Any = self.target
        options |= {**self._options, **inputs, **cache_argument((), self._cache)}
        return timed_answer(target.generate, inputs, options, target)


def try_compiling(device: str) -> None:
    """
    Compile a sum, which takes seconds: without a compiler, a run would end at its last contender.

    Raises:
        ConfigError: Nothing can be compiled for the device, or there is no such device.
    """
    ones = torch.ones(2, device=resolve_device(device))
    try:
        torch.compile(lambda x: x + 1)(ones)
    except Exception as error:  # compilers, caches and drivers each fail in their own way
        raise ConfigError(f"compiled=True, but nothing can be compiled here: {reason_of(error)}") from error
