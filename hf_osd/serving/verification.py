"""
Which proposed tokens the target accepts: those that it chooses itself, on a walk down the tree.

At the end of the text, and then behind every node that it comes to, the target chooses its next token as in plain
decoding. The walk goes on to the nodes that propose this token, and ends where there is none. So the output is the
target's for any proposal whatever. Greedy, the choice is the argmax. Sampling, it is drawn from the target's
distribution p: for nodes that were proposed without chance, that is recursive rejection (SpecInfer,
https://arxiv.org/abs/2305.09781, Algorithm 2). A node that the draft has drawn itself, from q, is tried first, as in
Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (https://arxiv.org/abs/2211.17192,
Algorithm 1).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from ..records import Proposal, Verdict
from .tree import ROOT, chain


@dataclass(frozen=True, slots=True)
class Places:
    """
    Where the rows are that still walk down their trees.

    Attributes:
        depth (`int`): Tokens that each of them has accepted.
        rows (`list[int]`): Their numbers, ascending.
        nodes (`list[list[int]]`): For each, the nodes of its text: [`ROOT`], or those that propose its last token.
            Several may propose the same.
        last (`list[int]`): Their last tokens; empty at depth 0.
    """

    depth: int
    rows: list[int]
    nodes: list[list[int]]
    last: list[int]


ReadScores = Callable[[Places], torch.Tensor]
"""Returns the target's processed scores behind the text of every row, `(rows, vocab)`."""

Choose = Callable[[Places], list[int]]
"""Returns the target's next token for every row."""


def verify(proposal: Proposal, choose: Choose, room: Sequence[int], eos_token_ids: Collection[int] = ()) -> Verdict:
    """
    Follow the target's own tokens through a proposal. All rows go down one level at a time.

    Args:
        proposal (`Proposal`): `n` nodes a row; `n` may be 0.
        choose (`Callable`): Chooses the next token; asked once for each token that a row takes, and for no other.
        room (`Sequence[int]`): The most tokens that each row takes.
        eos_token_ids (`Collection[int]`, *optional*): Tokens behind which nothing is chosen.
    """
    batch, n = proposal.tokens.shape
    proposed, parents = proposal.tokens.tolist(), proposal.parents or [chain(n)] * batch
    followers = [_followers(*row) for row in zip(proposed, parents, strict=True)]
    tokens: list[list[int]] = [[] for _ in room]
    ends = [ROOT] * batch  # the last accepted node of each row
    going = {row: [ROOT] for row, left in enumerate(room) if left > 0}
    depth = 0
    while going:
        rows = list(going)
        chosen = choose(Places(depth, rows, list(going.values()), [tokens[row][-1] for row in rows] if depth else []))
        depth += 1
        for row, token in zip(rows, chosen, strict=True):
            tokens[row].append(token)
            over = token in eos_token_ids or depth == room[row]
            nodes = [] if over else [node for place in going[row] for node in followers[row].get((place, token), ())]
            if nodes:
                going[row], ends[row] = nodes, nodes[0]
            else:
                del going[row]
    return Verdict([_path(nodes, end) for nodes, end in zip(parents, ends, strict=True)], tokens)


def _path(parents: Sequence[int], node: int) -> list[int]:
    """The ancestors of a node and itself, from the text on; nothing for [`ROOT`]."""
    found: list[int] = []
    while node != ROOT:
        found.append(node)
        node = parents[node]
    return found[::-1]


