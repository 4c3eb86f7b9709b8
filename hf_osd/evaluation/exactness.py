"""
Finds where an output differs from that of plain `generate`, and whether rounding explains it.

Rounding changes a greedy output where it moves the two best logits against each other by more than they are apart. How
far rounding moves them is measured on the target itself, by computing the same logits in one forward over the whole
text, and in its own `generate` of a batch. An output of a batch may also equal that of `generate` for this batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .encoding import Inputs, columns_before, end_tokens, start_token, until_end


@dataclass(frozen=True, slots=True)
class Answer:
    """
    The greedy answer of plain `generate` to one prompt.

    Attributes:
        tokens (`torch.LongTensor` of shape `(new,)`): Up to and including the first end-of-sequence token.
        scores (`torch.FloatTensor` of shape `(new, vocab)`): Scores that each token is the largest of.
        logits (`torch.FloatTensor` of shape `(new, vocab)`): Likewise, before logits processors.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Difference:
    """
    An output that is not that of plain `generate`.

    Attributes:
        request (`int`): Index of the request.
        position (`int`): First position of the output that differs.
        gap (`float`, *optional*):
            How far the token there lies below the best one, in the scores that plain `generate` chose from. `None`
            where there is no such distance: an output that is too long or too short, a token that is forbidden.
        step (`float`): Two units in the last place of the best score, in the target's dtype: one for each logit.
        is_batch (`bool`):
            Whether `generate` of the same batch writes the same up to there. Beside rounding, that may be a logits
            processor that takes padding for text.
        contender (`str`): Whose output it is; empty where that is clear.
    """

    request: int
    position: int
    gap: float | None
    step: float
    is_batch: bool = False
    contender: str = ""

    def is_explained(self, rounding: float) -> bool:
        """Say whether a change of the distance by `rounding` explains it, or a last place, or the batch."""
        return self.is_batch or (self.gap is not None and self.gap <= max(rounding, self.step))


def plain_answers(target: Any, inputs: Inputs, options: Mapping[str, Any]) -> list[Answer]:
    """
    Answer prompts with `generate`.

    Args:
        target (`PreTrainedModel`): The model.
        inputs (`Inputs`): Prompts, `(batch, prompt)`.
        options (`Mapping[str, Any]`): For `generate`, greedy.
    """
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = target.generate(**inputs, **options, **wanted)
    scores, logits = (torch.stack(steps, dim=1) for steps in (output.scores, output.logits))  # (batch, new, vocab)
    ends, answers = end_tokens(target), []
    for row, tokens in enumerate(output.sequences[:, columns_before(target, inputs) :]):
        tokens = until_end(tokens, ends)
        answers.append(Answer(tokens, scores[row, : len(tokens)], logits[row, : len(tokens)]))
    return answers


@torch.no_grad()
def logits_of_one_pass(target: Any, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Return the logits that an answer was chosen from, as one forward over the whole text gives them.

    Args:
        target (`PreTrainedModel`): The model.
        prompt (`torch.LongTensor` of shape `(prompt,)`): The prompt, without padding.
        tokens (`torch.LongTensor` of shape `(new,)`): The answer.

    Returns:
        `torch.FloatTensor` of shape `(new, vocab)`.
    """
    read = {"input_ids": torch.cat([prompt, tokens[:-1]])[None]}
    if target.config.is_encoder_decoder:
        start = tokens.new_tensor([start_token(target)])
        read = {"input_ids": prompt[None], "decoder_input_ids": torch.cat([start, tokens[:-1]])[None]}
    logits: torch.Tensor = target(**read).logits[0, -len(tokens) :]
    return logits.float()


def compare(
    target: Any,
    request: Inputs,
    outputs: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    index: int,
) -> tuple[list[Difference], float]:
    """
    Compare greedy outputs with each other, and where they are not the same, with what `generate` writes.

    Args:
        target (`PreTrainedModel`): The model; it decodes the request again where outputs differ.
        request (`Inputs`): Prompts, `(batch, prompt)`.
        outputs (`Mapping[str, torch.LongTensor]`): New tokens by contender, each of shape `(batch, new)`.
        options (`Mapping[str, Any]`): For `generate`.
        index (`int`): Index of the request.

    Returns:
        `tuple[list[Difference], float]`: What differs, and how far rounding moves the two best tokens of these rows.
    """
    first, *others = outputs.values()
    if all(torch.equal(first, other) for other in others):
        return [], 0.0
    ends, found, rounding = end_tokens(target), list[Difference](), 0.0
    for row, answer in enumerate(plain_answers(target, request, options)):
        prompt = request["input_ids"][row, request["attention_mask"][row].bool()]
        for name, output in outputs.items():
            tokens = until_end(output[row].to(answer.tokens.device), ends)
            if difference := find_difference(index, answer, tokens, target.dtype, contender=name):
                found.append(difference)
                rounding = max(rounding, measure_rounding(target, prompt, answer))
    return found, rounding


def find_difference(
    request: int,
    answer: Answer,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    in_batch: torch.Tensor | None = None,
    contender: str = "",
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
        contender (`str`, *optional*): Who wrote them.

    Returns:
        `Difference`, *optional*: `None` where the two are the same.
    """
    position = first_difference(answer.tokens, tokens)
    if position is None:
        return None
    is_batch = in_batch is not None and torch.equal(in_batch[: position + 1], tokens[: position + 1])
    if position >= min(len(answer.tokens), len(tokens)):  # one is a prefix of the other
        return Difference(request, position, None, 0.0, is_batch, contender)
    scores = answer.scores[position]
    best, written = float(scores.max()), float(scores[tokens[position]])
    gap = best - written if math.isfinite(written) else None
    return Difference(request, position, gap, 2 * _last_place(best, dtype), is_batch, contender)


def measure_rounding(target: Any, prompt: torch.Tensor, answer: Answer, in_batch: Answer | None = None) -> float:
    """
    Return by how much rounding changes the distance between the two best tokens, at most over an answer.

    Args:
        target (`PreTrainedModel`): The model.
        prompt (`torch.LongTensor` of shape `(prompt,)`): What was asked, without padding.
        answer (`Answer`): The answer to it, token by token.
        in_batch (`Answer`, *optional*): The answer in a batch; it counts up to the first token that differs.
    """
    change = _change(answer, logits_of_one_pass(target, prompt, answer.tokens))
    if in_batch is None:
        return change
    differs = first_difference(answer.tokens, in_batch.tokens)
    return max(change, _change(answer, in_batch.logits if differs is None else in_batch.logits[: differs + 1]))


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
