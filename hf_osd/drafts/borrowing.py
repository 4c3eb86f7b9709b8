"""What a draft reads of its target where it lies, and never owns."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from .vocabulary import TrafficVocabulary


class Borrowed:
    """
    The target, as far as a draft reads it: its embedding and its output head, where they lie, and its states.

    They are no parameters of the draft: nothing trains, moves, counts, copies or saves them, and the copy of a draft
    that is trained borrows the same.
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
