"""
The tokens that a draft proposes from: general ones, those of the prompt, and those of recent outputs.

FR-Spec (https://arxiv.org/abs/2502.14856) drafts among the most frequent tokens, since the output head is the most
expensive part of a small draft. A fixed set misses words of the traffic. With a head borrowed from the target, one
more token costs one more row of it.
"""

import threading
from collections.abc import Iterable

import torch

MOST_TOKENS = 16_384
"""Most tokens of recent outputs to remember, besides the general ones; the cost of the head grows with them."""


class TrafficVocabulary:
    """
    The tokens that a draft proposes from: general ones, and those that recent outputs used.

    Args:
        general (`Iterable[int]`): Tokens that are always proposed from.
        capacity (`int`, defaults to 16384): Further tokens that are remembered; those not used for longest are
            forgotten.
    """

    def __init__(self, general: Iterable[int], capacity: int = MOST_TOKENS) -> None:
        self._general = frozenset(general)
        self._capacity = capacity
        self._used: dict[int, None] = {}  # in the order of their last use
        self._lock = threading.Lock()

    def note(self, tokens: Iterable[int]) -> None:
        """Remember the tokens of an output."""
        with self._lock:
            for token in tokens:
                if token not in self._general:
                    self._used.pop(token, None)
                    self._used[token] = None
            while len(self._used) > self._capacity:
                del self._used[next(iter(self._used))]

    def tokens(self, besides: Iterable[int] = ()) -> torch.Tensor:
        """
        Return the tokens to propose from.

        Args:
            besides (`Iterable[int]`): Further tokens: those of the prompts at hand, and what ends a text.

        Returns:
            `torch.LongTensor` of shape `(tokens,)`: Different tokens, in ascending order.
        """
        with self._lock:
            found = self._general.union(self._used, besides)
        return torch.tensor(sorted(found), dtype=torch.long)


def places_in(vocabulary: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return where tokens stand in an ascending vocabulary; its size for those that it does not have."""
    places = torch.searchsorted(vocabulary, ids).clamp(max=len(vocabulary) - 1)
    return places.where(vocabulary[places] == ids, torch.full_like(places, len(vocabulary)))
