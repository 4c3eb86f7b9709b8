"""Plain data that modules share: a round's proposal and verdict, and what serving hands to learning."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Proposal:
    """
    What is proposed in one round: a tree of tokens behind every row, whose nodes stand before their children.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, n)`): The token of each node.
        probabilities (`torch.FloatTensor` of shape `(batch, k, vocab)`, *optional*): The very distributions, after
            every logits processor, that the first `k` nodes were sampled from. Other nodes were chosen without chance,
            and so all of them where it is `None`.
        parents (`Sequence[Sequence[int]]`, *optional*): By row, the node that each node follows, counted from 0; -1
            for the end of the text. `None` for a chain: each node follows the one before it.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor | None = None
    parents: Sequence[Sequence[int]] | None = None

    def to(self, device: torch.device) -> "Proposal":
        """Return the proposal on another device; the same object where it is there already."""
        if self.tokens.device == device:
            return self
        probabilities = None if self.probabilities is None else self.probabilities.to(device)
        return Proposal(self.tokens.to(device), probabilities, self.parents)


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What the target says of one proposal.

    Attributes:
        paths (`list[list[int]]`): The accepted nodes of each row, from the text on.
        tokens (`list[list[int]]`): What each row commits: the tokens of these nodes, then the target's own (a
            correction, or the bonus token).
    """

    paths: list[list[int]]
    tokens: list[list[int]]


@dataclass(frozen=True, slots=True)
class Observation:
    """
    One finished request, with the target's own distribution at every position of its output.

    The distributions are those of the target's raw logits (temperature 1, before processors), sparse: the `k` largest
    log-probabilities, and the mass of all other tokens. All tensors are on the CPU and free of padding.

    Attributes:
        prompt_ids (`torch.LongTensor` of shape `(prompt,)`): The prompt, without padding.
        output_ids (`torch.LongTensor` of shape `(output,)`): The generated tokens, eos included.
        teacher_ids (`torch.LongTensor` of shape `(output, k)`): Most likely tokens at each position, best first.
        teacher_log_probs (`torch.FloatTensor` of shape `(output, k)`): Their log-probabilities, float32.
        teacher_tail (`torch.FloatTensor` of shape `(output,)`): Probability of all other tokens together, in [0, 1].
        draft_ids (`torch.LongTensor` of shape `(output,)`): The token the draft chose there; -1 where it chose none (a
            bonus token, or a round without drafting).
        accepted (`torch.BoolTensor` of shape `(output,)`): Whether that is the token in the output.
        states (`torch.BFloat16Tensor` of shape `(prompt + output - 1, size)`, *optional*): Hidden states of the target
            at every token but the last, for a draft that reads them; `None` where they are not kept.
        source_ids (`torch.LongTensor` of shape `(source,)`, *optional*): What the target's encoder has read, without
            padding; `None` without an encoder, and where it reads no text.
    """

    prompt_ids: torch.Tensor
    output_ids: torch.Tensor
    teacher_ids: torch.Tensor
    teacher_log_probs: torch.Tensor
    teacher_tail: torch.Tensor
    draft_ids: torch.Tensor
    accepted: torch.Tensor
    states: torch.Tensor | None = None
    source_ids: torch.Tensor | None = None

    @property
    def rejected(self) -> torch.Tensor:
        """Positions where the draft proposed a token and the target refused it; `(output,)`, bool."""
        return (self.draft_ids >= 0) & ~self.accepted


def sparse_teacher(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What an [`Observation`] keeps of the target's distributions.

    Args:
        logits (`torch.FloatTensor` of shape `(..., vocab)`): Raw logits.
        k (`int`): Tokens to keep; all, where there are fewer.

    Returns:
        `tuple(torch.LongTensor, torch.FloatTensor, torch.FloatTensor)`: The most likely tokens, best first, and their
        log-probabilities, of shape `(..., k)`; the probability of all others together, of shape `(...)`. On the
        device of the logits.
    """
    top = logits.topk(min(k, logits.shape[-1]), dim=-1)
    log_probs = top.values - logits.logsumexp(dim=-1, keepdim=True)
    return top.indices, log_probs, (1.0 - log_probs.exp().sum(dim=-1)).clamp_(min=0.0)
