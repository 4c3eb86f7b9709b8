"""
Finds where an output differs from that of plain `generate`, and whether rounding explains it.

Rounding changes a greedy output where it moves the two best logits against each other by more than they are apart. How
far rounding moves them is measured on the target itself, by computing the same logits in one forward over the whole
text, and in its own `generate` of a batch. An output of a batch may also equal that of `generate` for this batch.
"""

import math
from typing import Any

import torch

from ..demo.models import Inputs
from .answers import Answer, logits_of_one_pass
from .results import Difference


def find_difference(
    request: int, answer: Answer, tokens: torch.Tensor, dtype: torch.dtype, in_batch: torch.Tensor | None = None
) -> Difference | None:
    """
    Compare an output with that of plain `generate`.

    Args:
        request (`int`): Index of the prompt.
        answer (`Answer`): What plain `generate` wrote.
        tokens (`torch.LongTensor` of shape `(new,)`): The output to compare.
        dtype (`torch.dtype`): The target's.
        in_batch (`torch.LongTensor` of shape `(new,)`, *optional*):
            What `generate` wrote for the batch that the tokens were written in.

    Returns:
        `Difference`, *optional*: `None` where the two are the same.
    """
    position = first_difference(answer.tokens, tokens)
    if position is None:
        return None
    is_batch = in_batch is not None and torch.equal(in_batch[: position + 1], tokens[: position + 1])
    if position >= min(len(answer.tokens), len(tokens)):  # one is a prefix of the other
        return Difference(request, position, None, 0.0, is_batch)
    scores = answer.scores[position]
    best, written = float(scores.max()), float(scores[tokens[position]])
    gap = best - written
    return Difference(request, position, gap if math.isfinite(gap) else None, 2 * _last_place(best, dtype), is_batch)


def measure_rounding(target: Any, request: Inputs, answer: Answer, in_batch: Answer) -> float:
    """
    Return by how much rounding changes the distance between the two best tokens, at most over an answer.

    Args:
        target (`PreTrainedModel`): The model.
        request (`Inputs`): The prompt, `(1, prompt)`.
        answer (`Answer`): The answer to it, token by token.
        in_batch (`Answer`): The answer in a batch; it counts up to the first token that differs.
    """
    differs = first_difference(answer.tokens, in_batch.tokens)
    logits = in_batch.logits if differs is None else in_batch.logits[: differs + 1]
    in_one_pass = logits_of_one_pass(target, request["input_ids"], answer.tokens)
    return max(_change(answer, logits), _change(answer, in_one_pass))


def _change(answer: Answer, others: torch.Tensor) -> float:
    """Compare with other logits of the first positions of an answer, `(some, vocab)`."""
    count = min(len(answer.tokens), len(others))
    best = answer.scores[:count].topk(2).indices
    distances = [logits[:count].gather(1, best).diff() for logits in (answer.logits, others)]  # each (count, 1)
    return float((distances[0] - distances[1]).abs().max())


def first_difference(tokens: torch.Tensor, others: torch.Tensor) -> int | None:
    """Return the first position where two sequences, `(new,)` each, differ; `None` where they are equal."""
    shared = min(len(tokens), len(others))
    unequal = (tokens[:shared] != others[:shared]).nonzero()
    if len(unequal):
        return int(unequal[0])
    return None if len(tokens) == len(others) else shared


def _last_place(value: float, dtype: torch.dtype) -> float:
    """Return a unit in the last place of a number of some dtype."""
    return torch.finfo(dtype).eps * 2.0 ** (math.frexp(value)[1] - 1)
