"""Replay: the latest requests, to learn from. Each is scored before it comes here, so none is held out."""

import random
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, LearningError
from ..records import Observation

RECENT_SHARE = 0.5  # share of a sample that prefers new requests, so that new traffic is soon learned from
RECENT = 16  # requests: mean age of that share


class ReplayBuffer:
    """
    The latest requests, to be sampled from while others are added. Thread-safe.

    Args:
        capacity (`int`):
            Requests to hold; the oldest leaves first.
        seed (`int`, defaults to 0):
            Seed of the sampling, which has a generator of its own.
        max_tokens (`int`, *optional*):
            Bound on the tokens held, prompts and outputs together. The newest request always stays. Defaults to no
            bound.
        max_state_bytes (`int`, *optional*):
            Bound on the target's states that are held with requests, for drafts that read them; those of the oldest
            requests go first, and the target computes them again when they are needed. Defaults to no bound.

    Raises:
        ConfigError: `capacity` or `max_tokens` is below 1.
    """

    def __init__(
        self, capacity: int, seed: int = 0, max_tokens: int | None = None, max_state_bytes: int | None = None
    ) -> None:
        for name, value in (("capacity", capacity), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}")
        self.capacity, self.max_tokens = capacity, max_tokens
        self._max_state_bytes = max_state_bytes
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._requests: deque[Observation] = deque()  # oldest first
        self._tokens = 0

    def __len__(self) -> int:
        """Requests held."""
        return len(self._requests)

    @property
    def tokens(self) -> int:
        """Tokens held, prompts and outputs together."""
        return self._tokens

    def observations(self) -> list[Observation]:
        """Return all requests, oldest first."""
        with self._lock:
            return list(self._requests)

    def add(self, observation: Observation) -> None:
        """Add one request; the oldest ones leave while there are too many."""
        with self._lock:
            self._requests.append(observation)
            self._tokens += _length(observation)
            self._shorten()
            self._forget_states()

    def _shorten(self) -> None:
        while len(self._requests) > self.capacity or self._is_too_long():
            self._tokens -= _length(self._requests.popleft())

    def _is_too_long(self) -> bool:
        return self.max_tokens is not None and self._tokens > self.max_tokens and len(self._requests) > 1

    def _forget_states(self) -> None:
        """Keep the states of the newest requests, as many as there is room for."""
        if self._max_state_bytes is None:
            return
        left = self._max_state_bytes
        for place in reversed(range(len(self._requests))):
            states = self._requests[place].states
            left -= states.nbytes if states is not None else 0
            if states is not None and left < 0:
                self._requests[place] = replace(self._requests[place], states=None)

    def sample(self, size: int) -> list[Observation]:
        """Draw `size` different requests at random, fewer if there are fewer: half of them new ones, half of all."""
        with self._lock:
            places: set[int] = set()
            while len(places) < min(size, len(self._requests)):
                places.add(self._draw())
            drawn = sorted(places)
            self._random.shuffle(drawn)
            return [self._requests[place] for place in drawn]

    def _draw(self) -> int:
        count = len(self._requests)
        age = int(self._random.expovariate(1.0 / RECENT)) if self._random.random() < RECENT_SHARE else count
        return count - 1 - age if age < count else self._random.randrange(count)

    def state_dict(self) -> dict[str, Any]:
        """Return, ready for JSON, what `load_state_dict` needs besides `observations`."""
        with self._lock:
            version, internal, gauss = self._random.getstate()
            return {"requests": len(self._requests), "random": [version, list(internal), gauss]}

    def load_state_dict(self, observations: Sequence[Observation], state: Mapping[str, Any]) -> None:
        """
        Replace the content by a saved one.

        Args:
            observations (`Sequence[Observation]`): As `observations` returned them, or what is left of them.
            state (`Mapping[str, Any]`): As `state_dict` returned it, perhaps through JSON.

        Raises:
            LearningError: Something is missing or not as `state_dict` writes it; the buffer is left as it was.
        """
        try:
            version, internal, gauss = state["random"]
            generator = (version, tuple(internal), gauss)
            random.Random().setstate(generator)
        except (KeyError, TypeError, ValueError) as error:
            raise LearningError(f"this is not the state of a replay buffer: {error!r}") from error
        with self._lock:
            self._random.setstate(generator)
            self._requests = deque(observations)
            self._tokens = sum(map(_length, observations))
            self._shorten()
            self._forget_states()


def _length(observation: Observation) -> int:
    texts = observation.source_ids, observation.prompt_ids, observation.output_ids
    return sum(ids.numel() for ids in texts if ids is not None)
