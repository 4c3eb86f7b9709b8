"""Answers of plain `generate`, with the scores that each token was chosen by."""

from dataclasses import dataclass
from typing import Any

import torch

from ..demo.models import Inputs


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


def plain_answers(target: Any, inputs: Inputs, options: dict[str, Any]) -> list[Answer]:
    """
    Answer prompts with `generate`.

    Args:
        target (`PreTrainedModel`): The model.
        inputs (`Inputs`): Left-padded prompts, `(batch, prompt)`.
        options (`dict[str, Any]`): For `generate`, greedy.
    """
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = target.generate(**inputs, **options, **wanted)
    scores, logits = (torch.stack(steps, dim=1) for steps in (output.scores, output.logits))  # (batch, new, vocab)
    answers = []
    for row, tokens in enumerate(output.sequences[:, inputs["input_ids"].shape[1] :]):
        tokens = until_end(tokens, target)
        answers.append(Answer(tokens, scores[row, : len(tokens)], logits[row, : len(tokens)]))
    return answers


@torch.no_grad()
def logits_of_one_pass(target: Any, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Return the logits that an answer was chosen from, as one forward over the whole text gives them.

    Args:
        target (`PreTrainedModel`): The model.
        prompt (`torch.LongTensor` of shape `(1, prompt)`): The prompt.
        tokens (`torch.LongTensor` of shape `(new,)`): The answer.

    Returns:
        `torch.FloatTensor` of shape `(new, vocab)`.
    """
    text = torch.cat([prompt, tokens[None, :-1]], dim=1)
    logits: torch.Tensor = target(text).logits[0, -len(tokens) :]
    return logits.float()


def until_end(tokens: torch.Tensor, target: Any) -> torch.Tensor:
    """Cut `tokens`, `(new,)`, behind the first end-of-sequence token, where a batch is padded."""
    ends = target.generation_config.eos_token_id
    if ends is None:
        return tokens
    found = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).nonzero()
    return tokens[: int(found[0]) + 1] if len(found) else tokens
