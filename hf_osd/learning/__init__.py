"""Learning from served requests: the method in `learner.py`, and what it is made of."""

from typing import TYPE_CHECKING, Any

from .losses import generalized_jsd, overlap, sparse_loss
from .online import OnlineLearner
from .replay import ReplayBuffer

if TYPE_CHECKING:
    from .trainer import OnlineGKDTrainer

__all__ = ["OnlineGKDTrainer", "OnlineLearner", "ReplayBuffer", "generalized_jsd", "overlap", "sparse_loss"]


def __getattr__(name: str) -> Any:
    if name == "OnlineGKDTrainer":  # it imports TRL, which takes seconds
        from . import trainer

        return trainer.OnlineGKDTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
