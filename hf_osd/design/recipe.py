"""How a draft is distilled: numbers, and how far a run has come."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import check_fields, integer, number, optional

_RULES = {
    "minutes": number(1e-3, 1e5),
    "steps": optional(integer(1, 10**9)),
    "learning_rate": number(1e-9, 1.0),
    "warmup_steps": integer(1, 10**6),
    "batch_tokens": integer(1, 2**24),
    "evaluations": integer(1, 1000),
    "patience": integer(1, 1000),
    "seed": integer(0, 2**31),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    How to distil.

    Args:
        minutes (`float`, defaults to 15): Wall-clock time, evaluations included. The learning rate falls over it.
        steps (`int`, *optional*): Optimiser steps in its place, for a run that is the same every time.
        learning_rate (`float`, defaults to 1e-3): Its peak, for AdamW.
        warmup_steps (`int`, defaults to 30): Steps over which it rises.
        batch_tokens (`int`, defaults to 2048): Tokens of a step, padding included: some 12 texts.
        evaluations (`int`, defaults to 15): How often the held-out texts are drafted, and the run saved.
        patience (`int`, defaults to 4): Evaluations without a new best after which the run ends.
        seed (`int`, defaults to 0): Of the order of the texts.

    Raises:
        ConfigError: A value is out of its range.
    """

    minutes: float = 15.0
    steps: int | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 30
    batch_tokens: int = 2048
    evaluations: int = 15
    patience: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, _RULES)

    def progress(self, step: int, seconds: float) -> float:
        """Say how far a run has come, in [0, 1]."""
        share = seconds / (60 * self.minutes) if self.steps is None else step / self.steps
        return min(share, 1.0)

    def rate(self, step: int, progress: float) -> float:
        """Return the factor on the learning rate: up in `warmup_steps`, then down in a straight line to zero."""
        return min(1.0, (step + 1) / self.warmup_steps) * (1.0 - progress)

    def stopped_rising(self, values: Sequence[float]) -> bool:
        """Say whether the last evaluations brought no new best."""
        best = max(range(len(values)), key=values.__getitem__, default=0)
        return len(values) - 1 - best >= self.patience
