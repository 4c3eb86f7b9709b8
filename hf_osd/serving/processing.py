"""transformers' logits processors over rows of different lengths."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp
from transformers.generation.logits_process import LogitsProcessor

from .._compat import constraint_of_row

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
# Processors that look at each row alone, so that one call takes some rows of a batch.
_BY_ROW: tuple[type, ...] = (
    lp.RepetitionPenaltyLogitsProcessor,
    lp.NoRepeatNGramLogitsProcessor,
    lp.SequenceBiasLogitsProcessor,
    lp.NoBadWordsLogitsProcessor,
    lp.ExponentialDecayLengthPenalty,
)
# Those that act behind texts of some lengths, on all in the same way, and at others leave the scores as they are.
_ACTS_AT: dict[type, Callable[[Any, int], bool]] = {
    lp.MinLengthLogitsProcessor: lambda own, length: length < own.min_length,
    lp.MinNewTokensLengthLogitsProcessor: lambda own, length: length < own.prompt_length_to_skip + own.min_new_tokens,
    lp.ForcedBOSTokenLogitsProcessor: lambda own, length: length == 1,
    lp.ForcedEOSTokenLogitsProcessor: lambda own, length: length == own.max_length - 1,
    lp.SuppressTokensAtBeginLogitsProcessor: lambda own, length: length == own.begin_index,
}


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
    rows: Sequence[int] = (),
    lengths: Sequence[int] = (),
    limit: int | None = None,
) -> torch.Tensor:
    """
    Apply processors to scores behind texts of any lengths, exactly as token-by-token decoding would.

    A processor that may look at other rows or at the number of a row sees the whole batch, cut at the length that it
    would have had; rows without scores of that length bring zeros.

    Args:
        processors (`Sequence[LogitsProcessor]`): In order.
        ids (`torch.LongTensor` of shape `(batch, columns)`): The token buffer.
        scores (`torch.FloatTensor` of shape `(n, vocab)`): Not modified.
        rows (`Sequence[int]`): The row of the buffer that each of the `n` scores belongs to, in ascending order.
            Processors that are context-free need neither these nor `lengths`.
        lengths (`Sequence[int]`): How many columns of this row each of them stands behind.
        limit (`int`, *optional*): Most columns of the output. Processors that look at the text are not called for
            scores beyond it, which token-by-token decoding would never reach.

    Returns:
        `torch.FloatTensor` of shape `(n, vocab)`.
    """
    for processor in processors:
        if is_context_free([processor]):
            scores = processor(ids[:1, :1].expand(len(scores), -1), scores)
        else:
            scores = _by_length(processor, ids, scores, rows, lengths, limit)
    return scores


def is_context_free(processors: Sequence[LogitsProcessor]) -> bool:
    """Whether processors depend on the scores alone."""
    return all(type(processor) in _CONTEXT_FREE for processor in processors)


def _by_length(
    processor: LogitsProcessor,
    ids: torch.Tensor,
    scores: torch.Tensor,
    rows: Sequence[int],
    lengths: Sequence[int],
    limit: int | None,
) -> torch.Tensor:
    acts = _ACTS_AT.get(type(processor))
    calls: dict[int, list[int]] = {}  # which scores each call is for, by the length of its text
    for place, length in enumerate(lengths):
        if (limit is None or length < limit) and (acts is None or acts(processor, length)):
            calls.setdefault(length if acts is None or not calls else min(calls), []).append(place)
    processed = scores.clone() if calls else scores
    for length, places in sorted(calls.items()):
        processed[places] = _called(processor, ids[:, :length], scores[places], [rows[place] for place in places])
    return processed


def _called(processor: LogitsProcessor, ids: torch.Tensor, scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Call a processor for some rows of texts `(batch, length)`."""
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = processor
    if type(processor) is lp.PrefixConstrainedLogitsProcessor:  # its rule may know of no texts but final ones
        constraints = [constraint_of_row(processor, row) for row in rows]
        places = zip(constraints, ids[rows, None], scores[:, None], strict=True)
        return torch.cat([constraint(*place) for constraint, *place in places])
    if len(rows) == len(ids) or _looks_at_rows_alone(processor):
        return call(ids[rows], scores)
    whole = scores.new_zeros(len(ids), scores.shape[1])
    whole[rows] = scores
    return call(ids, whole)[rows]


def _looks_at_rows_alone(processor: LogitsProcessor) -> bool:
    has_rows_of_its_own = isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor)
    return type(processor) in (*_BY_ROW, *_ACTS_AT) and not has_rows_of_its_own