def _followers(tokens: Sequence[int], parents: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """The nodes behind each node that propose a token."""
    found: dict[tuple[int, int], list[int]] = {}
    for node, place in enumerate(zip(parents, tokens, strict=True)):
        found.setdefault(place, []).append(node)
    return found


def best_of_all(scores: torch.Tensor) -> Choose:
    """Choose the best token, by scores `(batch, n + 1, vocab)` behind the text and behind each node."""
    best = scores.argmax(dim=-1).tolist()  # the host waits here
    return lambda places: [best[row][nodes[0] + 1] for row, nodes in zip(places.rows, places.nodes, strict=True)]


def best_of(read: ReadScores) -> Choose:
    """Choose the best token, by scores that are read where the walk comes to."""
    return lambda places: read(places).argmax(dim=-1).tolist()


class Draw:
    """
    Draws the target's tokens from p, the softmax of its scores.

    Where the draft has drawn a token x from q, it is accepted with probability min(1, p(x) / q(x)); else the token is
    drawn from max(p - q, 0), normalised. Its distribution is p either way.

    Args:
        read (`Callable`): Reads the scores.
        proposal (`Proposal`): With the probabilities q that its first tokens were drawn from, if they were.
        generator (`torch.Generator`, *optional*): Source of randomness, on the device of the scores.
    """

    def __init__(self, read: ReadScores, proposal: Proposal, generator: torch.Generator | None = None) -> None:
        self._read, self._tokens, self._q, self._generator = read, proposal.tokens, proposal.probabilities, generator
        self._drawn = 0 if self._q is None else self._q.shape[1]

    def __call__(self, places: Places) -> list[int]:
        """Draw for every row; see [`Choose`]."""
        p = self._read(places).softmax(dim=-1)
        step = places.depth  # what the draft has drawn is a chain, whose nodes come first
        with_draw = [i for i, nodes in enumerate(places.nodes) if step < self._drawn and step - 1 in nodes]
        if not with_draw:
            return sample(p, self._generator).tolist()
        rows = [places.rows[i] for i in with_draw]
        assert self._q is not None
        chosen = self._couple(p, with_draw, self._tokens[rows, step], self._q[rows, step])
        if left := [i for i in range(len(places.rows)) if i not in chosen]:
            chosen |= zip(left, sample(p[left], self._generator).tolist(), strict=True)
        return [chosen[i] for i in range(len(places.rows))]

    def _couple(self, p: torch.Tensor, places: list[int], tokens: torch.Tensor, q: torch.Tensor) -> dict[int, int]:
        """Accept drawn tokens at some places, which are returned; elsewhere, leave what remains of p in its place."""
        here = p[places]
        p_token, q_token = (values.gather(1, tokens[:, None])[:, 0] for values in (here, q))
        u = torch.rand(p_token.shape, generator=self._generator, dtype=p_token.dtype, device=p_token.device)
        # u < p / q without the division. Where p is 0 this never holds: a forbidden token is refused for certain.
        accepted = u * q_token < p_token
        if not bool(accepted.all()):
            p[places] = torch.where(accepted[:, None], here, residual(here, q))
        pairs = zip(places, accepted.tolist(), tokens.tolist(), strict=True)
        return {place: token for place, is_accepted, token in pairs if is_accepted}


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """
    Return the distribution of a token after one that was sampled from q has been refused.

    Args:
        p (`torch.FloatTensor` of shape `(batch, vocab)`): The target's probabilities.
        q (`torch.FloatTensor` of shape `(batch, vocab)`): The draft's.

    Returns:
        `torch.FloatTensor` of shape `(batch, vocab)`: max(p - q, 0), normalised.
    """
    surplus = (p - q).clamp(min=0)
    mass = surplus.sum(dim=-1, keepdim=True)
    # A refusal where p equals q is a rounding error of measure zero; p is then the right answer as well.
    return torch.where(mass > 0, surplus / mass, p)


def sample(weights: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Sample one index a row of `weights`, shape `(batch, vocab)`, not necessarily normalised; returns `(batch,)`.

    By the inverse of the distribution function: over 50,000 tokens a twentieth of what `torch.multinomial` takes on a
    CPU. An index of weight 0 is never chosen.
    """
    sums = weights.cumsum(dim=-1)
    total = sums[:, -1:]
    u = torch.rand(total.shape, generator=generator, dtype=total.dtype, device=total.device)
    below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round up to it, and select no index
    return torch.searchsorted(sums, torch.minimum(u * total, below), right=True)[:, 0]
