"""A moving average of the weights during training, which varies less than the weights themselves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

_DECAY = 0.99
"""Factor on the average at each step; it forgets within some 100 steps."""

_YOUNG = 10  # steps: the factor rises as n / (n + 10) at first, so that the average leaves its start sooner
_FILE = "average.safetensors"


class Average:
    """
    A moving average of weights.

    Args:
        weights (`Sequence[nn.Parameter]`): What is trained, float32; the average begins with their values.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._weights = weights
        self._values = [weight.detach().clone() for weight in weights]
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights as they are now."""
        self._steps += 1
        decay = min(_DECAY, self._steps / (self._steps + _YOUNG))
        for value, weight in zip(self._values, self._weights, strict=True):
            value.lerp_(weight, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the weights by the average, inside of the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, weight in zip(self._values, self._weights, strict=True):
            kept = weight.clone()
            weight.copy_(value)
            value.copy_(kept)

    def save(self, folder: Path) -> None:
        """Write the average to a folder."""
        save_file(
            {"steps": torch.tensor(self._steps), **{f"{number}": value for number, value in enumerate(self._values)}},
            folder / _FILE,
        )

    def load(self, folder: Path) -> None:
        """Read what [`save`] wrote."""
        found = load_file(folder / _FILE)
        self._steps = int(found["steps"])
        for number, value in enumerate(self._values):
            value.copy_(found[f"{number}"])
