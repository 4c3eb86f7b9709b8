"""
Which proposed tokens the target accepts: pure functions of both models' distributions.

Greedy: a node stands while it is the target's own choice behind its parent. Sampling: the children of a node are tried
in turn, each against what is left of the target's distribution after those before it were refused (SpecInfer,
https://arxiv.org/abs/2305.09781, Algorithm 2). With one child a node, that is Leviathan et al., "Fast Inference from
Transformers via Speculative Decoding" (https://arxiv.org/abs/2211.17192), Algorithm 1. The output has the target's
distribution for any proposal whatever.
"""

from collections.abc import Callable, Sequence

import torch

from ..records import Proposal, Verdict
from .tree import ROOT, chain, lineage


def verify_greedy(scores: torch.Tensor, proposal: Proposal) -> Verdict:
    """
    Accept while the proposal is the target's argmax.

    Args:
        scores (`torch.FloatTensor` of shape `(batch, n + 1, vocab)`): The target's processed scores: behind the text,
            and behind each node.
        proposal (`Proposal`): `n` nodes a row; `n` may be 0.
    """
    found = torch.cat([proposal.tokens, scores.argmax(dim=-1)], dim=1).tolist()  # the host waits here
    n = proposal.tokens.shape[1]
    paths = [_greedy_path(parents, row[:n], row[n:]) for parents, row in zip(_parents(proposal), found, strict=True)]
    ends = [path[-1] if path else ROOT for path in paths]
    tokens = [
        [*(row[node] for node in path), row[n + 1 + end]] for path, end, row in zip(paths, ends, found, strict=True)
    ]
    return Verdict(paths, tokens)


def _greedy_path(parents: Sequence[int], tokens: Sequence[int], choices: Sequence[int]) -> list[int]:
    """The longest path of right tokens; `choices` stand behind the text, then behind each node."""
    right: set[int] = {ROOT}
    paths = lineage(parents)
    best: list[int] = []
    for node, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
        if parent in right and token == choices[parent + 1]:
            right.add(node)
            best = max(best, paths[node], key=len)
    return best


def _parents(proposal: Proposal) -> Sequence[Sequence[int]]:
    batch, n = proposal.tokens.shape
    return proposal.parents if proposal.parents is not None else [chain(n)] * batch


def verify_sampling(
    scores: torch.Tensor,
    proposal: Proposal,
    generator: torch.Generator | None = None,
    warp: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Verdict:
    """
    Accept token x with probability min(1, p(x) / q(x)), else go on with max(p - q, 0), normalised, in the place of p.

    q is what x was sampled from; of a token chosen without chance it is 1 at this token, so that p(x) is the chance of
    its acceptance. Where no child of a node is accepted, the next token is sampled from what is left of p.

    Args:
        scores (`torch.FloatTensor` of shape `(batch, n + 1, vocab)`): The target's processed scores; p is their
            softmax.
        proposal (`Proposal`): Tokens, with the probabilities q that the first of them were sampled from.
        generator (`torch.Generator`, *optional*): Source of randomness, on the device of `scores`.
        warp (`Callable`, *optional*): Processes scores `(batch, vocab)` of the nodes that are reached, where `scores`
            are raw logits.
    """
    walk = _Walk(scores, proposal, generator, warp or (lambda values: values))
    while walk.descend():
        pass
    return walk.verdict(sample(walk.left, generator))


class _Walk:
    """Walks all rows of a batch down their trees, one level at a time."""

    def __init__(
        self,
        scores: torch.Tensor,
        proposal: Proposal,
        generator: torch.Generator | None,
        warp: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._scores, self._proposal, self._generator, self._warp = scores, proposal, generator, warp
        self._children = _children(_parents(proposal)).to(scores.device)  # (batch, n + 1, most)
        self._rows = torch.arange(len(scores), device=scores.device)
        self._q = proposal.probabilities
        self._drawn = 0 if self._q is None else self._q.shape[1]
        self._places = torch.zeros_like(self._rows)  # index of each row in dimension 1 of the scores
        self._steps: list[torch.Tensor] = []  # the node that each row moved to at a level, or ROOT
        self._going = torch.ones_like(self._rows, dtype=torch.bool)
        self.left = warp(scores[:, 0]).softmax(dim=-1)  # (batch, vocab): what is left of p where each row is

    def descend(self) -> bool:
        """Move every unfinished row to the child that it accepts; return whether any row moved."""
        moved = torch.full_like(self._rows, ROOT)
        for rank in range(self._children.shape[2]):
            child = self._children[self._rows, self._places, rank]
            tries = self._going & (moved == ROOT) & (child != ROOT)
            if not bool(tries.any()):
                break
            moved = torch.where(self._try(child.clamp(min=0), tries), child, moved)
        self._going = moved != ROOT
        if not bool(self._going.any()):
            return False
        self._steps.append(moved)
        self._places = torch.where(self._going, moved + 1, self._places)
        p = self._warp(self._scores[self._rows, self._places]).softmax(dim=-1)
        self.left = torch.where(self._going[:, None], p, self.left)
        return True

    def _try(self, child: torch.Tensor, tries: torch.Tensor) -> torch.Tensor:
        """Accept or refuse a child in each row; a refusal replaces `left` by the residual distribution."""
        tokens = self._proposal.tokens[self._rows, child]
        taken = self._taken(child, tokens)
        p_token, q_token = (values.gather(1, tokens[:, None])[:, 0] for values in (self.left, taken))
        u = torch.rand(p_token.shape, generator=self._generator, dtype=p_token.dtype, device=p_token.device)
        # u < p / q without the division. Where p is 0 this never holds: a forbidden token is refused for certain.
        accepted = tries & (u * q_token < p_token)
        self.left = torch.where((tries & ~accepted)[:, None], residual(self.left, taken), self.left)
        return accepted

    def _taken(self, child: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The distribution q that each child was chosen from, `(batch, vocab)`."""
        sure = torch.zeros_like(self.left).scatter_(1, tokens[:, None], 1.0)
        if self._q is None or not self._drawn:
            return sure
        drawn = self._q[self._rows, child.clamp(max=self._drawn - 1)]
        return torch.where((child < self._drawn)[:, None], drawn, sure)

    def verdict(self, last: torch.Tensor) -> Verdict:
        """Return the accepted paths, with the last token of each row."""
        batch = len(self._rows)
        steps = torch.stack(self._steps, dim=1) if self._steps else self._rows.new_zeros(batch, 0)
        tokens = self._proposal.tokens[self._rows[:, None], steps.clamp(min=0)]
        found = torch.cat([steps, tokens, last[:, None]], dim=1).tolist()
        levels = steps.shape[1]
        paths = [[node for node in row[:levels] if node != ROOT] for row in found]
        counted = [(len(path), row) for path, row in zip(paths, found, strict=True)]
        return Verdict(paths, [[*row[levels : levels + count], row[-1]] for count, row in counted])


def _children(parents: Sequence[Sequence[int]]) -> torch.Tensor:
    """The children of the text, then of each node, in order: `(batch, n + 1, most)`, filled up with ROOT."""
    n = len(parents[0])
    lists: list[list[list[int]]] = [[[] for _ in range(n + 1)] for _ in parents]
    for row, nodes in zip(lists, parents, strict=True):
        for node, parent in enumerate(nodes):
            row[parent + 1].append(node)
    most = max((len(one) for row in lists for one in row), default=0)
    filled = [[[*one, *[ROOT] * (most - len(one))] for one in row] for row in lists]
    return torch.tensor(filled, dtype=torch.long).view(len(parents), n + 1, most)


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
