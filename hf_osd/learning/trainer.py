"""
TRL's GKD trainer on recorded teachers; the only module that imports TRL.

`trl.experimental.gkd` may change between releases; this was written against TRL 1.16 and transformers 5.17 to 5.24.
Not covered: `seq_kd`; several processes.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
import transformers.trainer
import trl.trainer.sft_trainer
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SaveStrategy

from .._compat import global_seed_untouched
from ..config import OnlineConfig
from ..errors import ConfigError
from ..records import Observation
from .features import reader_of
from .losses import sparse_loss, token_loss
from .on_policy import OnPolicySource
from .reading import Batch, BatchParts, Reader, longest_request, positions_of, target_logits
from .session import UpdateCallback

with warnings.catch_warnings():  # about an experimental module, which the user has not chosen
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDConfig, GKDTrainer

# Arguments that are settings of OnlineConfig, under the names that they have there.
_SETTINGS = {name: name for name in ("beta", "learning_rate", "lmbda", "max_length", "seed")}
_SETTINGS |= {"max_steps": "steps_per_update", "per_device_train_batch_size": "batch_size"}
_UNUSED = {"num_train_epochs": "OnlineConfig.steps_per_update", "use_cpu": "the device of the draft"}
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # one option: of transformers 5.23, and before
_LOG_HISTORY = 100  # entries of the trainer's log that are kept, the latest


class OnlineGKDConfig(GKDConfig):  # type: ignore[misc, unused-ignore]
    """[`~trl.experimental.gkd.GKDConfig`] on the device of the draft, which leaves no files unless asked to."""

    def __init__(self, draft_device: torch.device, **arguments: Any) -> None:
        self._draft_device = draft_device
        super().__init__(**arguments)

    @property
    def device(self) -> torch.device:
        """Return where batches go: to the draft, not to the first GPU."""
        _ = super().device  # sets up the process state
        return self._draft_device

    @property
    def n_gpu(self) -> int:
        """Return one at most: `Trainer` would spread the training over GPUs that serve."""
        return 0 if self._draft_device.type == "cpu" else 1

    @property
    def should_save(self) -> bool:
        """Whether `output_dir` is written to; if so, `Trainer` makes it at once."""
        return self.save_strategy != SaveStrategy.NO and bool(super().should_save)


def training_arguments(config: OnlineConfig, device: torch.device, bf16: bool = False) -> OnlineGKDConfig:
    """
    Return the trainer's arguments: no logs and a constant learning rate, then what the user chose.

    Args:
        config (`OnlineConfig`): Settings; `config.training_arguments` may name any other field of `GKDConfig`.
        device (`torch.device`): That of the draft.
        bf16 (`bool`, defaults to `False`): Whether to run the forward pass under bfloat16 autocast.

    Raises:
        ConfigError: An argument is unknown, is set elsewhere, or has a value that TRL refuses.
    """
    chosen = dict(config.training_arguments)
    _check_names(chosen)
    arguments: dict[str, Any] = {
        "output_dir": "hf_osd",
        "bf16": bf16,
        "disable_tqdm": True,
        "logging_strategy": "steps" if "logging_steps" in chosen else "no",
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
    }
    if chosen.get("fp16"):
        arguments["bf16"] = False
    if not chosen.keys() & set(_CHECKPOINTING):
        known = {field.name for field in fields(GKDConfig)}
        arguments[next(name for name in _CHECKPOINTING if name in known)] = False
    arguments |= chosen
    arguments |= {name: getattr(config, setting) for name, setting in _SETTINGS.items()}
    arguments["use_cpu"] = device.type == "cpu"
    precision = "bf16" if arguments["bf16"] else "fp16" if arguments.get("fp16") else "no"
    arguments.setdefault("accelerator_config", {"use_configured_state": _fits(device, precision)})
    try:
        with on_device(device):
            made = OnlineGKDConfig(device, **arguments)
        _check_trackers(made)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"training_arguments: {error}") from error
    return made


def _check_trackers(arguments: OnlineGKDConfig) -> None:
    """Make the trackers once, so that a missing package is found now and not in every update."""
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except RuntimeError as error:  # that of a package that is not installed
        raise ConfigError(f"training_arguments: report_to: {error}") from error


def _fits(device: torch.device, precision: str) -> bool:
    """Whether accelerate's state of this process will do: a new one would be reset under trainers that run."""
    cpu = PartialState._shared_state.get("_cpu")
    return cpu is (device.type == "cpu") and AcceleratorState._shared_state.get("_mixed_precision") == precision


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one of its kind, on which accelerate trains."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_names(chosen: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(GKDConfig) if field.init}
    reserved = {name: f"OnlineConfig.{setting}" for name, setting in _SETTINGS.items()} | _UNUSED
    for name in chosen:
        if name in reserved:
            raise ConfigError(f"training_arguments must not set {name!r}: it follows from {reserved[name]}")
        if name not in known:
            raise ConfigError(f"training_arguments: GKDConfig has no field {name!r}")


