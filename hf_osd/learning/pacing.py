"""The pace of an endless training: so many steps, publish, wait. Not covered: when an update is due; see `loop.py`."""

from collections.abc import Mapping
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class UpdateSession(Protocol):
    """What the callback needs from whoever runs the trainer."""

    def learning_rate_scale(self) -> float:
        """Positive factor on the learning rate for the next step."""
        ...

    def is_stopped(self) -> bool:
        """Whether training has to end at the next step."""
        ...

    def is_out_of_time(self) -> bool:
        """Whether the update in progress has to end with this step."""
        ...

    def give_way(self) -> float:
        """Let serving go first; return the seconds worked since the last call."""
        ...

    def count_step(self, positions: int) -> None:
        """Count a step of the optimiser, and the positions that it learned from."""
        ...

    def finish_update(self, loss: float) -> None:
        """Decide about the trained weights of a finished update, given its mean loss."""
        ...

    def wait_for_update(self) -> object:
        """Wait until another update is due or training is stopped."""
        ...


class PacedTrainer(Protocol):
    """What the callback needs from the trainer that it paces."""

    optimizer: Any  # torch.optim.Optimizer, once training has begun
    lr_scheduler: Any  # torch.optim.lr_scheduler.LRScheduler, likewise

    def take_mean_loss(self) -> float:
        """Mean loss since the last call."""
        ...

    def take_positions(self) -> int:
        """Positions learned from since the last call."""
        ...

    def log(self, logs: dict[str, float]) -> None:
        """Tell the reporters."""
        ...


class OnlineUpdateCallback(TrainerCallback):
    """
    Paces an endless training: so many steps, publish, wait until the next update is due.

    It waits at the end of a step, before the next batch is drawn, so that an update sees every request that made it
    due. The optimiser lives in the trainer and so across updates.

    Args:
        session (`UpdateSession`): Says when an update is due, and takes the weights.
        steps_per_update (`int`): Optimiser steps between two waits, at most.
        optimizer_state (`Mapping[int, Any]`, *optional*): State of the optimiser to go on from, by parameter.
    """

    trainer: PacedTrainer

    def __init__(
        self, session: UpdateSession, steps_per_update: int, optimizer_state: Mapping[int, Any] | None = None
    ) -> None:
        self.session = session
        self.steps_per_update = steps_per_update
        self._optimizer_state = optimizer_state
        self._steps = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the optimiser of an earlier run."""
        optimizer = self.trainer.optimizer
        if self._optimizer_state is not None:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(self._optimizer_state)})

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Scale what the scheduler chose; it writes its own value again after the step."""
        optimizer, scheduler = self.trainer.optimizer, self.trainer.lr_scheduler
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate * self.session.learning_rate_scale()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let serving go first; the trainer itself does so between forward and backward passes."""
        self.session.give_way()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Publish and wait after the last step of an update."""
        self.session.count_step(self.trainer.take_positions())
        self._steps += 1
        if self._steps == self.steps_per_update or self.session.is_out_of_time():
            self._steps = 0
            loss = self.trainer.take_mean_loss()
            # First the log, which reads the trainer's state: whoever waits for the update goes on at once.
            self.trainer.log({"online_loss": loss, "online_learning_rate_scale": self.session.learning_rate_scale()})
            self.session.finish_update(loss)
            self.session.give_way()
            self.session.wait_for_update()
        if self.session.is_stopped():
            control.should_training_stop = True
