"""The draft's live weights: read by many rounds at once, swapped in place between them."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


class LiveWeights:
    """
    Guards a model's weights: any number of readers, or one writer.

    Used as a context manager it is the reader's side, held for one proposal at a time. A waiting writer goes before
    new readers, so that a busy server cannot put an update off for ever.

    Args:
        model (`PreTrainedModel`): The live draft.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._condition = threading.Condition()
        self._readers = 0
        self._writers_waiting = 0

    def __enter__(self) -> "LiveWeights":
        with self._condition:
            while self._writers_waiting:
                self._condition.wait()
            self._readers += 1
        return self

    def __exit__(self, *error: object) -> None:
        with self._condition:
            self._readers -= 1
            self._condition.notify_all()

    @torch.no_grad()
    def publish(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """
        Copy new values into the parameters, in place: no round sees half an update, and captured graphs stay valid.

        Args:
            parameters (`Mapping[str, torch.Tensor]`): By name, as in `model.named_parameters()`; any dtype and device.

        Raises:
            KeyError: A name is not a parameter of the model.
        """
        live = dict(self._model.named_parameters())
        pairs = [(live[name], value) for name, value in parameters.items()]
        with self._condition:
            self._writers_waiting += 1
            try:  # an interrupt while waiting must not lock the readers out
                self._condition.wait_for(lambda: self._readers == 0)
                for parameter, value in pairs:
                    parameter.copy_(value)
            finally:
                self._writers_waiting -= 1
                self._condition.notify_all()


_eval_lock = threading.Lock()
_eval_users: dict[int, int] = {}  # id(model) -> calls that rely on its eval mode


@contextmanager
def eval_mode(*models: PreTrainedModel) -> Iterator[None]:
    """
    Put models into eval mode for a while: dropout would make the target differ from itself.

    Models that were training are put back when the last concurrent call leaves.
    """
    with _eval_lock:
        training = [model for model in models if model.training or id(model) in _eval_users]
        for model in training:
            _eval_users[id(model)] = _eval_users.get(id(model), 0) + 1
            model.eval()
    try:
        yield
    finally:
        with _eval_lock:
            for model in training:
                _eval_users[id(model)] -= 1
                if not _eval_users[id(model)]:
                    del _eval_users[id(model)]
                    model.train()


def describe(model: Any) -> str:
    """Name a model for an error message."""
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__}{f' ({path})' if path else ''}"
