"""The draft's live weights: read by many rounds at once, swapped in place between them."""

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import LearningError

# Seconds. A waiting update keeps new readers out for a turn, lets them in for another, and goes on with a longer turn:
# a reader may itself wait for a new one, where a logits processor makes another request.
_TURNS = (1.0, 2.0, 4.0)


class LiveWeights:
    """
    Guards a model's weights: any number of readers, or one writer.

    As a context manager it is the reader's side: held for one forward, reentrant. A waiting update goes before new
    readers, so that a busy server cannot put it off for ever. It gives up after some seconds, so that it does not lock
    readers out for ever either.

    Args:
        model (`PreTrainedModel`): The live draft.
        frozen (`Collection[str]`, *optional*): Parameters that are never written to: the target uses them as well.
    """

    def __init__(self, model: PreTrainedModel, frozen: Collection[str] = ()) -> None:
        self._model = model
        self._frozen = frozenset(frozen)
        self._condition = threading.Condition()
        self._here = threading.local()
        self._readers = 0
        self._writers_first = 0  # updates that now keep new readers out

    @property
    def _depth(self) -> int:
        """How many nested reads this thread holds."""
        return getattr(self._here, "depth", 0)

    def __enter__(self) -> "LiveWeights":
        with self._condition:
            while self._writers_first and not self._depth:
                self._condition.wait()
            self._readers += 1
            self._here.depth = self._depth + 1
        return self

    def __exit__(self, *error: object) -> None:
        with self._condition:
            self._readers -= 1
            self._here.depth -= 1
            self._condition.notify_all()

    @torch.inference_mode()  # weights created in inference mode can be written to only there
    def publish(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """
        Copy new values into the parameters, in place: no round sees half an update, and captured graphs stay valid.

        Args:
            parameters (`Mapping[str, torch.Tensor]`): By name, as in `model.named_parameters()`; any dtype and device.

        Raises:
            KeyError: A name is not a parameter of the model.
            LearningError: A parameter is one of `frozen`, or a reader has not left for many seconds. Nothing is
                changed.
        """
        borrowed = sorted(self._frozen & parameters.keys())
        if borrowed:
            raise LearningError(f"{borrowed[0]} is shared with the target, which must not change")
        live = dict(self._model.named_parameters())
        pairs = [(live[name], value) for name, value in parameters.items()]
        with self._condition:
            self._wait_for_readers()
            for parameter, value in pairs:
                parameter.copy_(value)

    def _wait_for_readers(self) -> None:
        if not self._depth:  # a thread that reads would wait for itself
            for turn in _TURNS:
                if self._wait_first(turn) or self._condition.wait_for(self._is_free, turn):
                    return
        raise LearningError(
            "the new weights of the draft could not go live: a proposal has been going on for too long. Does a logits "
            "processor wait for another request?"
        )

    def _wait_first(self, seconds: float) -> bool:
        self._writers_first += 1
        try:  # an interrupt while waiting must not lock the readers out
            return self._condition.wait_for(self._is_free, seconds)
        finally:
            self._writers_first -= 1
            self._condition.notify_all()

    def _is_free(self) -> bool:
        return self._readers == 0


_eval_lock = threading.Lock()
_eval_users: dict[int, int] = {}  # id(model) -> calls that rely on its eval mode
_trained: dict[int, list[torch.nn.Module]] = {}  # id(model) -> its modules that were training before the first of them


@contextmanager
def eval_mode(*models: PreTrainedModel) -> Iterator[None]:
    """
    Put models into eval mode for a while: dropout would make the target differ from itself.

    Modules that were training are put back when the last concurrent call leaves.
    """
    with _eval_lock:
        entered = [model for model in models if _enter_eval(model)]
    try:
        yield
    finally:
        with _eval_lock:
            for model in entered:
                _leave_eval(model)


def _enter_eval(model: PreTrainedModel) -> bool:
    if id(model) not in _eval_users:
        training = [module for module in model.modules() if module.training]
        if not training:
            return False
        _trained[id(model)] = training
        model.eval()
    _eval_users[id(model)] = _eval_users.get(id(model), 0) + 1
    return True


def _leave_eval(model: PreTrainedModel) -> None:
    _eval_users[id(model)] -= 1
    if not _eval_users[id(model)]:
        del _eval_users[id(model)]
        for module in _trained.pop(id(model)):
            module.training = True


def describe(model: Any) -> str:
    """Name a model for an error message."""
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__}{f' ({path})' if path else ''}"
