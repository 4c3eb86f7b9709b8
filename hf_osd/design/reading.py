"""Records texts: the target's distribution at every position and its states, in one pass over each text."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafts.states import StateTap
from ..records import Observation, sparse_teacher
from .batches import together

_LOGITS_BYTES = 2**28  # bytes of the logits of one pass, at most (256 MiB)
_LONGEST_PASS = 4096  # tokens of one pass, at most; more are no faster


@torch.no_grad()
def read_texts(
    target: PreTrainedModel,
    texts: Sequence[torch.Tensor],
    heads: Sequence[int],
    state_layers: Sequence[int] = (),
    top_k: int = 32,
) -> list[Observation]:
    """
    Read whole texts, those of similar length together.

    Args:
        target (`PreTrainedModel`): The target.
        texts (`Sequence[torch.LongTensor]`): Each of shape `(length,)`, on the CPU.
        heads (`Sequence[int]`): Tokens of each that are not to be learned, at least 1 and fewer than it has.
        state_layers (`Sequence[int]`, defaults to `()`): Layers to keep the states of; see
            [`~hf_osd.drafts.states.StateTap`].
        top_k (`int`, defaults to 32): Log-probabilities to keep at a position.

    Returns:
        `list[Observation]`: One of each text, as if nothing had been drafted: `draft_ids` is -1 throughout.
    """
    found: dict[int, Observation] = {}
    for indices in together(range(len(texts)), [len(text) for text in texts], _tokens_at_once(target)):
        logits, states = _run(target, [texts[index] for index in indices], state_layers)
        for row, index in enumerate(indices):
            ids, kept = texts[index], None
            if states is not None:
                kept = states[row, : len(ids) - 1].to("cpu", torch.bfloat16, copy=True)
            spoken = logits[row, heads[index] - 1 : len(ids) - 1].float()
            found[index] = _observation(ids, heads[index], *sparse_teacher(spoken, top_k), kept)
    return [found[index] for index in range(len(texts))]


def _tokens_at_once(target: PreTrainedModel) -> int:
    one: int = target.config.get_text_config(decoder=True).vocab_size * target.dtype.itemsize
    return min(_LONGEST_PASS, _LOGITS_BYTES // one)


def _run(
    target: Any, texts: Sequence[torch.Tensor], state_layers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return logits, `(batch, time, vocab)`, and states, `(batch, time, size)`."""
    # Padded on the right, so that no mask is needed: attention is causal.
    ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)[:, :-1].to(target.device)
    if not state_layers:
        return target(ids, use_cache=False).logits, None
    output, states = StateTap.of(target, state_layers).read(lambda: target(ids, use_cache=False))
    return output.logits, states


def _observation(
    ids: torch.Tensor,
    head: int,
    teacher_ids: torch.Tensor,
    log_probs: torch.Tensor,
    tail: torch.Tensor,
    states: torch.Tensor | None,
) -> Observation:
    output = ids[head:]
    return Observation(
        prompt_ids=ids[:head],
        output_ids=output,
        teacher_ids=teacher_ids.cpu(),
        teacher_log_probs=log_probs.cpu(),
        teacher_tail=tail.cpu(),
        draft_ids=torch.full_like(output, -1),
        accepted=torch.zeros_like(output, dtype=torch.bool),
        states=states,
    )
