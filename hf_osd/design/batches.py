"""Batches of texts of similar length, each a function of its number, so that a training can resume."""

import random
from collections.abc import Iterator, Sequence

_POOL = 32  # batches whose texts are sorted by length together; more would make batches less random


class Batches:
    """
    Numbered batches, epoch after epoch without an end: every text once in each, in an order of its own.

    Args:
        lengths (`Sequence[int]`): Tokens of each text; at least one text.
        tokens (`int`): Tokens of a batch with its padding, at most, unless a single text has more.
        seed (`int`, defaults to 0): Of the order.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, seed: int = 0) -> None:
        self._lengths, self._tokens, self._seed = lengths, tokens, seed
        self._batches: list[list[int]] = []
        self._epochs = self._gone = 0  # epochs made, and batches of those that are over

    def __getitem__(self, number: int) -> list[int]:
        """Return the numbers of a batch's texts. Batches are asked for in order: earlier epochs are forgotten."""
        while number >= self._gone + len(self._batches):
            self._gone += len(self._batches)
            self._batches = self._epoch(random.Random(f"{self._seed} {self._epochs}"))
            self._epochs += 1
        return self._batches[number - self._gone]

    def _epoch(self, chance: random.Random) -> list[list[int]]:
        order = chance.sample(range(len(self._lengths)), len(self._lengths))
        pool = max(1, _POOL * self._tokens * len(order) // sum(self._lengths))
        pools = (order[start : start + pool] for start in range(0, len(order), pool))
        batches = [batch for some in pools for batch in together(some, self._lengths, self._tokens)]
        chance.shuffle(batches)
        return batches


def together(texts: Sequence[int], lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """
    Cut texts into batches of similar length.

    Args:
        texts (`Sequence[int]`): Numbers of texts.
        lengths (`Sequence[int]`): Tokens of each text, by its number.
        tokens (`int`): Tokens of a batch with its padding, at most, unless a single text has more.

    Returns:
        `Iterator[list[int]]`: The numbers of each batch's texts, shorter texts first.
    """
    batch: list[int] = []
    for text in sorted(texts, key=lambda number: lengths[number]):
        if batch and (len(batch) + 1) * lengths[text] > tokens:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