class OnlineGKDTrainer(GKDTrainer):  # type: ignore[misc, unused-ignore]
    """
    [`~trl.experimental.gkd.GKDTrainer`] that learns from recorded teachers instead of running one.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Training copy of the draft.
        sample (`Callable[[int], list[Observation]]`):
            Draws that many requests; called once a batch.
        config (`OnlineConfig`):
            Settings.
        callback (`UpdateCallback`):
            Counts the steps, gives way to serving, and may end an update.
        target ([`~transformers.PreTrainedModel`], *optional*):
            The live target, which `config.full_teacher` runs over recorded requests for its full distributions, and
            `config.lmbda` over what the draft writes. It is neither moved, wrapped nor prepared.
        bf16 (`bool`, defaults to `False`):
            Whether to run the forward pass under bfloat16 autocast.
        reader ([`~hf_osd.learning.reading.Reader`], *optional*):
            What reads the requests. Defaults to that of such a draft, with all of its vocabulary.

    Raises:
        ConfigError: `config.training_arguments` names an unknown argument or has a bad value.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sample: Callable[[int], list[Observation]],
        config: OnlineConfig,
        callback: UpdateCallback,
        target: PreTrainedModel | None = None,
        bf16: bool = False,
        reader: Reader | None = None,
    ) -> None:
        arguments = training_arguments(config, model.device, bf16)
        length = longest_request(model, config.max_length)
        self._reader = reader or reader_of(model)  # TRL replaces `model.forward`
        with global_seed_untouched(transformers.trainer, trl.trainer.sft_trainer), _adapted_output_allowed(model):
            super().__init__(
                model=model,
                teacher_model=_NoTeacher(model.config),
                args=arguments,
                data_collator=self._reader.collator(length, config.positions),
                train_dataset=Dataset.from_dict({"input_ids": [[0]]}),  # required; get_train_dataloader has the data
                processing_class=_placeholder_tokenizer(),
                callbacks=[callback],
            )
        self.remove_callback(PrinterCallback)
        # `train` begins with it, and its garbage collection takes 0.2 s: 40 times as long as the rest of an update.
        self.accelerator.free_memory = self._forget_prepared
        self.processing_class = None  # else `train` gives the model the special tokens of the placeholder
        self.target = target if config.full_teacher else None
        self._loss = config.loss
        self._sample = sample
        if config.lmbda > 0.0:
            assert target is not None
            self._sample = OnPolicySource(sample, self.model, target, config, callback.session.give_way).sample
        self._session = callback.session
        vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
        self._parts = BatchParts(vocab_size, config.batch_size if config.background else None)
        self._loss_sum = torch.zeros((), device=model.device)
        self._loss_count = self.steps_before = 0
        self.positions = 0  # learned from in the step in progress
        callback.trainer = self

    def update(self, steps: int, learning_rate: float) -> float:
        """
        Run one update. The optimiser goes on from the one before.

        Args:
            steps (`int`): Steps to take; the session may end the update earlier.
            learning_rate (`float`): For all of them; a schedule of `config.training_arguments` starts from it.

        Returns:
            `float`: Mean loss of the steps, in nats; `nan` without any.
        """
        self.steps_before = self.state.global_step
        self.args.max_steps = self.steps_before + steps
        self.args.learning_rate = learning_rate
        handler: Any = self.callback_handler
        handler.on_train_end = lambda *parts: parts[-1]  # else trackers would close their run after each update
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group["lr"] = group["initial_lr"] = learning_rate
        self.train()
        loss = self.take_mean_loss()
        self.log({"online_loss": loss, "online_learning_rate": learning_rate})
        return loss

    def load_optimizer_state(self, state: Mapping[int, Any]) -> None:
        """Have the optimiser go on from a state by parameter; without any, it starts anew."""
        optimizer = self.optimizer or self.create_optimizer()
        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})

    def _forget_prepared(self, *_: Any) -> None:
        """Let go of what the last `train` prepared, as `Accelerator.free_memory` does."""
        for prepared in ("_schedulers", "_optimizers", "_models", "_dataloaders"):
            getattr(self.accelerator, prepared).clear()
        self.accelerator.step = 0

    def _send_telemetry(self) -> None:
        """Send nothing: a server does not call home because its draft learns."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """
        Return an endless stream of batches, each drawn when its step begins.

        Accelerate's loader would draw one step ahead, and a plain `DataLoader` would take its seed from the global
        random state.
        """
        stream = _ReplayStream(self._sample, self.args.per_device_train_batch_size)
        return DataLoader(stream, batch_size=None, collate_fn=self.data_collator, generator=torch.Generator())

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        Run forward and backward passes; GKD's own step would first toss a global coin, whether to sample new outputs.

        A batch may go in parts, which add up to its gradient, and in the background gives way to serving in between.
        """
        positions = positions_of(inputs)
        loss = torch.zeros((), device=self.args.device)
        for part in self._parts.of(inputs):
            if part is not inputs:
                part["positions"] = positions
            loss += super(GKDTrainer, self).training_step(model, part, num_items_in_batch)  # type: ignore[no-untyped-call]
            self._parts.fit(self._session.give_way())
        self.positions += positions
        self._loss_count += 1
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        Return the mean loss over the positions to learn from, a scalar in nats.

        Args:
            model (`torch.nn.Module`): The student.
            inputs (`dict[str, torch.Tensor]`): A batch, or a part of one; see
                [`~hf_osd.learning.reading.Reader.passes`].
            return_outputs (`bool`, defaults to `False`): Whether to return a tuple, with an empty `dict`.
            num_items_in_batch (`int`, *optional*): Not used: the mean is over the batch.
        """
        loss = torch.zeros((), device=inputs["learn_mask"].device)
        for one in self._reader.passes(model, inputs):
            divergence = self._divergence(one.logits[one.inputs["learn_mask"]].float(), one.inputs)
            loss = loss + one.weight * divergence.sum() / max(one.positions, 1)
        self._loss_sum += loss.detach()
        self._session.give_way()  # before the backward pass
        return (loss, {}) if return_outputs else loss

    def _divergence(self, student: torch.Tensor, inputs: Batch) -> torch.Tensor:
        mask = inputs["learn_mask"]
        if self.target is None:
            ids, log_probs, tail = (inputs[f"teacher_{name}"][mask] for name in ("ids", "log_probs", "tail"))
            return sparse_loss(student, ids, log_probs, tail, self._loss, self.beta)
        dense = target_logits(self.target, inputs)[mask].to(student.device).float()
        # Padded vocabularies may differ in size; tokens that both have are the real ones.
        shared = min(student.shape[-1], dense.shape[-1])
        teacher, student = (logits[:, :shared].log_softmax(dim=-1) for logits in (dense, student))
        return token_loss(teacher, student, self._loss, self.beta)

    def take_mean_loss(self) -> float:
        """Return the mean loss since the last call; `nan` without a step."""
        mean = float(self._loss_sum) / self._loss_count if self._loss_count else float("nan")
        self._loss_sum.zero_()
        self._loss_count = 0
        return mean

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to the reporters, though not the end of each `train()`, and keep only the latest entries."""
        if "train_runtime" in logs:
            return
        super().log(logs, start_time)
        del self.state.log_history[:-_LOG_HISTORY]


@contextmanager
def _adapted_output_allowed(model: Any) -> Iterator[None]:
    """Hide the output layer: TRL 1.16 refuses an adapter on it, because of a loss that is not used here."""
    if not hasattr(model, "get_base_model"):
        yield
        return
    model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_output_embeddings


class _ReplayStream(IterableDataset[list[Observation]]):
    def __init__(self, sample: Callable[[int], list[Observation]], batch_size: int) -> None:
        self.sample = sample
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Observation]]:
        while True:
            yield self.sample(self.batch_size)


class _NoTeacher(nn.Module):
    """Stands in for the target, which GKDTrainer would wrap and move; it has a vocabulary to be compared."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def _placeholder_tokenizer() -> PreTrainedTokenizerFast:
    """Return any tokenizer: TRL asks for one, and requests are recorded as tokens."""
    tokenizer = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")
