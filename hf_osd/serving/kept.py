"""Ragged caches kept after a call, so that the next call of the same shape finds its memory and its graphs."""

import threading
import weakref
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from .._compat import execution_device
from .cache import RaggedCache, windows_of
from .graphs import ForwardGraphs, can_capture, fingerprint
from .transfer import autocast_dtype

_CAPACITY_STEP = 256  # positions: capacities are rounded up to it, so that calls of similar length share a cache
_KEPT = 2  # unused caches kept for each model


@dataclass(slots=True)
class KeptCache:
    """
    A cache with the graphs that were captured on it.

    Attributes:
        cache (`RaggedCache`): Holds whatever the last call left. What a row has not written is masked.
        autocast (`torch.dtype`, *optional*): The autocast under which it is used: that decides the dtype of the keys.
        graphs (`ForwardGraphs`, *optional*): `None` where forwards are not captured.
        model_state (`int`): See [`~hf_osd.serving.graphs.fingerprint`].
    """

    cache: RaggedCache
    autocast: torch.dtype | None = None
    graphs: ForwardGraphs | None = field(default=None)
    model_state: int = 0


# The values hold no reference to the model, which would keep its own weak key alive.
_idle: "weakref.WeakKeyDictionary[PreTrainedModel, list[KeptCache]]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def borrow(model: PreTrainedModel, batch: int, capacity: int) -> KeptCache:
    """
    Take a cache for one call.

    Args:
        model (`PreTrainedModel`): Whose keys and values it will hold.
        batch (`int`): Rows.
        capacity (`int`): Positions that a row needs, at least.
    """
    capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
    autocast = autocast_dtype(execution_device(model))
    kept = _take(model, batch, capacity, autocast) or KeptCache(RaggedCache.of(model, batch, capacity), autocast)
    if can_capture(model) and autocast is None:  # autocast frees the copies of weights that a graph would read
        state = fingerprint(model)
        if kept.graphs is None or kept.model_state != state:
            kept.graphs, kept.model_state = ForwardGraphs(), state
    return kept


def _take(model: PreTrainedModel, batch: int, capacity: int, autocast: torch.dtype | None) -> KeptCache | None:
    wanted = (batch, capacity, tuple(windows_of(model)), execution_device(model), model.dtype)
    with _lock:
        idle = _idle.setdefault(model, [])
        found = next((kept for kept in idle if kept.cache.shape == wanted and kept.autocast == autocast), None)
        if found is not None:
            idle.remove(found)
        return found


def give_back(model: PreTrainedModel, kept: KeptCache) -> None:
    """Leave a cache to later calls. Not after an error: what it holds may not be finite then."""
    with _lock:
        idle = _idle.setdefault(model, [])
        idle.append(kept)
        del idle[:-_KEPT]
