"""transformers' logits processors over rows of different lengths."""

import copy
from collections.abc import Collection, Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp
from transformers.generation.logits_process import LogitsProcessor

# Processors that depend on the scores alone, so that one call takes any number of positions.
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


def on_device(
    processors: Sequence[LogitsProcessor], device: torch.device, built_for: torch.device
) -> LogitsProcessorList:
    """
    Return processors that work on a device: `generate` builds them for that of its inputs.

    Args:
        processors (`Sequence[LogitsProcessor]`): As `generate` built them; not changed.
        device (`torch.device`): Where the scores will be.
        built_for (`torch.device`): Where the inputs were.
    """
    if device == built_for:
        return LogitsProcessorList(processors)
    moved = [copy.copy(processor) for processor in processors]
    for processor in moved:
        attributes = getattr(processor, "__dict__", {})
        attributes.update({k: v.to(device) for k, v in attributes.items() if isinstance(v, torch.Tensor)})
    return LogitsProcessorList(moved)


def process(
    processors: Sequence[LogitsProcessor],
    ids: torch.Tensor,
    scores: torch.Tensor,
    ends: Sequence[int],
    limit: int | None = None,
    eos_token_ids: Collection[int] = (),
) -> torch.Tensor:
    """
    Apply processors to the scores of consecutive positions of every row, exactly as token-by-token decoding would.

    A processor sees the whole batch at the length that it would have had, so that it may depend on the length and on
    the index of a row.

    Args:
        processors (`Sequence[LogitsProcessor]`): In order.
        ids (`torch.LongTensor` of shape `(batch, columns)`): The token buffer, proposals included.
        scores (`torch.FloatTensor` of shape `(batch, q, vocab)`): Not modified.
        ends (`Sequence[int]`): For each row, the column that `scores[:, 0]` predicts.
        limit (`int`, *optional*): Most columns of the output. Processors that look at the text are not called for
            positions beyond it, which token-by-token decoding would never reach.
        eos_token_ids (`Collection[int]`): Tokens that end a row; positions behind a proposed one are skipped, too.

    Returns:
        `torch.FloatTensor` of shape `(batch, q, vocab)`.
    """
    reachable = (
        [scores.shape[1]] * len(ends) if is_context_free(processors) else _reachable(ids, scores, ends, eos_token_ids)
    )
    for processor in processors:
        if is_context_free([processor]):
            flat = scores.flatten(0, 1)  # (batch * q, vocab)
            scores = processor(ids[:, :1].expand(-1, scores.shape[1]).reshape(-1, 1), flat).view_as(scores)
        else:
            scores = _by_length(processor, ids, scores, ends, reachable, limit)
    return scores


def is_context_free(processors: Sequence[LogitsProcessor]) -> bool:
    """Whether processors depend on the scores alone."""
    return all(type(processor) in _CONTEXT_FREE for processor in processors)


def _reachable(
    ids: torch.Tensor, scores: torch.Tensor, ends: Sequence[int], eos_token_ids: Collection[int]
) -> list[int]:
    """Count the positions of each row up to its first proposed eos."""
    last = scores.shape[1] - 1
    proposed = [ids[row, end : end + last].tolist() for row, end in enumerate(ends)] if eos_token_ids else []
    stops = [next((i for i, token in enumerate(row) if token in eos_token_ids), last) for row in proposed]
    return [stop + 1 for stop in stops] or [last + 1] * len(ends)


def _by_length(
    processor: LogitsProcessor,
    ids: torch.Tensor,
    scores: torch.Tensor,
    ends: Sequence[int],
    reachable: list[int],
    limit: int | None,
) -> torch.Tensor:
    batch, q, _ = scores.shape
    processed = scores.clone()
    lengths = {end + step for end, count in zip(ends, reachable, strict=True) for step in range(count)}
    for length in sorted(length for length in lengths if limit is None or length < limit):
        steps = [length - end for end in ends]
        rows = [row for row in range(batch) if 0 <= steps[row] < reachable[row]]
        if not rows:
            continue
        # Rows without a position of this length bring other scores of theirs, so that the batch is full.
        picked = scores[torch.arange(batch), torch.tensor(steps).clamp(0, q - 1)]  # (batch, vocab)
        result = processor(ids[:, :length], picked)
        processed[rows, [steps[row] for row in rows]] = result[rows]
        if _runs_user_code(processor):
            _stop_at_forbidden(ids[:, : length + 1], result, steps, rows, reachable)
    return processed


def _runs_user_code(processor: LogitsProcessor) -> bool:
    """Whether a processor may raise on a text that plain decoding would never show it; transformers' own do not."""
    own = type(processor).__module__ == lp.__name__
    return not own or isinstance(processor, lp.PrefixConstrainedLogitsProcessor)


def _stop_at_forbidden(
    ids: torch.Tensor, scores: torch.Tensor, steps: Sequence[int], rows: Sequence[int], reachable: list[int]
) -> None:
    """Skip what follows a proposed token that the processor has just forbidden, as behind an eos."""
    rows = [row for row in rows if steps[row] + 1 < reachable[row]]
    if rows:
        length = ids.shape[1] - 1
        forbidden = (scores[rows, ids[rows, length]] == -torch.inf).tolist()
        for row, stops in zip(rows, forbidden, strict=True):
            reachable[row] = steps[row] + 1 if stops else reachable[row]
