"""The training thread: waits until an update is due, runs the trainer, publishes, saves and restores its state."""

import copy
import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import OnlineConfig
from ..errors import ClosedError, LearningError
from ..records import Observation
from .replay import ReplayBuffer
from .streams import TrainingStream
from .threads import leave_cores_to_serving
from .yielding import DutyCycle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .distillation import OnlineGKDTrainer
    from .pacing import PacedTrainer

logger = logging.getLogger(__name__)

Publish = Callable[[Mapping[str, torch.Tensor]], None]

# Each request fades what earlier ones said of the acceptance by this factor.
_ACCEPTANCE_MEMORY = 0.9
# The acceptance that the learning rate follows moves up by this fraction a request, and down at once.
_TRUST = 1.0 / 128.0
# A draft that accepts this much, from the start or for long, learns at the smallest rate.
_GOOD_ACCEPTANCE, _SMALLEST_SCALE = 0.5, 0.015
# Seconds that `close` and interpreter exit give the step in progress.
_PATIENCE = 10.0
_STATE, _WEIGHTS = "learner.json", "weights.safetensors"
_OPTIMIZER, _REPLAY = "optimizer.safetensors", "replay.safetensors"
_COUNTERS = (
    "updates", "failures", "steps", "positions", "last_loss", "seconds",
    "_fresh", "_unjudged", "_accepted", "_decided", "_trusted",
)  # fmt: skip


def import_distillation() -> ModuleType:
    """Import the module that imports TRL, seconds at the first time, and leave the global random state as it was."""
    state = random.getstate()
    first = f"{__package__}.distillation" not in sys.modules
    from . import distillation

    if first:  # rich, which comes with TRL, draws from it while it is imported
        random.setstate(state)
    return distillation


