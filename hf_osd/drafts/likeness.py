"""Acceptance of a token draft on recorded texts, measured by one pass of the draft, without serving."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .._compat import execution_device
from ..errors import InputError
from ..records import Observation


@dataclass(frozen=True, slots=True)
class Likeness:
    """
    How a draft compares with its target, given the target's own text before each position.

    Attributes:
        agreement (`float`): Share of positions where both have the same best token: acceptance of greedy decoding.
        acceptance (`float`): Mean of sum_x min(p(x), q(x)): acceptance of sampling, or an upper bound of it, since all
            tokens that an observation does not hold of the target's distribution count as one.
        positions (`int`): How many positions that was measured at.
    """

    agreement: float
    acceptance: float
    positions: int


@torch.no_grad()
def likeness(draft: PreTrainedModel, observations: Sequence[Observation]) -> Likeness:
    """
    Compare a draft with its target on recorded texts.

    Args:
        draft (`PreTrainedModel`): The draft, in eval mode, which reads tokens alone.
        observations (`Sequence[Observation]`): Of serving, or of a target that has read some text.

    Raises:
        InputError: There are no observations.
    """
    if not observations:
        raise InputError("a draft is compared with its target along some text: pass at least one observation")
    same, shared = zip(*(_compare(draft, one) for one in observations), strict=True)
    return Likeness(torch.cat(same).mean().item(), torch.cat(shared).mean().item(), sum(map(len, same)))


def _compare(draft: PreTrainedModel, one: Observation) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each position, whether the first choices are the same, and the probability that is shared."""
    log_probs = _logits(draft, one.prompt_ids, one.output_ids).log_softmax(-1)  # (output, vocab)
    teacher_ids, teacher = one.teacher_ids.to(log_probs.device), one.teacher_log_probs.to(log_probs.device)
    kept = log_probs.gather(1, teacher_ids)
    tail = torch.minimum(1 - kept.exp().sum(-1), one.teacher_tail.to(log_probs.device)).clamp(min=0)
    shared = torch.minimum(kept, teacher).exp().sum(-1) + tail
    return (log_probs.argmax(-1) == teacher_ids[:, 0]).float().cpu(), shared.cpu()


def _logits(model: PreTrainedModel, prompt_ids: torch.Tensor, output_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of each output token: `(output, vocab)`, float32."""
    ids = torch.cat([prompt_ids, output_ids])[None, :-1].to(execution_device(model))
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, -len(output_ids) :].float()
