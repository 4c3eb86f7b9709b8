"""The settings of a distillation, and its schedule."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..config import check_fields, integer, number, optional

_SMALLEST = 1e-3  # root mean square, at least, that a learning rate is relative to: biases may begin at zero
_RULES = {
    "minutes": number(1e-3, 1e5),
    "steps": optional(integer(1, 10**9)),
    "matrix_rate": number(1e-9, 1.0),
    "vector_rate": number(1e-9, 1.0),
    "warmup_steps": integer(1, 10**6),
    "batch_tokens": integer(1, 2**24),
    "evaluations": integer(1, 1000),
    "patience": integer(1, 1000),
    "seed": integer(0, 2**31),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    Settings of a distillation.

    Args:
        minutes (`float`, defaults to 15): Wall-clock time, evaluations included. The learning rate falls over it.
        steps (`int`, *optional*): Optimiser steps instead of minutes, for a run that repeats exactly.
        matrix_rate (`float`, defaults to 0.01): Peak of AdamW's learning rate for a matrix, relative to the root mean
            square of its values at the start. The map in front of the layers and the layers themselves differ by a
            factor of thirty in that; one rate for all is too small for the one or destroys the others.
        vector_rate (`float`, defaults to 0.003): The same for norms and biases.
        warmup_steps (`int`, defaults to 20): Steps over which it rises.
        batch_tokens (`int`, defaults to 2048): Tokens of a step, padding included: some 12 texts.
        evaluations (`int`, defaults to 15): How often the held-out texts are drafted, and the run saved.
        patience (`int`, defaults to 4): Evaluations without a new best after which the run ends.
        seed (`int`, defaults to 0): Of the order of the texts.

    Raises:
        ConfigError: A value is out of its range.
    """

    minutes: float = 15.0
    steps: int | None = None
    matrix_rate: float = 0.01
    vector_rate: float = 0.003
    warmup_steps: int = 20
    batch_tokens: int = 2048
    evaluations: int = 15
    patience: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, _RULES)

    def progress(self, step: int, seconds: float) -> float:
        """Return the progress of a run, in [0, 1]."""
        share = seconds / (60 * self.minutes) if self.steps is None else step / self.steps
        return min(share, 1.0)

    def shared(self, count: int) -> "Recipe":
        """Return the recipe of each of several drafts, which share the time."""
        steps = None if self.steps is None else -(-self.steps // count)
        return replace(self, minutes=self.minutes / count, steps=steps)

    def rate(self, step: int, progress: float) -> float:
        """Return the factor on the learning rate: up in `warmup_steps`, then down linearly to zero."""
        return min(1.0, (step + 1) / self.warmup_steps) * (1.0 - progress)

    def groups(self, weights: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimiser: each weight has its own learning rate."""
        return [{"params": [weight], "lr": self._peak(weight)} for weight in weights if weight.requires_grad]

    def _peak(self, weight: nn.Parameter) -> float:
        size = weight.detach().float().pow(2).mean().sqrt().item()
        return max(size, _SMALLEST) * (self.matrix_rate if weight.ndim > 1 else self.vector_rate)

    def stopped_rising(self, values: Sequence[float]) -> bool:
        """Return whether the last evaluations brought no new best."""
        best = max(range(len(values)), key=values.__getitem__, default=0)
        return len(values) - 1 - best >= self.patience
