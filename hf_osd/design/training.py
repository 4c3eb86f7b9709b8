"""The offline trainer: TRL's, on recorded texts, for a number of minutes, evaluated and saved on the way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..config import OnlineConfig
from ..learning.features import FeatureCollator, FeatureReader, reader_of
from ..learning.reading import Batch, ObservationCollator, Pass, positions_of, rows_of
from ..learning.trainer import OnlineGKDTrainer
from ..records import Observation
from .averaging import Average
from .batches import Batches
from .history import Evaluation, evaluations_in, is_over
from .judging import Quality
from .processes import shared
from .recipe import Recipe
from .shards import Recording

logger = logging.get_logger(__name__)

_NEVER = 2**31 - 1
_LONGEST_TEXT = 2**24
_OWN_STEPS = 1  # tokens, besides the first, that are drafted from the draft's own states behind a position
_STEP_WEIGHT = 0.6  # weight of each in the loss, relative to the token before: it is judged only if that is accepted


class Undisturbed:
    """A session that never pauses, since nothing is served; see [`~hf_osd.learning.session.Session`]."""

    def give_way(self) -> float:
        """Go on at once."""
        return 0.0


class OfflineCallback(TrainerCallback):
    """
    Ends a training when its time is over, or when it gets no better; evaluates and saves it on the way.

    What is evaluated is an average of the weights so far. Evaluations lie in the trainer's log, which its checkpoints
    hold. With several processes, the first one judges and looks at the clock, and all go by what it says.

    Args:
        recipe (`Recipe`): How long, and how often.
        evaluate (`Callable[[], Quality]`): Judges the averaged weights, which are the model's meanwhile.
        note (`Callable[[list[Evaluation]], object]`): Told of all evaluations so far, in the first process; the
            weights are still the averaged ones.
    """

    trainer: "OfflineTrainer"
    _average: Average

    def __init__(
        self, recipe: Recipe, evaluate: Callable[[], Quality], note: Callable[[list[Evaluation]], object]
    ) -> None:
        self.session: Any = Undisturbed()
        self.progress = 0.0
        self._recipe, self._evaluate, self._note = recipe, evaluate, note
        self._began = self._before = 0.0  # seconds: start of this run by the clock, and duration of earlier runs

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Resume from the last evaluation of an earlier run, or make the first one."""
        known = evaluations_in(state.log_history)
        self._before = 60 * known[-1].minutes if known else 0.0
        self._began = perf_counter()
        trained: Any = self.trainer.model
        self._average = Average([weight for weight in trained.parameters() if weight.requires_grad])
        if known:
            self._average.load(_checkpoint(args, state))
        self.progress = self._agreed(state.global_step)
        if not known:
            self._look(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate and save when it is time, and stop at the end."""
        self._average.update()
        before, self.progress = self.progress, self._agreed(state.global_step)
        marks = self._recipe.evaluations
        if int(self.progress * marks) > int(before * marks):
            self._look(state)
            control.should_save = True
            control.should_training_stop = is_over(self._recipe, evaluations_in(state.log_history))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add the average to a checkpoint."""
        if state.is_world_process_zero:
            self._average.save(_checkpoint(args, state))

    def _look(self, state: TrainerState) -> None:
        loss = self.trainer.take_mean_loss() if state.global_step else None
        with self._average.in_place():
            quality = self._evaluate() if state.is_world_process_zero else None
            found: Evaluation = shared(quality and Evaluation(state.global_step, self._seconds() / 60, loss, quality))
            self.trainer.log(found.to_dict())
            if state.is_world_process_zero:
                self._note(evaluations_in(state.log_history))

    def _agreed(self, step: int) -> float:
        return float(shared(self._recipe.progress(step, self._seconds())))

    def _seconds(self) -> float:
        return self._before + perf_counter() - self._began


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


@dataclass(frozen=True, slots=True)
class HalvesReader(FeatureReader):
    """
    Drafts a second token behind each position, from the draft's own states, for a random half of each batch only.

    It costs as much as another pass, and another text teaches more. Texts are read from their beginning.

    Attributes:
        chance (`Callable[[], torch.Generator]`): Returns what draws the halves of a batch.
    """

    chance: Callable[[], torch.Generator] = torch.Generator

    def collator(self, max_length: int, positions: str) -> ObservationCollator:
        """See [`~hf_osd.learning.reading.Reader.collator`]."""
        return FeatureCollator(max_length, positions, self.draft)

    def groups(self, rows: int) -> list[tuple[Any, int]]:
        """Return groups of a batch's rows, each with the number of tokens that it goes on from the draft's states."""
        if rows == 1:
            return [(slice(1), _OWN_STEPS)]
        order = torch.randperm(rows, generator=self.chance())
        return [(order[rows // 2 :], 0), (order[: rows // 2], _OWN_STEPS)]

    def passes(self, model: nn.Module, inputs: Batch) -> Iterator[Pass]:
        """See [`~hf_osd.learning.reading.Reader.passes`]: one for each token behind a position, of each group."""
        if not self.draft.state_layers:
            yield from super(HalvesReader, self).passes(model, inputs)
            return
        groups = [(rows_of(inputs, rows), count) for rows, count in self.groups(len(inputs["learn_mask"]))]
        steps = range(max(count for _, count in groups) + 1)
        positions = [sum(positions_of(rows) for rows, count in groups if count >= step) for step in steps]
        total = sum(_STEP_WEIGHT**step for step in steps)
        for rows, count in groups:
            logits = model(**self.options(rows), own_steps=count).logits
            for step, scores in enumerate(logits if count else logits[None]):
                yield Pass(_STEP_WEIGHT**step / total, positions[step], rows, scores)


class OfflineTrainer(OnlineGKDTrainer):
    """
    [`~hf_osd.learning.trainer.OnlineGKDTrainer`] on recorded texts.

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
                "adam_beta2": 0.95,  # there are few steps, for which .999 would be too long a memory
                "ignore_data_skip": True,  # batches are numbered
                "output_dir": str(folder),
                "save_strategy": "steps",
                "save_steps": _NEVER,  # the callback says when
                "save_total_limit": 1,
            },
        )
        plain: Any = reader_of(model)
        reader = HalvesReader(plain.parameters, plain.known, None, plain.draft, self._chance)
        super().__init__(model, self._draw, config, callback, bf16=bf16, reader=reader)  # type: ignore[arg-type]
        self.args.max_steps = _NEVER  # the callback says when it is over

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward passes; a batch whose gradient is not finite is left out, as one would ruin all."""
        before = self._loss_sum.clone()
        loss = super().training_step(model, inputs, num_items_in_batch)
        found = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
        if found and not torch.stack(found).isfinite().all():
            logger.warning("Step %d is left out: its gradient is not finite.", self.state.global_step)
            model.zero_grad(set_to_none=True)
            self._loss_sum, self._loss_count = before, self._loss_count - 1
            return torch.zeros_like(loss)
        return loss

    def _draw(self, _: int) -> list[Observation]:
        """Return the next batch of this process."""
        number = self.state.global_step * self.accelerator.num_processes + self.accelerator.process_index
        return [self._recording[text] for text in self._batches[number]]

    def _chance(self) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self._recipe.seed, self.state.global_step)))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser with the learning rates of the recipe."""
        trained: Any = self.model
        groups = self._recipe.groups(trained.parameters())
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        self.optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=0.0)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of the recipe, which goes by the clock."""
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,  # type: ignore[arg-type]
            lambda step: self._recipe.rate(step, self._callback.progress),
        )
        return self.lr_scheduler
