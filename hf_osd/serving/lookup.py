"""
A proposer without a model: it proposes what followed the end of the text at earlier places.

Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding), extended as in SuffixDecoding
(https://arxiv.org/abs/2411.04975) by the outputs of recent requests, matches of any length, and a tree of what
followed at several places.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

LOOKUP_LENGTH = 16  # tokens: longest continuation
_LONGEST_MATCH = 16  # tokens: longest match that is distinguished; longer ones are accepted no more often
_PLACES = 16  # latest places that are remembered of a token, and of a pair of tokens
# Weight of a place by the length of its match: each token counts fourfold, up to eight tokens.
_WEIGHTS = [4.0 ** min(match, 8) for match in range(_LONGEST_MATCH + 1)]
END = -1  # id between two texts, which matches nothing


class Evidence(NamedTuple):
    """
    What speaks for a token: the places that it follows.

    Attributes:
        match (`int`): Tokens before it that are the same as in the text, at the best of these places.
        share (`float`): Weight of these places among all that match, in (0, 1].
    """

    match: int
    share: float


class Place(NamedTuple):
    """
    An earlier place that the text matches.

    Attributes:
        tokens (`Sequence[int]`): The text that it lies in.
        start (`int`): The index of what follows the match.
        match (`int`): Tokens before that are the same.
    """

    tokens: Sequence[int]
    start: int
    match: int


class Branch:
    """
    A token that followed some places, and what followed next.

    Args:
        token (`int`): The token.
        evidence (`Evidence`): What speaks for it.
        places (`Sequence[Place]`): The places.
        step (`int`): Tokens between the end of the text and what follows this one.
    """

    __slots__ = ("_branches", "_places", "_step", "evidence", "token")

    def __init__(self, token: int, evidence: Evidence, places: Sequence[Place], step: int) -> None:
        self.token, self.evidence = token, evidence
        self._places, self._step = places, step
        self._branches: list[Branch] | None = None

    @property
    def branches(self) -> list["Branch"]:
        """The tokens that followed next, those with the largest share first."""
        if self._branches is None:
            self._branches = self._find()
        return self._branches

    def _find(self) -> list["Branch"]:
        step, found, weights = self._step, dict[int, list[Place]](), dict[int, float]()
        for place in self._places:
            tokens, start, match = place
            # A text that repeats itself up to its end goes on repeating.
            token = tokens[start + step % (len(tokens) - start)]
            weight = _WEIGHTS[min(match + step, _LONGEST_MATCH)]
            if token in found:
                found[token].append(place)
                weights[token] += weight
            else:
                found[token], weights[token] = [place], weight
        total = sum(weights.values())
        weights.pop(END, None)
        branches = []
        for token in sorted(weights, key=weights.__getitem__, reverse=True):
            evidence = Evidence(max(place.match for place in found[token]) + step, weights[token] / total)
            branches.append(Branch(token, evidence, found[token], step + 1))
        return branches


class TokenIndex:
    """A growing text with the latest places of every token, and of every pair of tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # by the token or the pair that ends there

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self.tokens.append(token)  # before its places: another thread may be reading
            place = len(self.tokens) - 1
            for length in (1, 2) if token != END else ():
                places = self._places.setdefault(tuple(self.tokens[-length:]), [])
                places.append(place)
                if len(places) > _PLACES:
                    del places[0]

    def find(self, suffix: Sequence[int]) -> list[Place]:
        """
        Return earlier places that a text's end matches, and that something follows; the latest first.

        Args:
            suffix (`Sequence[int]`): The end of the text, which may be this index's own.
        """
        last = len(self.tokens) - 1  # nothing follows it
        ends = {end for length in (1, 2) for end in self._places.get(tuple(suffix[-length:]), ())}
        return [
            Place(self.tokens, end + 1, self._match(suffix, end)) for end in sorted(ends, reverse=True) if end < last
        ]

    def _match(self, suffix: Sequence[int], end: int) -> int:
        tokens, length = self.tokens, 1
        longest = min(end + 1, len(suffix), _LONGEST_MATCH)
        while length < longest and tokens[end - length] == suffix[-1 - length] != END:
            length += 1
        return length


class RecentOutputs:
    """
    Outputs of recent requests, shared by the requests of one assistant. They live in memory only.

    Args:
        capacity (`int`, defaults to 32768): Most tokens to keep. When they are reached, the latest half stays.
    """

    def __init__(self, capacity: int = 1 << 15) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self.index = TokenIndex()  # replaced, never shrunk: a reader goes on with the one it has

    def add(self, tokens: Sequence[int]) -> None:
        """Append one output, or its end if it is too long to be kept."""
        added = [*tokens, END][-self._capacity :] if self._capacity else []
        with self._lock:
            if len(self.index.tokens) + len(added) > self._capacity:
                old, self.index = self.index.tokens, TokenIndex()
                self.index.extend(old[len(old) - min(self._capacity // 2, self._capacity - len(added)) :])
            self.index.extend(added)


class Lookup:
    """
    The texts of the rows of one batch.

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

    def find(self, row: int, path: Sequence[int] = ()) -> Branch:
        """
        Return the end of a row's text, with what followed it earlier and in others' outputs as its branches.

        Args:
            row (`int`): The row.
            path (`Sequence[int]`): Proposed tokens to append to the text.
        """
        own = self._rows[row]
        suffix = [*own.tokens[-_LONGEST_MATCH:], *path][-_LONGEST_MATCH:]
        if not suffix:
            return Branch(END, Evidence(0, 1.0), (), step=0)
        places = own.find(suffix)
        if path:
            text = [*own.tokens, *path]
            places = [place._replace(tokens=text) for place in places]
        return Branch(suffix[-1], Evidence(0, 1.0), [*places, *self._recent.index.find(suffix)], step=0)

    def finish(self, lengths: Sequence[int]) -> None:
        """Leave the outputs, the first `lengths[r]` tokens of each row, to later requests."""
        for index, prompt, length in zip(self._rows, self._prompt_lengths, lengths, strict=True):
            self._recent.add(index.tokens[prompt : prompt + length])