@dataclass
class _Restored:
    """What the trainer starts from after a restart: weights by name, optimiser state by parameter."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[int, dict[str, Any]]


class TrainingLoop:
    """
    What the training thread and the requests share.

    Updates are numbered: `requested` >= `started` >= `finished`, at most two apart, because a request for an update
    joins one that has not started. It is the `UpdateSession` of `OnlineUpdateCallback`.
    """

    def __init__(
        self,
        draft: "PreTrainedModel",
        config: OnlineConfig,
        publish: Callable[[], Publish | None],
        target: "PreTrainedModel | None",
    ) -> None:
        self.config = config
        self.replay = ReplayBuffer(config.replay_size, config.seed, config.replay_size * config.max_length)
        self.updates = 0
        self.failures = 0
        self.steps = 0
        self.positions = 0
        self.last_loss: float | None = None
        self.seconds = 0.0
        self.stopped = False
        # Inline, a request in flight may be one that waits for this very update.
        self.duty = DutyCycle(config.duty_cycle if config.background else 1.0)
        self._stream = TrainingStream(draft.device if config.background else torch.device("cpu"))
        self._draft, self._target, self._publish = draft, target, publish
        self._trainer: OnlineGKDTrainer | None = None
        self._restored: _Restored | None = None
        self._changed = threading.Condition()
        self._updating = threading.Lock()  # held by the thread during an update; `save` and `load` wait for it
        self._thread: threading.Thread | None = None
        self._requested = self._started = self._finished = 0
        self._failed: tuple[int, Exception] | None = None
        self._began = 0.0
        self._fresh = self._unjudged = 0
        self._accepted = self._decided = 0.0
        self._trusted: float | None = None

    # Called by requests.

    def record(self, observation: Observation) -> int | None:
        """Add a request; the number of the update that it makes due, if any."""
        if self.stopped or observation.output_ids.numel() == 0:
            return None
        learns = self.config.positions == "all" or bool(observation.rejected.any())
        if learns:
            self.replay.add(observation)
        with self._changed:
            self._unjudged += learns
            self._fresh += 1
            if self._fresh < self.config.update_every or not len(self.replay):
                return None
            self._fresh = 0
        return self.request()

    def judge(self, trainer: "PacedTrainer") -> None:
        """
        Compare the draft with the target in the requests that came since the last time, before it learns from them.

        Serving could not tell: it drafts where that pays, and hardly at all with a draft that is cold.
        """
        with self._changed:
            count, self._unjudged = self._unjudged, 0
        for accepted, decided in trainer.agreements(self.replay.latest(count)):
            self._note_acceptance(accepted, decided)

    def _note_acceptance(self, accepted: float, decided: float) -> None:
        self._accepted = self._accepted * _ACCEPTANCE_MEMORY + accepted
        self._decided = self._decided * _ACCEPTANCE_MEMORY + decided
        if self._trusted is None or not self.updates:
            self._trusted = self.acceptance
        self._trusted = min(self.acceptance, self._trusted + _TRUST * (self.acceptance - self._trusted))

    @property
    def acceptance(self) -> float:
        """Moving average of how often the draft's choice was the target's, in [0, 1]."""
        return self._accepted / self._decided if self._decided > 0 else 0.0

    def request(self) -> int:
        """Ask for an update, and return its number."""
        with self._changed:
            if self._requested == self._started:
                self._requested += 1
            if self._thread is None and not self.stopped:
                self._thread = threading.Thread(target=self._run, name="hf_osd-learner", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return self._requested

    def wait_until_finished(self, ticket: int) -> Exception | None:
        """Wait for an update; why it failed, if it did."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished >= ticket or self.stopped)
            if self._failed is not None and self._failed[0] >= ticket:
                return self._failed[1]
            return None if self._finished >= ticket else ClosedError("closed during the update")

    def stop(self) -> None:
        """End the thread, and wait for it: a daemon in the middle of a kernel can crash a dying interpreter."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
        self.duty.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)

    # Called by the training thread.

    def _run(self) -> None:
        leave_cores_to_serving()
        while self.wait_for_update():
            try:
                self._train()
            except Exception as error:  # whatever happens here, serving goes on with the weights it has
                self._fail(error)

    def _train(self) -> None:
        with import_distillation().on_device(self._draft.device), self._stream.training():
            if self._trainer is None:
                self._trainer = self._build()
            self._trainer.train()
        if not self.stopped:
            raise LearningError("the trainer ended by itself")
        if self._started > self._finished:  # stopped in the middle of an update
            self._updating.release()

    def _build(self) -> "OnlineGKDTrainer":
        distillation = import_distillation()
        copied = copy.deepcopy(self._draft).float()
        if not any(weight.requires_grad for weight in copied.parameters()):  # frozen for serving, not on purpose
            copied.requires_grad_(True)
        restored, self._restored = self._restored, None
        if restored is not None:
            copied.load_state_dict(restored.weights, strict=False)
        optimizer = None if restored is None else restored.optimizer
        callback = distillation.OnlineUpdateCallback(self, self.config.steps_per_update, optimizer)
        bf16 = self._draft.device.type == "cuda" and self._draft.dtype == torch.bfloat16
        trainer: OnlineGKDTrainer = distillation.OnlineGKDTrainer(
            copied, self.replay.sample, self.config, callback, self._target, bf16
        )
        return trainer

    def wait_for_update(self) -> bool:
        """Wait until an update is due, and start it; `False` where training is stopped instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._requested > self._started or self.stopped)
        self._updating.acquire()
        with self._changed:
            if self.stopped:
                self._updating.release()
                return False
            self._started = self._requested
            self._began = time.perf_counter()
            self.duty.resume()
            return True

    def is_stopped(self) -> bool:
        """Whether training has to end at the next step."""
        return self.stopped

    def give_way(self) -> float:
        """Let serving go first; return the seconds worked since the last call."""
        self._stream.synchronize()
        worked, paused = self.duty.give_way()
        self._began += paused  # the time that counts as learning stands still meanwhile
        return worked

    def count_step(self, positions: int) -> None:
        """Count a step of the optimiser, and the positions that it learned from."""
        self.steps += 1
        self.positions += positions

    def learning_rate_scale(self) -> float:
        """
        1 for a draft that accepts nothing, 0.015 for one that accepts half or more.

        A draft that was good before it learned anything is at an optimum, which large steps only leave. One that has
        become good is still on its way, so a rise counts slowly; a fall, such as a new domain, counts at once.
        """
        if not self.config.adaptive_learning_rate:
            return 1.0
        goodness = min(1.0, (self._trusted or 0.0) / _GOOD_ACCEPTANCE)
        return float(_SMALLEST_SCALE ** (goodness**2))

    def finish_update(self, weights: Mapping[str, torch.Tensor], loss: float) -> None:
        """Publish, unless there is anything wrong with the weights."""
        broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
        if broken:
            raise LearningError(f"weights are not finite after the update: {broken[0]}")
        publish = self._publish()
        if publish is not None:
            with self._stream.publishing():
                publish(weights)
        del publish  # it holds the owner, which whoever waits for the update may want to drop
        self.last_loss = loss
        self.updates += 1
        self._finish()

    def _fail(self, error: Exception) -> None:
        logger.warning("An update of the draft failed; serving goes on with the old weights.", exc_info=error)
        self._trainer = None
        if self._started > self._finished:
            self.failures += 1
            self._failed = (self._started, error)
            self._finish()

    def _finish(self) -> None:
        self._updating.release()
        with self._changed:
            self.seconds += time.perf_counter() - self._began
            self._finished = self._started
            self._changed.notify_all()

    # Called by whoever saves and loads.

    def save(self, directory: Path) -> None:
        """Write everything that `load` needs."""
        with self._updating:
            weights, optimizer, numbers = self._trained_state()
            tensors, replay = self.replay.state_dict()
            counters = {name: getattr(self, name) for name in _COUNTERS}
        save_file(weights, directory / _WEIGHTS)
        save_file(optimizer, directory / _OPTIMIZER)
        save_file(tensors, directory / _REPLAY)
        state = {"counters": counters, "optimizer": numbers, "replay": replay}
        (directory / _STATE).write_text(json.dumps(state), encoding="utf-8")

    def _trained_state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, float]]:
        """Weights, then the tensors and the numbers of the optimiser, named `"PARAMETER.KEY"`; copies, on the CPU."""
        if self._trainer is not None and self._trainer.optimizer is not None:
            weights = self._trainer.trained_weights()
            state = self._trainer.optimizer.state_dict()["state"]
        else:
            weights, state = (self._restored.weights, self._restored.optimizer) if self._restored else ({}, {})
        flat = {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}
        tensors = {name: _copy(value) for name, value in flat.items() if isinstance(value, torch.Tensor)}
        numbers = {name: value for name, value in flat.items() if isinstance(value, int | float)}
        return {name: _copy(weight) for name, weight in weights.items()}, tensors, numbers

    def load(self, directory: Path) -> None:
        """Take a saved state; the trainer starts from it."""
        if self._thread is not None:
            raise LearningError("load() has to come before the first update")
        try:
            state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
            counters = {name: state["counters"][name] for name in _COUNTERS}
            weights, optimizer = load_file(directory / _WEIGHTS), load_file(directory / _OPTIMIZER)
            self._check_weights(weights)
            self.replay.load_state_dict(load_file(directory / _REPLAY), state["replay"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise LearningError(f"{directory} does not hold the state of a learner: {error}") from error
        self._restored = _Restored(weights, _by_parameter(optimizer | state["optimizer"])) if weights else None
        for name, value in counters.items():
            setattr(self, name, value)

    def _check_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        shapes = {name: weight.shape for name, weight in self._draft.named_parameters()}
        for name, weight in weights.items():
            if shapes.get(name) != weight.shape:
                raise LearningError(f"{name} has shape {tuple(weight.shape)}, the draft has {shapes.get(name)}")


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _by_parameter(flat: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in flat.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return state
