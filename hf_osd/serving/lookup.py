"""
A proposer without a model: it proposes what followed the last few tokens earlier in the text.

Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding), extended by the outputs of recent
requests as in SuffixDecoding (https://arxiv.org/abs/2411.04975), and by matches of any length.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

LOOKUP_LENGTH = 16  # tokens: longest guess
_LONGEST_MATCH = 16  # tokens: longest match that is distinguished; longer ones are accepted no more often
_CANDIDATES = 4  # latest places of a pair of tokens that are searched for the longest match
END = -1  # id between two texts, which matches nothing


@dataclass(frozen=True, slots=True)
class Guess:
    """
    A continuation of the text that the lookup found.

    Attributes:
        tokens (`list[int]`): The continuation, at least one token.
        match (`int`): Length of the match: tokens before the continuation that are the same at both places.
    """

    tokens: list[int]
    match: int


class TokenIndex:
    """A growing text with the latest places of every pair of tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # of the second token of a pair, oldest first
        self._followed: dict[int, int] = {}  # the latest place of a token that another one follows

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self.tokens.append(token)  # before its places: another thread may be reading
            place = len(self.tokens) - 1
            if place and token != END:
                before = self.tokens[place - 1]
                self._followed[before] = place - 1
                places = self._places.setdefault((before, token), [])
                places.append(place)
                if len(places) > _CANDIDATES + 1:
                    del places[0]

    def find(self, suffix: Sequence[int]) -> tuple[int, int]:
        """
        Find the longest earlier match of a text's end.

        Args:
            suffix (`Sequence[int]`): The text, at least two tokens; may be this index's own.

        Returns:
            `tuple[int, int]`: Length of the match, 0 if there is none, and the place behind it. The latest of equals.
        """
        alone = self._followed.get(suffix[-1])
        best = (0, 0) if alone is None else (1, alone + 1)
        for place in self._places.get((suffix[-2], suffix[-1]), ()):
            if place + 1 < len(self.tokens):  # not the end of the text itself
                best = max(best, (self._match(suffix, place), place + 1))
        return best

    def _match(self, suffix: Sequence[int], place: int) -> int:
        tokens, length = self.tokens, 2
        longest = min(place + 1, len(suffix), _LONGEST_MATCH)
        while length < longest and tokens[place - length] == suffix[-1 - length] != END:
            length += 1
        return length

    def read(self, place: int, count: int) -> list[int]:
        """Return up to `count` tokens from a place on; a text that repeats itself up to its end goes on repeating."""
        period = len(self.tokens) - place
        found = [self.tokens[place + step % period] for step in range(count)]
        return found[: found.index(END)] if END in found else found


class RecentOutputs:
    """
    Outputs of recent requests, shared by the requests of one assistant. They live in memory only.

    Args:
        capacity (`int`): Tokens to keep; the oldest half is dropped when they are reached.
    """

    def __init__(self, capacity: int = 1 << 15) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self.index = TokenIndex()  # replaced, never shrunk: a reader goes on with the one it has

    def add(self, tokens: Sequence[int]) -> None:
        """Append one output."""
        with self._lock:
            if len(self.index.tokens) + len(tokens) > self._capacity:
                kept, self.index = self.index.tokens[-self._capacity // 2 :], TokenIndex()
                self.index.extend(kept)
            self.index.extend([*tokens, END])


class Lookup:
    """
    Guesses for the rows of one batch.

    Args:
        prompts (`Sequence[Sequence[int]]`): The prompt of each row, without padding.
        recent (`RecentOutputs`): Other requests' outputs.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], recent: RecentOutputs) -> None:
        self._recent = recent
        self._rows = [TokenIndex() for _ in prompts]
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        for index, prompt in zip(self._rows, prompts, strict=True):
            index.extend(prompt)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Append what a row has just taken."""
        self._rows[row].extend(tokens)

    def guess(self, row: int, count: int) -> Guess | None:
        """Return the continuation of the longest match, the row's own text before others'; `None` without a match."""
        own, recent = self._rows[row], self._recent.index
        if count < 1 or len(own.tokens) < 2:
            return None
        found = [(*index.find(own.tokens), index) for index in (own, recent)]
        match, place, index = max(found, key=lambda one: one[0])
        tokens = index.read(place, count) if match else []
        return Guess(tokens, match) if tokens else None

    def finish(self, lengths: Sequence[int]) -> None:
        """Leave the outputs, the first `lengths[r]` tokens of each row, to later requests."""
        for index, prompt, length in zip(self._rows, self._prompt_lengths, lengths, strict=True):
            self._recent.add(index.tokens[prompt : prompt + length])
