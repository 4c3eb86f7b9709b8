"""The decoder of a draft that reads its target's states, and scores the tokens of its vocabulary alone."""

from collections.abc import Sequence
from typing import Any

import torch

from ..drafts.features import FeatureDraft
from .attention import grouped_attention
from .decoder import Parents, Pass, RaggedDecoder
from .preparation import Preparation
from .states import StatesOfRows, TargetStates


class FeatureDecoder(RaggedDecoder):
    """
    Reads the target's states up to the end of the text, and the draft's own states behind it.

    The first pass after a rollback reads the target's states. The passes after it, one token each, read the draft's
    own; their keys and values are dropped at the next rollback, since the target has read the tokens by then.

    Args:
        model ([`~hf_osd.drafts.features.FeatureDraft`]): The draft, in eval mode.
        padding, width, preparation, takes_trees, own_masks: See [`~hf_osd.serving.decoder.RaggedDecoder`].
        source (`TargetStates`, *optional*): The target's states; without, it goes on tokens alone.
        vocabulary (`torch.LongTensor` of shape `(tokens,)`, *optional*): Tokens that may be proposed; defaults to all.
    """

    model: FeatureDraft

    def __init__(
        self,
        model: FeatureDraft,
        padding: Sequence[int],
        width: int,
        preparation: Preparation | None = None,
        source: TargetStates | StatesOfRows | None = None,
        vocabulary: torch.Tensor | None = None,
        takes_trees: bool = False,
        own_masks: bool = False,
    ) -> None:
        super().__init__(model, padding, width, preparation, takes_trees=takes_trees, own_masks=own_masks)
        self._source = source if model.state_layers else None
        self.vocabulary = None if vocabulary is None else vocabulary.to(self._device)
        self._head = model.head_of(self.vocabulary)
        self._own: torch.Tensor | None = None  # (batch, 1, hidden), behind the last pass since the rollback
        self._read_to = list(padding)  # columns that were read with the target's states

    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Parents | None = None) -> torch.Tensor:
        """Feed tokens, and score those that may be proposed; see [`~hf_osd.serving.decoder.Decoder.feed`]."""
        hidden = super().feed(ids, ends, keep, parents)
        if self._own is None or self._source is None:
            self._read_to = list(ends)
        self._own = hidden[:, -1:]
        return self._scores(hidden)

    def rollback(self, ends: Sequence[int]) -> None:
        """Forget also what was read without the target; see [`~hf_osd.serving.decoder.Decoder.rollback`]."""
        self._own = None
        super().rollback([min(end, read) for end, read in zip(ends, self._read_to, strict=True)])

    def _read(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._source is None:
            return {}
        if self._own is not None:
            return {"own_states": self._own}
        return {"states": self._source.before(positions + self._padding, positions).to(self._device)}

    def _run(self, keep: int, **inputs: Any) -> Pass:
        """Return hidden states in place of logits: graphs must not capture the head, which depends on the prompt."""
        with grouped_attention(self._device):
            return Pass(self.model.hidden(**inputs)[:, -keep:], None)

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, *self._head).float()
