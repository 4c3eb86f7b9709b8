"""Recorded requests for a draft that reads its target's states: these states, and places in its vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..drafts.features import FeatureDraft
from ..drafts.states import with_states
from ..drafts.vocabulary import places_in
from ..records import Observation
from .reading import ALL, Batch, ObservationCollator, Reader, base_model

CONTEXT = 32  # tokens of a prompt that are read: the target's states carry the rest


def reader_of(model: Any, proposed: int | torch.Tensor | None = None) -> Reader:
    """Return what reads recorded requests for a draft; see [`~hf_osd.learning.reading.Reader`]."""
    draft, plain = base_model(model), Reader.of(model, proposed)
    return FeatureReader(plain.parameters, plain.known, None, draft) if isinstance(draft, FeatureDraft) else plain


@dataclass(frozen=True, slots=True)
class FeatureReader(Reader):
    """How a [`~hf_osd.drafts.features.FeatureDraft`] (`draft`, or a copy of it) reads recorded requests."""

    draft: Any = None

    def collator(self, max_length: int, positions: str) -> ObservationCollator:
        """See [`~hf_osd.learning.reading.Reader.collator`]."""
        return FeatureCollator(max_length, positions, self.draft, CONTEXT)

    def options(self, inputs: Batch) -> dict[str, Any]:
        """See [`~hf_osd.learning.reading.Reader.options`]."""
        more = {name: inputs[name] for name in ("states", "vocabulary") if name in inputs}
        return super(FeatureReader, self).options(inputs) | more


class FeatureCollator(ObservationCollator):
    """
    Pads requests to one batch; see [`~hf_osd.learning.reading.ObservationCollator`].

    Args:
        max_length, positions: See there.
        draft (`FeatureDraft`): The draft.
        context (`int`, *optional*): See there.

    Returns:
        `dict[str, torch.Tensor]`: As there, with `vocabulary` of shape `(tokens,)`, the tokens that the draft proposes
        as the traffic is now; `states` of shape `(batch, time, size)`, the target's at the token before each; and
        `teacher_ids` as places in the vocabulary, where its size stands for all other tokens.
    """

    def __init__(self, max_length: int, positions: str, draft: FeatureDraft, context: int = ALL) -> None:
        super().__init__(max_length, positions, context=context)
        self._draft = draft

    def __call__(self, observations: list[Observation]) -> Batch:
        """Pad a batch; see the class."""
        batch = super().__call__(observations)
        texts = [part for one in observations for part in (one.prompt_ids, one.output_ids[:-1])]
        batch["vocabulary"] = self._draft.vocabulary.tokens(torch.cat(texts).tolist())
        batch["teacher_ids"] = places_in(batch["vocabulary"], batch["teacher_ids"])
        batch["learn_mask"] &= (batch["teacher_ids"] < len(batch["vocabulary"])).any(-1)
        if self._draft.state_layers:
            batch["states"] = self._states(observations, batch["input_ids"].shape)
        return batch

    def _states(self, observations: Sequence[Observation], shape: torch.Size) -> torch.Tensor:
        padded = torch.zeros(*shape, self._draft.state_size, dtype=torch.bfloat16)
        for row, observation in enumerate(with_states(self._draft, observations)):
            assert observation.states is not None
            count = min(len(observation.states), shape[1]) - 1  # before the first token there is nothing
            if count > 0:
                padded[row, -count:] = observation.states[-count - 1 : -1]
        return padded
