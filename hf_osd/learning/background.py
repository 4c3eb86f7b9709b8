"""Turns observed requests into new weights of the draft; `loop.py` has the thread that does it."""

import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import ismethod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import OnlineConfig
from ..errors import ClosedError, LearningError
from ..records import Observation
from .adapters import carries_adapter, check_adapter
from .features import check_settings
from .importing import import_distillation
from .journal import Journal
from .loop import Publish, TrainingLoop
from .resuming import keep_on_disk, load, save
from .sharing import has_own_weights
from .student import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class OnlineLearner:
    """
    Turns observed requests into new weights of the draft, every `config.update_every` requests.

    The weights are trained on a float32 copy of the draft, made when the first update is due, in a thread of its own.
    With `config.background` the request that makes an update due does not wait for it; updates that come due while
    one runs become one, and learning gives way to requests in flight. Without, it waits, and the same requests give
    bit-identical weights. An update that fails, or whose weights are not finite, is logged, counted and forgotten: the
    next one starts from the live draft.

    Args:
        draft ([`~transformers.PreTrainedModel`]):
            The live draft. It is only read.
        config (`OnlineConfig`):
            Settings.
        publish (`Callable[[Mapping[str, torch.Tensor], float], None]`):
            Called after each update, in the training thread, with the trained parameters: float32, detached, under the
            names of `draft.named_parameters()`; and with the acceptance to expect of them, in [0, 1]. It has to copy
            them before it returns. The thread that calls `observe` may be waiting for it, so that thread must not hold
            a lock that `publish` takes.
        target ([`~transformers.PreTrainedModel`], *optional*):
            The live target, which `config.full_teacher` and `config.lmbda` run.
        frozen (`Collection[str]`, *optional*):
            Parameters of the draft that are never trained and never published: those that it shares with the target,
            of [`~hf_osd.learning.sharing.shared_with`].
        vocab_size (`int`, *optional*):
            Tokens of the target, where the draft has more; it proposes no others. Defaults to all of the draft's.

    Raises:
        ConfigError: `config.training_arguments` names an unknown argument or has a bad value, an adapter cannot be
            trained, or a setting does not go with the draft.
        LearningError: `config.full_teacher` or `config.lmbda` without a target.
    """

    @torch.inference_mode(False)  # whoever calls may be in it, and what is made here is trained
    def __init__(
        self,
        draft: "PreTrainedModel",
        config: OnlineConfig,
        publish: Publish,
        target: "PreTrainedModel | None" = None,
        *,
        frozen: Collection[str] = (),
        vocab_size: int | None = None,
    ) -> None:
        if config.needs_target and target is None:
            raise LearningError("full_teacher and lmbda need the target, got None")
        check_settings(config, draft)
        self.learns = config.learn and has_own_weights(draft, frozen)
        if config.learn and frozen:
            _tell(frozen, self.learns)
        if config.background and self.learns:  # seconds, in which requests would hardly get on
            import_distillation()
        if config.training_arguments:  # TRL is imported this early only where there is something to check
            import_distillation().training_arguments(config, draft.device)
        student = None
        if config.peft_config is not None and self.learns:  # what does not fit is refused now
            student = Student(draft, config.peft_config, config.seed, frozen)
        if carries_adapter(draft) and self.learns:
            check_adapter(draft)
        # The thread must keep neither the learner nor the owner of `publish` alive: dropping both stops it.
        self._publish = publish
        self._draft = draft
        self._here = threading.local()
        teacher = target if config.needs_target else None
        self._loop = TrainingLoop(draft, config, _weak(publish), teacher, student, frozen, vocab_size)
        if config.state_dir is not None and self.learns:
            keep_on_disk(self._loop, draft)
        self._stop = weakref.finalize(self, self._loop.stop)  # also at interpreter exit

    @property
    def updates(self) -> int:
        """Published updates."""
        return self._loop.updates

    @property
    def failures(self) -> int:
        """Updates that failed."""
        return self._loop.failures

    @property
    def steps(self) -> int:
        """Steps of the optimiser."""
        return self._loop.steps

    @property
    def positions(self) -> int:
        """Positions learned from, counted once a step."""
        return self._loop.positions

    @property
    def last_loss(self) -> float | None:
        """Mean divergence over the steps of the last update, in nats; `None` before the first."""
        return self._loop.last_loss

    @property
    def seconds(self) -> float:
        """Wall-clock time spent in updates, failed ones included, without the pauses in which serving went first."""
        return self._loop.seconds

    @property
    def acceptance(self) -> float:
        """Moving average of the live draft's acceptance over the last few requests, in [0, 1]; 0 before the first."""
        return self._loop.acceptance

    @property
    def journal(self) -> Journal:
        """What learning did: judged requests, updates and what the gate made of them, changes of the traffic."""
        return self._loop.journal

    @property
    def has_state(self) -> bool:
        """Whether there is anything to go on from: of requests, of a state directory, or loaded."""
        return self._loop.has_requests

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Mark a request of this thread as in flight: background learning keeps to `config.duty_cycle` meanwhile."""
        with self._loop.budget.serving(), self._loop.duty.serving():
            self._here.requests = self._requests_here + 1
            try:
                yield
            finally:
                self._here.requests -= 1

    @property
    def _requests_here(self) -> int:
        """Requests of this thread that are in flight: one may make another, in a logits processor or a streamer."""
        return getattr(self._here, "requests", 0)

    def observe(self, observation: Observation) -> None:
        """
        Record one request, and update the draft if that makes an update due. Never raises because learning failed.

        A request that was made inside another one of the same thread does not wait for its update, which may have to
        wait for the other; that one waits for both in the end.

        Args:
            observation (`Observation`): The request. Ignored after `close`, where it has no output, and where the
                draft has nothing to train.
        """
        number = self._loop.record(observation) if self.learns else None
        if number is not None and not self._loop.config.background and not self._requests_here:
            self._loop.wait_until_handled(number)

    def update(self) -> None:
        """
        Run one update now, and wait for it. Its weights go live if they pass the gate.

        Raises:
            ClosedError: The learner is closed.
            LearningError: Nothing has been recorded yet, the update failed, all parameters are shared with the target,
                or this thread is in the middle of a request.
        """
        if self._loop.stopped:
            raise ClosedError("update() after close()")
        if self._requests_here:
            raise LearningError(
                "update() inside a request (by its logits processor, stopping criterion or streamer) would wait for "
                "that request: call it once generate has returned"
            )
        if not self.learns and self._loop.config.learn:
            raise LearningError("the draft has nothing to train: it shares all parameters with the target")
        if not self._loop.has_requests:
            raise LearningError("update() needs at least one recorded request to learn from")
        error = self._loop.wait_until_finished(self._loop.ask())
        if error is not None:
            raise LearningError(f"the update failed: {_reason(error)}") from error

    def close(self) -> None:
        """Stop the thread after the step in progress. Idempotent; the state can still be saved."""
        self._stop()

    def at_rest(self) -> AbstractContextManager[None]:
        """Hold off updates, so that the draft and what is saved of it are of one moment; waits for one in progress."""
        return self._loop.at_rest()

    def save(self, directory: Path) -> None:
        """
        Write weights, optimiser, replay buffer and counters, as safetensors and JSON.

        Waits for an update in progress; requests go on being recorded meanwhile.

        Args:
            directory (`Path`): Made if it does not exist.
        """
        save(self._loop, Path(directory))

    @torch.inference_mode(False)
    def load(self, directory: Path) -> None:
        """
        Go on from a saved state: the same requests then give the same weights as without the restart.

        Args:
            directory (`Path`): As `save` wrote it, for this draft.

        Raises:
            LearningError: The state is missing, damaged or of another draft, or this learner has already been asked
                for an update.
        """
        load(self._loop, self._draft, Path(directory))


def _tell(frozen: Collection[str], learns: bool) -> None:
    if not learns:
        logger.warning("The draft serves but does not learn: it shares all its parameters with the target.")
    else:
        logger.info("The draft shares %s with the target, which learning leaves alone.", ", ".join(sorted(frozen)))


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, Exception) and str(error) else repr(error)


def _weak(function: Publish) -> Callable[[], Publish | None]:
    return weakref.WeakMethod(function) if ismethod(function) else weakref.ref(function)
