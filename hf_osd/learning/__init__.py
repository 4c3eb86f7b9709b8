"""Learning from served requests: replay, losses, distillation with TRL, and the thread that runs it."""

from typing import TYPE_CHECKING, Any

from .background import OnlineLearner
from .losses import generalized_jsd, overlap, sparse_divergence
from .replay import ReplayBuffer

if TYPE_CHECKING:
    from .distillation import OnlineGKDTrainer
    from .pacing import OnlineUpdateCallback

__all__ = [
    "OnlineGKDTrainer",
    "OnlineLearner",
    "OnlineUpdateCallback",
    "ReplayBuffer",
    "generalized_jsd",
    "overlap",
    "sparse_divergence",
]


def __getattr__(name: str) -> Any:
    if name in ("OnlineGKDTrainer", "OnlineUpdateCallback"):  # they import TRL, which takes seconds
        from . import distillation

        return getattr(distillation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
