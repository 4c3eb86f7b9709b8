"""What a trainer asks of whoever runs it, and the callback that asks."""

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
    Counts the steps of an update, gives way to serving between them, and ends it early where it has to.

    Args:
        session (`Session`): Whoever runs the trainer.
    """

    trainer: Any  # the `OnlineGKDTrainer` whose updates these are

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
        self.session.count_step(self.trainer.positions)
        self.trainer.positions = 0
        control.should_training_stop |= self.session.is_over()
