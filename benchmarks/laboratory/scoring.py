"""How well a draft would have served a recorded request, and what serving would have recorded of it."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from hf_osd.learning.losses import overlap
from hf_osd.records import Observation

# Tokens that a round drafts, for `accepted_per_round`; the paper's k.
DRAFT_LENGTH = 5


@dataclass(frozen=True, slots=True)
class Score:
    """
    One request in numbers, each summed over the positions of its output.

    Attributes:
        positions (`int`): Tokens of the output.
        agreed (`int`): How many of them are the draft's first choice after the tokens before them.
        overlap (`float`): Probability that a token sampled from the draft is accepted: the sum of min(p, q).
        run (`int`): Tokens that a round of `DRAFT_LENGTH` greedily drafted ones, started there, has accepted.
    """

    positions: int
    agreed: int
    overlap: float
    run: int


@torch.no_grad()
def score(draft: PreTrainedModel, request: Observation) -> tuple[Score, Observation]:
    """
    Compare the draft's choices with a recorded answer, every position after the tokens that really came before.

    Args:
        draft ([`~transformers.PreTrainedModel`]): The live draft.
        request (`Observation`): A recorded request.

    Returns:
        `tuple[Score, Observation]`: The score, and the request as serving would record it where it drafts everywhere.
    """
    count = len(request.output_ids)
    inputs = torch.cat((request.prompt_ids, request.output_ids))[None, :-1]
    logits = draft(input_ids=inputs, logits_to_keep=count, use_cache=False).logits[0].float()  # (output, vocab)
    choices = logits.argmax(-1)
    agreed = choices == request.output_ids
    shared = overlap(logits, request.teacher_ids, request.teacher_log_probs, request.teacher_tail)
    result = Score(count, int(agreed.sum()), float(shared.sum()), run_lengths(agreed, DRAFT_LENGTH))
    return result, replace(request, draft_ids=choices, accepted=agreed)


def run_lengths(agreed: torch.Tensor, longest: int) -> int:
    """Sum over positions of how many agreements follow one another from there on, counted up to `longest`."""
    padded = torch.nn.functional.pad(agreed.long(), (0, longest - 1))
    return int(padded.unfold(0, longest, 1).cumprod(-1).sum())
