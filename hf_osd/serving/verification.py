"""
Which proposed tokens the target accepts: pure functions of both models' distributions.

Greedy: a proposal stands while it is the target's own choice. Sampling: Leviathan et al., "Fast Inference from
Transformers via Speculative Decoding" (https://arxiv.org/abs/2211.17192), Algorithm 1 and appendix A.1, whose output
has the target's distribution for any draft whatever.
"""

import torch

from ..records import Proposal, Verdict


def leading(accepted: torch.Tensor) -> torch.Tensor:
    """
    Count the accepted tokens before the first refusal.

    Args:
        accepted (`torch.BoolTensor` of shape `(batch, k)`): Verdict on each proposed token alone.

    Returns:
        `torch.LongTensor` of shape `(batch,)`: In [0, k].
    """
    return accepted.long().cumprod(dim=1).sum(dim=1)


def verify_greedy(scores: torch.Tensor, proposal: Proposal) -> Verdict:
    """
    Accept while the proposal is the target's argmax.

    Args:
        scores (`torch.FloatTensor` of shape `(batch, k + 1, vocab)`): The target's processed scores: at each proposed
            token's position, and behind the last one.
        proposal (`Proposal`): `k` tokens a row; `k` may be 0.
    """
    choices = scores.argmax(dim=-1)  # (batch, k + 1)
    if not proposal.tokens.shape[1]:
        return Verdict(choices, torch.zeros_like(choices[:, 0]))
    return Verdict(choices, leading(choices[:, :-1] == proposal.tokens))


def verify_sampling(scores: torch.Tensor, proposal: Proposal, generator: torch.Generator | None = None) -> Verdict:
    """
    Accept token x with probability min(1, p(x) / q(x)); at the first refusal sample from max(p - q, 0), normalised.

    Args:
        scores (`torch.FloatTensor` of shape `(batch, k + 1, vocab)`): The target's processed scores; p is their
            softmax.
        proposal (`Proposal`): Tokens, with the probabilities q that they were sampled from.
        generator (`torch.Generator`, *optional*): Source of randomness, on the device of `scores`.
    """
    p = scores.softmax(dim=-1)
    drafted = proposal.tokens[..., None]  # (batch, k, 1)
    if proposal.probabilities is None:  # nothing proposed, or proposed by a point mass
        q = torch.zeros_like(p[:, :-1]).scatter_(2, drafted, 1.0)
    else:
        q = proposal.probabilities
    p_drafted, q_drafted = p[:, :-1].gather(2, drafted)[..., 0], q.gather(2, drafted)[..., 0]  # (batch, k)
    u = torch.rand(p_drafted.shape, generator=generator, dtype=p.dtype, device=p.device)
    # u < p / q without the division. Where p is 0 this never holds: a forbidden token is refused for certain.
    accepted = leading(u * q_drafted < p_drafted)
    token = sample(residual(p, q, accepted), generator)  # (batch,)
    tokens = torch.cat([proposal.tokens, token[:, None]], dim=1).scatter(1, accepted[:, None], token[:, None])
    return Verdict(tokens, accepted)


def residual(p: torch.Tensor, q: torch.Tensor, accepted: torch.Tensor) -> torch.Tensor:
    """
    Return the distribution of the token behind the accepted ones, not normalised.

    Args:
        p (`torch.FloatTensor` of shape `(batch, k + 1, vocab)`): The target's probabilities.
        q (`torch.FloatTensor` of shape `(batch, k, vocab)`): The draft's.
        accepted (`torch.LongTensor` of shape `(batch,)`): Tokens accepted. Where it is `k`, q counts as zero, so that
            the residual is p itself: the bonus token.

    Returns:
        `torch.FloatTensor` of shape `(batch, vocab)`.
    """
    rows = torch.arange(len(p), device=p.device)
    p_next = p[rows, accepted]
    q_next = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)[rows, accepted]
    surplus = (p_next - q_next).clamp(min=0)
    # A refusal where p equals q is a rounding error of measure zero; p is then the right answer as well.
    return torch.where(surplus.sum(dim=-1, keepdim=True) > 0, surplus, p_next)


def sample(weights: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Sample one index a row of `weights`, shape `(batch, vocab)`, not necessarily normalised; returns `(batch,)`."""
    return torch.multinomial(weights, 1, generator=generator)[:, 0]
