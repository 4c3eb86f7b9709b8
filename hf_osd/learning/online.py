"""`OnlineLearner`: learning as the assistant uses it. The method is in `learner.py`, its thread in `worker.py`."""

import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from .._compat import import_quietly
from ..config import OnlineConfig
from ..drafts.compatibility import check_settings
from ..drafts.sharing import has_own_weights
from ..errors import ClosedError, LearningError
from ..journal import Counters, Journal
from ..records import Observation
from ..storage import Snapshot, StateDirectory
from . import resuming
from .learner import TRAINER, Learner, Publish
from .reading import usable
from .throttle import Throttle
from .worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

COLLECT_PATIENCE = 1.0  # seconds that a write to disk waits for an update in progress, before it leaves out its state


class OnlineLearner:
    """
    Turns observed requests into new weights of the draft, every `config.update_every` requests.

    A float32 copy of the draft is trained. Inline, the request that makes an update due runs it, and the same recorded
    requests give bit-identical weights. With `config.background` a thread runs it, which gives way to requests in
    flight; updates that come due meanwhile become one. An update that fails, or whose weights are not finite, is
    logged, counted and dropped: the next one starts from the live weights.

    Args:
        draft ([`~transformers.PreTrainedModel`]):
            The live draft. It is only read.
        config (`OnlineConfig`):
            Settings.
        publish (`Callable[[Mapping[str, torch.Tensor], float], None]`):
            Makes weights live: float32, detached, by the names of `draft.named_parameters()`, with the acceptance to
            expect of them, in [0, 1]. Called in the thread that learns; it has to copy them before it returns.
        target ([`~transformers.PreTrainedModel`], *optional*):
            The live target, which `config.full_teacher` and `config.lmbda` run.
        frozen (`Collection[str]`, *optional*):
            Parameters of the draft that are neither trained nor published; see
            [`~hf_osd.drafts.sharing.shared_with`].
        proposed (`int` or `torch.LongTensor`, *optional*):
            Tokens that the draft may propose; see [`~hf_osd.learning.reading.Reader`]. Defaults to all of them.
        throttle (`Throttle`, *optional*): That of other learners; one works at a time.

    Attributes:
        learns (`bool`): Whether there is anything to train.

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
        proposed: int | torch.Tensor | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        if config.needs_target and target is None:
            raise LearningError("full_teacher and lmbda need the target, got None")
        check_settings(config, draft, isinstance(proposed, torch.Tensor))
        self._draft, self._config, self.learns = draft, config, config.learn and has_own_weights(draft, frozen)
        if config.learn and frozen:
            _tell(frozen, self.learns)
        # Inline, a request in flight may be one that waits for this very update.
        self.throttle = throttle or Throttle(config.duty_cycle if config.background else 1.0)
        self._worker = worker = Worker(config.background, self.throttle, draft.device)
        self._disk: StateDirectory | None = None
        self._collected = 0, 0, 0  # requests, steps and failures that the last snapshot knew of
        self.learner: Learner | None = None
        if self.learns:
            hooks = worker.in_order(publish), worker.give_way, lambda: worker.stopped
            parts = target if config.needs_target else None, frozen, proposed
            self.learner = Learner(draft, config, self.throttle, *hooks, *parts)
            worker.work_for(self.learner)
            self._prepare(self.learner)
            if config.state_dir is not None:
                self._disk = resuming.keep_on_disk(self.learner, draft, config, self._collect)
        self._stop = weakref.finalize(self, self._worker.stop)  # also at interpreter exit, and before the directory's

    def _prepare(self, learner: Learner) -> None:
        """Import the trainer, which takes seconds, where no request is to wait for it; check its arguments."""
        began, config = time.perf_counter(), self._config
        if config.training_arguments:
            import_quietly(TRAINER).training_arguments(config, self._draft.device)
        elif config.background or config.learning_share is not None:
            import_quietly(TRAINER)
        learner.counters.seconds += time.perf_counter() - began

    @property
    def counters(self) -> Counters:
        """What learning has done so far, in numbers."""
        return self.learner.counters if self.learner is not None else Counters()

    @property
    def journal(self) -> Journal:
        """What learning did: scored requests, updates, changes of the traffic."""
        return self.learner.journal if self.learner is not None else Journal()

    @property
    def acceptance(self) -> float:
        """Acceptance of the live draft on the latest scored requests, in [0, 1]; 0 before the first."""
        return self.learner.expected() if self.learner is not None else 0.0

    @property
    def has_state(self) -> bool:
        """Whether there is any request to learn from: observed, loaded, or of a state directory."""
        return self.learner is not None and (len(self.learner.replay) > 0 or self._worker.has_waiting)

    @property
    def takes_requests(self) -> bool:
        """Whether a request is worth recording now: where time to learn is limited, something of it has to be left."""
        budget = None if self.learner is None or self._worker.stopped else self.learner.budget
        return budget is not None and (budget.allows_training() or budget.allows_scoring())

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Mark a request of this thread as in flight, during which learning is throttled."""
        with self.throttle.serving():
            self.throttle.here.requests = self._requests_here + 1
            try:
                yield
            finally:
                self.throttle.here.requests -= 1

    @property
    def _requests_here(self) -> int:
        """Requests of this thread that are in flight: one may make another, in a logits processor or a streamer."""
        return getattr(self.throttle.here, "requests", 0)

    def earn(self, seconds: float) -> None:
        """Have a request, or the part of one that this draft has served, pay for learning with its time."""
        if self.learner is not None:
            self.learner.earn(seconds)

    def observe(self, observation: Observation) -> None:
        """
        Record one request, and learn from it. Never raises because learning failed.

        Inline, a request that was made inside another one of the same thread waits for that one to end, since new
        weights cannot go live while it drafts.

        Args:
            observation (`Observation`): The request. Ignored after `close`, without output, and where the draft has
                nothing to train.
        """
        kept = usable(observation) if self.learns and not self._worker.stopped else None
        if kept is None:
            return
        if self._disk is not None:
            self._disk.add(kept)
        self._worker.put(kept)
        if not self._config.background and not self._requests_here:
            self._worker.work()

    def update(self) -> None:
        """
        Run one update now, in this thread. Its weights go live if those of the updates before it lead.

        Raises:
            ClosedError: The learner is closed.
            LearningError: Nothing has been recorded yet, the update failed, all parameters are shared with the target,
                or this thread is in the middle of a request.
        """
        if self._worker.stopped:
            raise ClosedError("update() after close()")
        if self._requests_here:
            raise LearningError(
                "update() inside a request (by its logits processor, stopping criterion or streamer) would wait for "
                "that request: call it once generate has returned"
            )
        learner = self.learner
        if learner is None and self._config.learn:
            raise LearningError("the draft has nothing to train: it shares all parameters with the target")
        with self._worker.lock:
            if learner is None or not self.has_state:
                raise LearningError("update() needs at least one recorded request to learn from")
            self._worker.work()
            error = self._worker.guarded(learner, learner.train)
        if self._worker.stopped:
            raise ClosedError("closed during the update")
        if error is not None:
            raise LearningError(f"the update failed: {_reason(error)}") from error

    def end(self) -> None:
        """Begin nothing any more; a step in progress goes on. `settle` and `close` wait for it."""
        self._worker.end()

    def settle(self) -> None:
        """Stop learning after the step in progress, and have the disk written without waiting for that."""
        self._stop()
        if self._disk is not None:
            self._disk.end()

    def close(self) -> None:
        """Stop learning after the step in progress. Idempotent; the state can still be saved."""
        self.settle()
        if self._disk is not None:
            self._disk.close()

    # Saving.

    def at_rest(self) -> AbstractContextManager[object]:
        """Hold off updates, after one in progress, so that draft and state are saved as of one moment."""
        return self._worker.lock

    def save(self, directory: Path) -> None:
        """Write the state to a directory, made if missing, after an update in progress; serving goes on meanwhile."""
        if self.learner is not None:
            with self.at_rest():
                resuming.save(self.learner, Path(directory), self._config.redact)

    @torch.inference_mode(False)
    def load(self, directory: Path) -> None:
        """
        Go on from a saved state: the same requests then give the same weights as without the restart.

        Args:
            directory (`Path`): As `save` wrote it, for this draft.

        Raises:
            LearningError: The state is missing, damaged or of another draft, or requests have been seen already.
            StateError: The directory cannot be read.
        """
        if self.learner is not None:
            resuming.load(self.learner, self._draft, Path(directory))
            self.keep_requests()

    def keep_requests(self) -> None:
        """Have the state directory, if there is one, hold requests that have come from elsewhere."""
        if self.learner is not None and self._disk is not None:
            for request in self.learner.replay.observations():
                self._disk.add(request)

    def _collect(self) -> Snapshot | None:
        """Return the state for the disk, `None` where it has not changed, or an update keeps changing it."""
        if self.learner is None or not self._worker.lock.acquire(timeout=COLLECT_PATIENCE):
            return None
        try:
            done = self.learner.requests, self.counters.steps, self.counters.failures
            if done == self._collected:
                return None
            snapshot, self._collected = resuming.snapshot_of(self.learner), done
            return snapshot
        finally:
            self._worker.lock.release()


def _tell(frozen: Collection[str], learns: bool) -> None:
    if not learns:
        logger.warning("The draft serves but does not learn: it shares all its parameters with the target.")
    else:
        logger.info("The draft shares %s with the target, which learning leaves alone.", ", ".join(sorted(frozen)))


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, Exception) and str(error) else repr(error)
