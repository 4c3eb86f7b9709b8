"""The offline trainer: TRL's, over recorded texts, for so many minutes, evaluated and saved on the way."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import OnlineConfig
from ..learning.trainer import OnlineGKDTrainer
from ..records import Observation
from .batches import Batches
from .history import Evaluation, evaluations_in, is_over
from .judging import Quality
from .processes import shared
from .recipe import Recipe
from .shards import Recording

_NEVER = 2**31 - 1
_LONGEST_TEXT = 2**24


class Undisturbed:
    """Nobody is served meanwhile; see [`~hf_osd.learning.pacing.UpdateSession`]."""

    def give_way(self) -> float:
        """Go on at once."""
        return 0.0


class OfflineCallback(TrainerCallback):
    """
    Ends a training when its time is over, or when it gets no better; evaluates and saves it on the way.

    Evaluations lie in the trainer's log, which its checkpoints hold. With several processes, the first one judges and
    looks at the clock, and all go by what it says.

    Args:
        recipe (`Recipe`): How long, and how often.
        evaluate (`Callable[[], Quality]`): Judges the weights as they are.
        note (`Callable[[list[Evaluation]], object]`): Told of all evaluations so far, in the first process.
    """

    trainer: "OfflineTrainer"

    def __init__(
        self, recipe: Recipe, evaluate: Callable[[], Quality], note: Callable[[list[Evaluation]], object]
    ) -> None:
        self.session: Any = Undisturbed()
        self.progress = 0.0
        self._recipe, self._evaluate, self._note = recipe, evaluate, note
        self._began = self._before = 0.0  # seconds: by the clock, and of earlier runs

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Go on from the last evaluation of an earlier run, or begin with one."""
        known = evaluations_in(state.log_history)
        self._before = 60 * known[-1].minutes if known else 0.0
        self._began = perf_counter()
        self.progress = self._agreed(state.global_step)
        if not known:
            self._look(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate and save where it is time for it, and end."""
        self.trainer.take_positions()
        before, self.progress = self.progress, self._agreed(state.global_step)
        marks = self._recipe.evaluations
        if int(self.progress * marks) > int(before * marks):
            self._look(state)
            control.should_save = True
            control.should_training_stop = is_over(self._recipe, evaluations_in(state.log_history))

    def _look(self, state: TrainerState) -> None:
        loss = self.trainer.take_mean_loss() if state.global_step else None
        quality = self._evaluate() if state.is_world_process_zero else None
        found: Evaluation = shared(quality and Evaluation(state.global_step, self._seconds() / 60, loss, quality))
        self.trainer.log(found.to_dict())
        if state.is_world_process_zero:
            self._note(evaluations_in(state.log_history))

    def _agreed(self, step: int) -> float:
        return float(shared(self._recipe.progress(step, self._seconds())))

    def _seconds(self) -> float:
        return self._before + perf_counter() - self._began


class OfflineTrainer(OnlineGKDTrainer):
    """
    [`~hf_osd.learning.distillation.OnlineGKDTrainer`] over texts that are all there.

    Args:
        model (`PreTrainedModel`): Training copy of the draft, float32.
        recording (`Recording`): What to learn.
        recipe (`Recipe`): How.
        callback (`OfflineCallback`): When to stop.
        folder (`Path`): Of its checkpoints.
        bf16 (`bool`): Whether to run the forward pass under bfloat16 autocast.
    """

    def __init__(
        self,
        model: Any,
        recording: Recording,
        recipe: Recipe,
        callback: OfflineCallback,
        folder: Path,
        bf16: bool,
    ) -> None:
        self._recording, self._recipe, self._callback = recording, recipe, callback
        self._batches = Batches(recording.lengths, recipe.batch_tokens, recipe.seed)
        config = OnlineConfig(
            max_length=_LONGEST_TEXT,
            seed=recipe.seed,
            training_arguments={
                "adam_beta2": 0.95,  # the batches are few: a longer memory would be of weights long gone
                "ignore_data_skip": True,  # batches are numbered
                "output_dir": str(folder),
                "save_strategy": "steps",
                "save_steps": _NEVER,  # the callback says when
                "save_total_limit": 1,
            },
        )
        super().__init__(model, self._draw, config, callback, bf16=bf16)  # type: ignore[arg-type]

    def _draw(self, _: int) -> list[Observation]:
        """Return the next batch of this process."""
        number = self.state.global_step * self.accelerator.num_processes + self.accelerator.process_index
        return [self._recording[text] for text in self._batches[number]]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Give every weight the rate of the recipe."""
        trained: Any = self.model
        groups = self._recipe.groups(trained.parameters())
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        self.optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=0.0)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Follow the recipe, which goes by the clock."""
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,  # type: ignore[arg-type]
            lambda step: self._recipe.rate(step, self._callback.progress),
        )
        return self.lr_scheduler
