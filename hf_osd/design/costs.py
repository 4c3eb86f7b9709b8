"""Measures the time of a drafted token and of the target's passes, as in serving."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafts.features import FeatureDraft
from ..drafts.profiles import Profile
from ..drafts.profiling import profile
from ..serving.feature_decoder import FeatureDecoder
from ..serving.states import TargetStates

CONTEXT = 256
"""Tokens of the text behind which forwards are timed."""

_CHAIN = 4  # tokens of a timed proposal; the first reads the target's states, the others the draft's own
_ROOM = 16  # positions left free behind the text, for the tokens that the target is fed


def context_for(model: PreTrainedModel) -> int:
    """Return the length of text to time at: 256 tokens, or what a shorter context leaves."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or CONTEXT + _ROOM
    return max(1, min(CONTEXT, positions - _ROOM))


def target_costs(target: PreTrainedModel, batches: Sequence[int] = (1,)) -> Profile:
    """Measure the target's passes over some rows, at every length that a check may have."""
    return profile(target, batches=batches, contexts=(context_for(target),))


@torch.no_grad()
def step_seconds(draft: FeatureDraft, batch: int = 1) -> float:
    """
    Measure what a token of a proposal costs: a step of the draft, its head and the choice.

    Args:
        draft (`FeatureDraft`): A draft that borrows from its target.
        batch (`int`, defaults to 1): Rows that a token is proposed for.
    """
    target = draft.target
    assert target is not None
    proposals, contexts = _proposals(draft, target), (context_for(target),)
    costs = profile(proposals, batches=(batch,), contexts=contexts, lengths=(_CHAIN,), device=draft.device)
    return costs.costs[0].seconds / _CHAIN


def _proposals(draft: FeatureDraft, target: PreTrainedModel) -> Callable[[int, int, int], Callable[[], Any]]:
    def prepare(batch: int, context: int, tokens: int) -> Callable[[], Any]:
        """Return what drafts `tokens` tokens behind `context` columns, again and again."""
        padding, columns = [0] * batch, context + tokens
        source = TargetStates(target, draft.state_layers, padding, columns)
        states = torch.zeros(batch, context, draft.state_size, dtype=target.dtype, device=target.device)
        source.write(states, [context] * batch)
        decoder = FeatureDecoder(draft, padding, columns, source=source, vocabulary=draft.vocabulary.tokens())
        ids = torch.zeros(batch, columns, dtype=torch.long, device=target.device)

        def propose() -> None:
            decoder.rollback([context - 1] * batch)
            for step in range(tokens):
                decoder.feed(ids, [context + step] * batch, keep=1).argmax(-1)

        return propose

    return prepare
