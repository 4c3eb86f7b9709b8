"""A bounded memory of observed requests: what to learn from, and what to keep out of learning as a test."""

import random
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, LearningError
from ..records import Observation

# Of so many requests one is held out, until this many newer ones are.
_HOLD_OUT_EVERY, _HELD_OUT = 4, 16
# How much of a sample comes from before the last change of the traffic.
_SHARE_OF_PAST = 0.2


class ReplayBuffer:
    """
    Observed requests, to be sampled from while others are added. Thread-safe.

    Three parts. The latest requests since the traffic last changed are what is mostly learned from. Of those that were
    there when it changed, a sample is kept, in which each has the same chance to be (reservoir sampling, Vitter 1985),
    so that a false alarm does no harm. And with `holds_out`, one request of four is kept out of learning first; it
    becomes one of the latest when sixteen newer ones are held out.

    Args:
        capacity (`int`):
            Requests of each of the two parts that are learned from.
        seed (`int`, defaults to 0):
            Seed of the sampling, which has a generator of its own: the global random state is never touched.
        max_tokens (`int`, *optional*):
            Bound on the tokens held, prompts and outputs together, so that a few very long requests cannot fill the
            memory. The newest request always stays. Defaults to no bound.
        holds_out (`bool`, defaults to `False`):
            Whether to hold requests out.
        max_state_bytes (`int`, *optional*):
            Bound on the target's states that are kept with requests, for drafts that read them; those of the oldest
            requests go first, and are read again when they are needed. Defaults to no bound.

    Raises:
        ConfigError: `capacity` or `max_tokens` is below 1.

    Example:

    ```python
    >>> from hf_osd.learning import ReplayBuffer
    >>> len(ReplayBuffer(capacity=256))
    0
    ```
    """

    def __init__(
        self,
        capacity: int,
        seed: int = 0,
        max_tokens: int | None = None,
        holds_out: bool = False,
        max_state_bytes: int | None = None,
    ) -> None:
        for name, value in (("capacity", capacity), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}")
        self.capacity = capacity
        self.max_tokens = max_tokens
        self._holds_out = holds_out
        self._max_state_bytes = max_state_bytes
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._latest: deque[Observation] = deque()
        self._past: list[Observation] = []
        self._held: deque[Observation] = deque()
        self._passed = self._added = self._drawn = self._tokens = 0

    def __len__(self) -> int:
        """Requests to learn from."""
        return len(self._latest) + len(self._past)

    @property
    def tokens(self) -> int:
        """Tokens held, prompts and outputs together."""
        return self._tokens

    @property
    def held(self) -> list[Observation]:
        """Requests that are held out, oldest first."""
        with self._lock:
            return list(self._held)

    def add(self, observation: Observation) -> None:
        """Add one request; the oldest ones leave while there are too many."""
        with self._lock:
            self._tokens += _length(observation)
            if self._holds_out and self._is_drawn():
                self._held.append(observation)
            else:
                self._latest.append(observation)
            if len(self._held) > _HELD_OUT:
                self._latest.append(self._held.popleft())
            self._shorten()
            self._forget_states()

    def _is_drawn(self) -> bool:
        """One of each four, at random: traffic may come in turns."""
        place = self._added % _HOLD_OUT_EVERY
        if place == 0:
            self._drawn = self._random.randrange(_HOLD_OUT_EVERY)
        self._added += 1
        return place == self._drawn

    def turn_page(self, keep: int) -> None:
        """
        Note that the traffic has changed.

        Args:
            keep (`int`): The newest requests that belong to what it is now; the others belong to the past, and none of
                those that were held out is a test of it any more.
        """
        with self._lock:
            for observation in self._held:
                self._pass(observation)
            self._held.clear()
            while len(self._latest) > keep:
                self._pass(self._latest.popleft())

    def _pass(self, observation: Observation) -> None:
        """Make a request one of the past, if chance will have it."""
        self._passed += 1
        place = len(self._past) if len(self._past) < self.capacity else self._random.randrange(self._passed)
        if place < len(self._past):
            self._tokens -= _length(self._past[place])
            self._past[place] = observation
        elif len(self._past) < self.capacity:
            self._past.append(observation)
        else:
            self._tokens -= _length(observation)

    def _shorten(self) -> None:
        """Let requests leave, the oldest and the past first, until there are few enough."""
        while len(self._past) > self.capacity:
            self._tokens -= _length(self._past.pop(0))
        while len(self._latest) > self.capacity:
            self._tokens -= _length(self._latest.popleft())
        while self.max_tokens is not None and self._tokens > self.max_tokens:
            if self._past:
                self._tokens -= _length(self._past.pop(0))
            elif len(self._latest) > 1:
                self._tokens -= _length(self._latest.popleft())
            elif len(self._held) > 1:
                self._tokens -= _length(self._held.popleft())
            else:
                return

    def _forget_states(self) -> None:
        """Keep the states of the newest requests, as many as there is room for."""
        if self._max_state_bytes is None:
            return
        left = self._max_state_bytes
        for part in (self._held, self._latest, self._past):
            for place in reversed(range(len(part))):
                states = part[place].states
                left -= states.nbytes if states is not None else 0
                if states is not None and left < 0:
                    part[place] = replace(part[place], states=None)

    def sample(self, size: int) -> list[Observation]:
        """
        Draw different requests at random, some of them from the past.

        Args:
            size (`int`): How many; all there are, in random order, where there are fewer.

        Returns:
            `list[Observation]`: At most `size` requests.
        """
        with self._lock:
            wanted = sum(self._random.random() < _SHARE_OF_PAST for _ in range(size)) if self._past else 0
            past = min(max(wanted, size - len(self._latest)), len(self._past))
            latest = min(size - past, len(self._latest))
            return self._random.sample(list(self._latest), latest) + self._random.sample(self._past, past)

    def observations(self) -> list[Observation]:
        """Return everything: the past, the latest, and what is held out."""
        with self._lock:
            return [*self._past, *self._latest, *self._held]

    def state_dict(self) -> dict[str, Any]:
        """Return, ready for JSON, what `load_state_dict` needs besides `observations`."""
        with self._lock:
            version, internal, gauss = self._random.getstate()
            return {
                "parts": [len(self._past), len(self._latest), len(self._held)],
                "passed": self._passed,
                "added": self._added,
                "drawn": self._drawn,
                "random": [version, list(internal), gauss],
            }

    def load_state_dict(self, observations: Sequence[Observation], state: Mapping[str, Any]) -> None:
        """
        Replace the content by a saved one.

        Args:
            observations (`Sequence[Observation]`): As [`observations`] returned them.
            state (`Mapping[str, Any]`): As `state_dict` returned it, perhaps through JSON.

        Raises:
            LearningError: Something is missing or not as `state_dict` writes it; the buffer is left as it was.
        """
        try:
            version, internal, gauss = state["random"]
            generator = (version, tuple(internal), gauss)
            random.Random().setstate(generator)
            past, latest, held = (int(part) for part in state["parts"])
            passed, added, drawn = (int(state[name]) for name in ("passed", "added", "drawn"))
        except (KeyError, TypeError, ValueError) as error:
            raise LearningError(f"this is not the state of a replay buffer: {error!r}") from error
        if past + latest + held != len(observations):
            raise LearningError(f"the replay buffer had {past + latest + held} requests, got {len(observations)}")
        with self._lock:
            self._random.setstate(generator)
            self._past = list(observations[:past])
            self._latest = deque(observations[past : past + latest])
            self._held = deque(observations[past + latest :])
            self._passed, self._added, self._drawn = passed, added, drawn
            self._tokens = _total(observations)
            self._shorten()


def _total(observations: Iterable[Observation]) -> int:
    return sum(map(_length, observations))


def _length(observation: Observation) -> int:
    return observation.prompt_ids.numel() + observation.output_ids.numel()
