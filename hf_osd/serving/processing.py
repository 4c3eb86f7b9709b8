"""transformers' logits processors over rows of different lengths."""

from collections.abc import Sequence

import torch
from transformers.generation import logits_process as lp
from transformers.generation.logits_process import LogitsProcessor

# These look at the scores alone, so any number of positions goes through in one call.
_CONTEXT_FREE: tuple[type, ...] = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.LogitNormalization,
    lp.InfNanRemoveLogitsProcessor,
    lp.SuppressTokensLogitsProcessor,
)


def process(
    processors: Sequence[LogitsProcessor], ids: torch.Tensor, scores: torch.Tensor, ends: Sequence[int]
) -> torch.Tensor:
    """
    Apply processors to the scores of consecutive positions of every row, exactly as token-by-token decoding would.

    A processor sees the whole batch, cut at the length it would have had, so that what depends on the length or on
    the row's number keeps its meaning.

    Args:
        processors (`Sequence[LogitsProcessor]`): In order.
        ids (`torch.LongTensor` of shape `(batch, columns)`): The token buffer, proposals included.
        scores (`torch.FloatTensor` of shape `(batch, q, vocab)`): Not modified.
        ends (`Sequence[int]`): For each row, the column that `scores[:, 0]` predicts.

    Returns:
        `torch.FloatTensor` of shape `(batch, q, vocab)`.
    """
    for processor in processors:
        if type(processor) in _CONTEXT_FREE:
            flat = scores.flatten(0, 1)  # (batch * q, vocab)
            scores = processor(ids[:, :1].expand(-1, scores.shape[1]).reshape(-1, 1), flat).view_as(scores)
        else:
            scores = _by_length(processor, ids, scores, ends)
    return scores


def _by_length(
    processor: LogitsProcessor, ids: torch.Tensor, scores: torch.Tensor, ends: Sequence[int]
) -> torch.Tensor:
    batch, q, _ = scores.shape
    processed = torch.empty_like(scores)
    for length in sorted({end + step for end in ends for step in range(q)}):
        steps = [length - end for end in ends]
        rows = [row for row in range(batch) if 0 <= steps[row] < q]
        # Rows that are elsewhere come along with scores of theirs, so that the processor sees a full batch.
        picked = scores[torch.arange(batch), torch.tensor(steps).clamp(0, q - 1)]  # (batch, vocab)
        result = processor(ids[:, :length], picked)
        processed[rows, [steps[row] for row in rows]] = result[rows]
    return processed
