"""Resolves the `online_assistant` of a call: as given, or made of a draft and kept as long as the target."""

import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .assistant import OnlineAssistant
from .drafts.compatibility import AUTO

_kept_lock = threading.Lock()
_kept: "weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, OnlineAssistant]]" = weakref.WeakKeyDictionary()


def resolve_assistant(
    assistant: "OnlineAssistant | PreTrainedModel | str | Path", target: PreTrainedModel
) -> OnlineAssistant:
    """
    Return the assistant to use: as given, or one that wraps a draft and is kept as long as the target lives.

    Args:
        assistant (`OnlineAssistant`, `PreTrainedModel`, `str` or `Path`): What the user passed; `"auto"` makes a draft
            of the target.
        target (`PreTrainedModel`): The model that `generate` was called with.

    Raises:
        UnsupportedModelError: The draft does not fit the target.
        TypeError: Something else was passed.
    """
    if isinstance(assistant, OnlineAssistant):
        return assistant
    if not isinstance(assistant, torch.nn.Module | str | Path):
        raise TypeError(
            "online_assistant must be an OnlineAssistant, a draft model, or a Hub id or path of one, got "
            f"{type(assistant).__name__}"
        )
    with _kept_lock:
        kept = _kept.setdefault(target, {})
        if isinstance(assistant, torch.nn.Module):
            if id(assistant) not in kept:  # no other model gets this id, since the assistant holds the draft
                kept[id(assistant)] = OnlineAssistant(assistant, target)
            return kept[id(assistant)]
        if str(assistant) not in kept:
            kept[str(assistant)] = (
                OnlineAssistant(AUTO, target)
                if assistant == AUTO
                else OnlineAssistant.from_pretrained(assistant, target)
            )
        return kept[str(assistant)]
