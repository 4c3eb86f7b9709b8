"""The training thread: judges requests as they come, and trains when an update is due."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from ..config import OnlineConfig
from ..errors import ClosedError, LearningError
from ..precision import multiplies_bfloat16
from ..records import Observation
from . import identity
from .budget import LearningBudget
from .features import solve_again
from .importing import import_distillation
from .intake import usable
from .journal import Journal
from .moments import by_parameter, flat_moments
from .replay import ReplayBuffer
from .storage import Snapshot, StateDirectory
from .streams import TrainingStream
from .student import Student
from .supervisor import Supervisor
from .threads import leave_cores_to_serving
from .yielding import DutyCycle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .distillation import OnlineGKDTrainer

logger = logging.getLogger(__name__)

Publish = Callable[[Mapping[str, torch.Tensor], float], None]

# Seconds that `close` and interpreter exit give the step in progress.
_PATIENCE = 10.0
# Seconds that a write of the state waits for an update in progress; requests are not kept waiting for it longer.
_COLLECT_PATIENCE = 1.0
# Requests that wait for the thread; where it cannot keep up, the oldest go unnoticed.
_MOST_WAITING = 1024
_COUNTERS = ("updates", "failures", "steps", "positions", "last_loss", "seconds")


class TrainingLoop:
    """
    What the training thread and the requests share.

    Requests are numbered, and so are updates that somebody asks for: `asked` >= `started` >= `finished`, at most two
    apart, because asking joins an update that has not started. It is the `UpdateSession` of `OnlineUpdateCallback`.
    """

    def __init__(
        self,
        draft: "PreTrainedModel",
        config: OnlineConfig,
        publish: Callable[[], Publish | None],
        target: "PreTrainedModel | None",
        student: Student | None,
        frozen: Collection[str] = (),
        vocab_size: int | None = None,
    ) -> None:
        self.config = config
        self.frozen = frozen
        self.journal = Journal()
        bounds = config.replay_size * config.max_length, config.gate, config.max_state_bytes
        self.replay = ReplayBuffer(config.replay_size, config.seed, *bounds)
        self.updates = self.failures = self.steps = self.positions = 0
        self.last_loss: float | None = None
        self.seconds = 0.0
        self.stopped = False
        # Inline, a request in flight may be one that waits for this very update.
        self.duty = DutyCycle(config.duty_cycle if config.background else 1.0)
        self.budget = LearningBudget(config.learning_share)
        self.disk: StateDirectory | None = None
        self.initial: identity.Sample = identity.sample(draft.named_parameters())  # of before it learned anything
        self._stream = TrainingStream(draft.device if config.background else torch.device("cpu"))
        self._draft, self._target, self._publish = draft, target, publish
        self._student, self._vocab_size = student, vocab_size
        self._supervisor: Supervisor | None = None
        self._trainer: OnlineGKDTrainer | None = None
        self._restored: Snapshot | None = None
        self._changed = threading.Condition()
        self._updating = threading.RLock()  # held by the thread while it works; `save` and `load` wait for it
        self._thread: threading.Thread | None = None
        self._waiting: deque[Observation] = deque(maxlen=_MOST_WAITING)
        self._recorded = self._taken = self._handled = 0
        self._collected = (0, 0)
        self._asked = self._started = self._finished = 0
        self._failed: tuple[int, BaseException] | None = None
        self._working = self._is_asked = False
        self._batch: list[Observation] = []
        self._began = 0.0

    # Called by requests.

    def record(self, observation: Observation) -> int | None:
        """Hand over a request; its number, to wait for, or `None` where there is nothing to learn from it."""
        kept = usable(observation) if not self.stopped else None
        if kept is None:
            return None
        if self.disk is not None:
            self.disk.add(kept)
        with self._changed:
            self._waiting.append(kept)
            self._recorded += 1
            self._wake()
            return self._recorded

    def wait_until_handled(self, number: int) -> None:
        """Wait until a request has been judged, and learned from if it made an update due."""
        with self._changed:
            self._changed.wait_for(lambda: self._handled >= number or self.stopped)

    def ask(self) -> int:
        """Ask for an update, and return its number."""
        with self._changed:
            if self._asked == self._started:
                self._asked += 1
            self._wake()
            return self._asked

    def _wake(self) -> None:
        is_running = self._thread is not None and self._thread.is_alive()  # no more in a process that was forked off
        if not is_running and not self.stopped:
            self._start()
        self._changed.notify_all()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="hf_osd-learner", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # at a limit, or at interpreter exit
            logger.warning("Learning has ended, since it gets no thread; serving goes on.", exc_info=error)
            self.stopped = True
        else:
            self._thread = thread

    def wait_until_finished(self, ticket: int) -> BaseException | None:
        """Wait for an update; why it failed, if it did."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished >= ticket or self.stopped)
            if self._failed is not None and self._failed[0] >= ticket:
                return self._failed[1]
            return None if self._finished >= ticket else ClosedError("closed during the update")

    @property
    def has_requests(self) -> bool:
        """Whether there is anything to learn from, or on its way."""
        return len(self.replay) > 0 or self._handled < self._recorded or self._restored is not None

    @property
    def acceptance(self) -> float:
        """Moving average of how likely the target accepted the draft's choice, in [0, 1]."""
        if self._supervisor is None and self._restored is not None:
            return float(self._restored.numbers["supervisor"]["acceptance"])
        return self._supervisor.acceptance if self._supervisor is not None else 0.0

    def stop(self) -> None:
        """End the thread, and wait for it: a daemon in the middle of a kernel can crash a dying interpreter."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
        self.duty.stop()
        if self._thread is threading.current_thread():  # which closes the directory at its end
            return
        if self._thread is not None:
            self._thread.join(_PATIENCE)
        if self.disk is not None:
            self.disk.close()

    # Called by the training thread.

    def _run(self) -> None:
        with suppress(RuntimeError):  # no thread left to do it with
            leave_cores_to_serving()
        while not self.stopped:
            try:
                self._begin()  # first: whatever fails from here on costs no more than what was taken
                with self._stream.training():
                    if self._judge() or self.wait_for_update():
                        self._train()
            except BaseException as error:  # whatever happens here, serving goes on with the weights it has
                self._fail(error)
        if self.disk is not None:
            self.disk.close()

    def _train(self) -> None:
        with import_distillation().on_device(self._draft.device):
            if self._trainer is None:
                self._trainer = self._build()
            self._trainer.train()
        if not self.stopped:
            raise LearningError("the trainer ended by itself")
        if self._working:  # stopped in the middle of an update
            self._rest()

    def _build(self) -> "OnlineGKDTrainer":
        distillation, supervisor = import_distillation(), self._supervise()
        moments = by_parameter(*self._moments())
        self._restored = None
        callback = distillation.OnlineUpdateCallback(self, self.config.steps_per_update, moments or None)
        bf16 = self._draft.dtype == torch.bfloat16 and multiplies_bfloat16(self._draft.device)
        trainer: OnlineGKDTrainer = distillation.OnlineGKDTrainer(
            supervisor.student.model, self.replay.sample, self.config, callback, self._target, bf16, self._vocab_size
        )
        return trainer

    def _supervise(self) -> Supervisor:
        if self._supervisor is None:
            student = self._student or Student(self._draft, self.config.peft_config, self.config.seed, self.frozen)
            parts = (self.replay, self.journal, self._go_live, self.give_way)
            self._supervisor = Supervisor(self._draft, student, self.config, *parts, self._vocab_size)
            if self._restored is not None:
                self._load_state(self._supervisor, self._restored)
        return self._supervisor

    def _load_state(self, supervisor: Supervisor, snapshot: Snapshot) -> None:
        try:
            supervisor.load_state(snapshot.tensors, snapshot.numbers["supervisor"])
        except Exception:  # of another recipe: start anew from the live draft, without moments of other parameters
            self._restored = self._supervisor = self._student = None
            raise

    def wait_for_update(self) -> bool:
        """Judge requests as they come until an update is due, and start it; `False` where training is stopped."""
        while not self.stopped:
            self._begin()
            if self._judge():
                return True
        return False

    def _begin(self) -> None:
        """Wait for something to do, and take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._asked > self._started or self.stopped)
        self._updating.acquire()
        self._working = True
        with self._changed:
            self._batch, self._taken = list(self._waiting), self._recorded
            self._waiting.clear()
            self._is_asked, self._started = self._asked > self._started, self._asked
        self._began = time.perf_counter()
        self.duty.resume()

    def _judge(self) -> bool:
        """Judge what was taken; whether an update is due, and so has started."""
        if not self.stopped:
            supervisor = self._supervise()
            supervisor.take(self._batch)
            if self._is_asked and not len(self.replay):
                raise LearningError("no request has anything to learn from")
            if self._is_asked or (supervisor.is_due() and self.budget.allows_update()):
                solve_again(self._draft, supervisor.student, self.replay.observations())
                supervisor.begin_update()
                return True
        self._rest()
        return False

    def _rest(self) -> None:
        """Let others at the state, and those go on who waited."""
        self._working = False
        self._updating.release()
        worked = time.perf_counter() - self._began
        self.budget.spend(worked)
        with self._changed:
            self.seconds += worked
            self._handled, self._finished = self._taken, self._started
            self._changed.notify_all()

    def is_stopped(self) -> bool:
        """Whether training has to end at the next step."""
        return self.stopped

    def is_out_of_time(self) -> bool:
        """Whether the update in progress has to end with this step: nobody waits for one in the background."""
        inline = not (self.config.background or self._is_asked)
        return inline and self.budget.is_used_up(time.perf_counter() - self._began)

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
        """Factor on `config.learning_rate`."""
        return self._supervise().rate.scale

    def finish_update(self, loss: float) -> None:
        """Have the gate decide about the trained weights."""
        self.last_loss = loss
        decision = self._supervise().finish_update(loss, time.perf_counter() - self._began)
        self.updates += decision == "published"
        if decision == "rolled back":
            self._optimizer().state.clear()
        self._rest()

    def _optimizer(self) -> torch.optim.Optimizer:
        assert self._trainer is not None
        assert self._trainer.optimizer is not None
        return self._trainer.optimizer

    def _go_live(self, weights: Mapping[str, torch.Tensor], acceptance: float) -> None:
        publish = self._publish()
        if publish is not None:
            with self._stream.publishing():
                publish(weights, acceptance)
        del publish  # it holds the owner, which whoever waits for the update may want to drop

    def _fail(self, error: BaseException) -> None:
        self._trainer = None
        if self._working:
            self.failures += 1
            self._failed = (self._started, error)
        try:
            logger.warning("An update of the draft failed; serving goes on with the old weights.", exc_info=error)
            if self._working and self._supervisor is not None:
                self._supervisor.failed(error)
        except BaseException as again:  # such as no memory; the next request starts anew from the live draft
            logger.warning("What the update did to the training copy could not be undone.", exc_info=again)
            self._supervisor = self._student = None
        finally:
            if self._working:
                self._rest()

    # Called by whoever saves and loads.

    @property
    def has_begun(self) -> bool:
        """Whether any request has been seen."""
        return self._thread is not None

    def resume(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, whose live weights go live at once; see `resuming.py`."""
        trained = sorted(snapshot.tensors["live"].keys() & set(self.frozen))
        if trained:
            raise LearningError(f"the state has another {trained[0]} than the target, with which the draft shares it")
        counters = {name: snapshot.numbers["counters"][name] for name in _COUNTERS}
        self._restored = snapshot
        vars(self).update(counters)
        self._go_live(snapshot.tensors["live"], self.acceptance)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Hold off updates; waits for one in progress."""
        with self._updating:
            yield

    def collect(self) -> Snapshot | None:
        """Return the learner's state for the disk, `None` where it is the same as the last time, or in the making."""
        if not self._updating.acquire(timeout=_COLLECT_PATIENCE):
            return None
        try:
            done = (self._taken, self._started)  # an update may come long after the request, and without one
            if done == self._collected:
                return None
            snapshot, self._collected = self.snapshot(), done
            return snapshot
        finally:
            self._updating.release()

    def snapshot(self) -> Snapshot | None:
        """Return the learner's state, at rest; `None` before it has seen anything."""
        if self._supervisor is None:
            return self._restored
        groups, supervisor = self._supervisor.state()
        moments, numbers = self._moments()
        counters = {name: getattr(self, name) for name in _COUNTERS}
        groups |= {"optimizer": moments, **identity.groups(self.initial, groups["live"])}
        return Snapshot(groups, {"counters": counters, "supervisor": supervisor, "optimizer": numbers})

    def blank(self) -> Snapshot:
        """Return a state that says nothing but which draft it belongs to."""
        return Snapshot(identity.groups(self.initial, dict(self._draft.named_parameters())))

    def _moments(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """What the optimiser knows."""
        if self._trainer is not None and self._trainer.optimizer is not None:
            return flat_moments(self._trainer.optimizer.state_dict()["state"])
        if self._restored is not None:
            return dict(self._restored.tensors["optimizer"]), dict(self._restored.numbers["optimizer"])
        return {}, {}
