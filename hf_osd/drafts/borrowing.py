"""What a draft reads of its target where it lies, and never owns."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from .vocabulary import TrafficVocabulary


class Borrowed:
    """
    The target, as far as a draft reads it: its embedding and its output head, where they lie, and its states.

    They are no parameters of the draft: nothing trains, moves, counts, copies or saves them, and the copy of a draft
    that is trained borrows the same.
    """

    def __init__(self) -> None:
        self.embedding: Any = None
        self.head: Any = None
        self.target: Callable[[], PreTrainedModel | None] = lambda: None
        self.vocabulary = TrafficVocabulary(())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Borrowed":
        return self

    def __reduce__(self) -> Any:
        return Borrowed, ()
