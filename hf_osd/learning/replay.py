"""A bounded memory of observed requests. Not covered: which one deserves a place; the oldest always leaves first."""

import random
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from ..errors import ConfigError, LearningError
from ..records import Observation

_FIELDS = tuple(field.name for field in fields(Observation))


class ReplayBuffer:
    """
    The latest observed requests, to be sampled from while others are added. Thread-safe.

    Args:
        capacity (`int`):
            Requests to hold; the oldest leaves first.
        seed (`int`, defaults to 0):
            Seed of the sampling, which has a generator of its own: the global random state is never touched.
        max_tokens (`int`, *optional*):
            Bound on the tokens held, prompts and outputs together, so that a few very long requests cannot fill the
            memory. The newest request always stays. Defaults to no bound.

    Raises:
        ConfigError: `capacity` or `max_tokens` is below 1.

    Example:

    ```python
    >>> from hf_osd.learning import ReplayBuffer
    >>> len(ReplayBuffer(capacity=256))
    0
    ```
    """

    def __init__(self, capacity: int, seed: int = 0, max_tokens: int | None = None) -> None:
        for name, value in (("capacity", capacity), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}")
        self.capacity = capacity
        self.max_tokens = max_tokens
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._observations: deque[Observation] = deque()
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._observations)

    @property
    def tokens(self) -> int:
        """Tokens held, prompts and outputs together."""
        return self._tokens

    def add(self, observation: Observation) -> None:
        """Add one request; the oldest ones leave while there are too many."""
        with self._lock:
            self._observations.append(observation)
            self._tokens += _length(observation)
            while self._is_over_full():
                self._tokens -= _length(self._observations.popleft())

    def _is_over_full(self) -> bool:
        too_long = self.max_tokens is not None and self._tokens > self.max_tokens
        return len(self._observations) > self.capacity or (too_long and len(self._observations) > 1)

    def latest(self, size: int) -> list[Observation]:
        """Return the last `size` requests, oldest first; all there are, where there are fewer."""
        with self._lock:
            return list(self._observations)[-size:] if size else []

    def sample(self, size: int) -> list[Observation]:
        """
        Draw different requests at random.

        Args:
            size (`int`): How many; all there are, in random order, where there are fewer.

        Returns:
            `list[Observation]`: At most `size` requests.
        """
        with self._lock:
            return self._random.sample(list(self._observations), min(size, len(self._observations)))

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """
        Everything that `load_state_dict` needs, in forms that safetensors and JSON hold.

        Returns:
            `tuple[dict[str, torch.Tensor], dict[str, Any]]`: Tensors, named `"INDEX.FIELD"` with the oldest request
            first, and metadata.
        """
        with self._lock:
            tensors = {
                f"{index}.{name}": getattr(observation, name).contiguous()
                for index, observation in enumerate(self._observations)
                for name in _FIELDS
            }
            version, internal, gauss = self._random.getstate()
            return tensors, {"size": len(self._observations), "random": [version, list(internal), gauss]}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """
        Replace the content by a saved one; of more requests than fit, the newest stay.

        Args:
            tensors (`Mapping[str, torch.Tensor]`): As `state_dict` returned them.
            metadata (`Mapping[str, Any]`): As `state_dict` returned it, perhaps through JSON.

        Raises:
            LearningError: Something is missing or not as `state_dict` writes it; the buffer is left as it was.
        """
        try:
            version, internal, gauss = metadata["random"]
            state = (version, tuple(internal), gauss)
            random.Random().setstate(state)
            loaded = [
                Observation(**{name: tensors[f"{index}.{name}"] for name in _FIELDS})
                for index in range(metadata["size"])
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise LearningError(f"this is not the state of a replay buffer: {error!r}") from error
        with self._lock:
            self._random.setstate(state)
            self._observations.clear()
            self._tokens = 0
        for observation in loaded:
            self.add(observation)


def _length(observation: Observation) -> int:
    return observation.prompt_ids.numel() + observation.output_ids.numel()
