"""How an update is paced, and what keeps a trainer from disturbing the rest of the process. Knows nothing of TRL."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Session(Protocol):
    """What a trainer needs from whoever runs it."""

    def give_way(self) -> float:
        """Let serving go first; return the seconds worked since the last call."""
        ...

    def count_step(self, positions: int) -> None:
        """Count a step of the optimiser, and the positions that it learned from."""
        ...

    def is_over(self) -> bool:
        """Whether the update has to end with this step, however many are left."""
        ...


class UpdateCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """
    Paces one update: counts its steps, gives way to serving between them, and ends it early where it has to.

    Args:
        session (`Session`): Whoever runs the trainer.
    """

    trainer: Any  # the `OnlineGKDTrainer` that it paces

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Go on counting where the last update ended; `Trainer` counts from 0 in each `train()`."""
        state.global_step = self.trainer.steps_before

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let serving go first; the trainer itself does so between forward and backward passes."""
        self.session.give_way()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step; end the update where the session says so."""
        self.session.count_step(self.trainer.take_positions())
        control.should_training_stop |= self.session.is_over()


@contextmanager
def global_seed_untouched(*modules: ModuleType) -> Iterator[None]:
    """
    Keep `Trainer.__init__` from seeding the global generators, which serving samples from.

    Restoring their state afterwards would leave a moment in which another thread samples from a seeded one. Only the
    calling thread skips the seeding; trainers of others are not affected.

    Args:
        modules (`ModuleType`): Those that call their own `set_seed`.
    """
    owner = threading.get_ident()
    originals = [module.set_seed for module in modules]

    def for_others(original: Callable[..., None]) -> Callable[..., None]:
        def set_seed(*args: Any, **kwargs: Any) -> None:
            if threading.get_ident() != owner:
                original(*args, **kwargs)

        return set_seed

    for module, original in zip(modules, originals, strict=True):
        module.set_seed = for_others(original)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.set_seed = original  # type: ignore[attr-defined]
