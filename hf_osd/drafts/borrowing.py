"""The parts of a target that a draft uses in place: embedding, output head and states."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from .vocabulary import TrafficVocabulary


class Borrowed:
    """
    References of a draft to its target's embedding, output head and states, and the vocabulary it proposes from.

    They are no parameters of the draft, so they are never trained, moved, counted, copied or saved with it. A copy of
    a draft, such as the one that is trained, shares them.
    """

    def __init__(self, target: PreTrainedModel | None = None, general: Sequence[int] = ()) -> None:
        self.embedding: Any = None if target is None else target.get_input_embeddings()
        self.head: Any = None if target is None else target.get_output_embeddings()
        self.target: Callable[[], PreTrainedModel | None] = (lambda: None) if target is None else weakref.ref(target)
        self.vocabulary = TrafficVocabulary(general)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Borrowed":
        return self

    def __reduce__(self) -> Any:
        return Borrowed, ()
