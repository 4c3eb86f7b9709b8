"""The thread that learns, one piece of work at a time: inline that of the request, or one of its own."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging

from ..records import Observation
from .learner import Learner, Publish
from .scoring import Weights
from .throttle import Throttle

logger = logging.get_logger(__name__)

PATIENCE = 10.0  # seconds that `stop`, and so the exit of the interpreter, waits for the step in progress
MOST_WAITING = 1024  # requests that wait for the thread; beyond that, the oldest are not learned from


class Worker:
    """
    A queue of requests, and the thread in which a learner learns from them; serving survives its errors.

    Inline, that is the thread which calls [`work`]. In the background it is a thread of its own, started with the
    first request. Either way one thread works at a time, and holds `lock` meanwhile.

    Args:
        background (`bool`): Whether to work in a thread of its own.
        throttle (`Throttle`): Paces the work.
        device (`torch.device`): Of the draft. On CUDA the work has a stream of its own.

    Attributes:
        lock (`threading.RLock`): Hold it to keep everybody from working.
        stopped (`bool`): Whether to end with the step in progress, and to begin nothing any more.
    """

    def __init__(self, background: bool, throttle: Throttle, device: torch.device) -> None:
        self.lock = throttle.lock
        self.stopped = False
        self.throttle = throttle
        self.stream = TrainingStream(device if background else torch.device("cpu"))
        self._background, self._device = background, device
        self._learner: Callable[[], Learner | None] = lambda: None
        self._changed = threading.Condition()
        self._waiting: deque[Observation] = deque(maxlen=MOST_WAITING)
        self._thread: threading.Thread | None = None

    def work_for(self, learner: Learner) -> None:
        """Choose the learner, of which the thread keeps a weak reference while it does not work."""
        self._learner = weakref.ref(learner)

    @property
    def has_waiting(self) -> bool:
        """Whether requests wait."""
        return bool(self._waiting)

    def put(self, request: Observation) -> None:
        """Add a request; in the background, wake the thread."""
        with self._changed:
            self._waiting.append(request)
            if self._background and not self.stopped:
                self._wake()

    def _wake(self) -> None:
        if self._thread is None or not self._thread.is_alive():  # a forked process has lost it
            self._thread = threading.Thread(target=self._run, name="hf_osd-learner", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # no thread is left, or the interpreter exits
                logger.warning("Learning has ended, since it gets no thread; serving goes on.", exc_info=error)
                self._thread, self.stopped = None, True
        self._changed.notify_all()

    def _run(self) -> None:
        leave_cores_to_serving()
        while not self.stopped:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self.stopped)
            self.work()

    def work(self) -> None:
        """Have the learner learn from the requests that wait, in this thread."""
        with self.lock:
            requests, learner = self._taken(), self._learner()
            if not requests or learner is None or self.stopped:
                return
            error = self.guarded(learner, lambda: learner.learn(requests))
        if isinstance(error, KeyboardInterrupt) and not self._background:
            raise error  # it was meant for the program

    def guarded(self, learner: Learner, work: Callable[[], None]) -> BaseException | None:
        """Do some work of a learner, count its time, and survive its errors, which are returned."""
        began = self.throttle.now()
        self.throttle.resume()
        try:
            with _own_modes(self._device), self.stream.training():
                work()
        except BaseException as error:  # whatever happens here, serving goes on with the weights it has
            _recover(learner, error)
            return error
        finally:
            worked = self.throttle.now() - began
            learner.budget.spend(worked)
            learner.counters.seconds += worked
        return None

    def give_way(self) -> float:
        """Let serving go first; return the seconds of work since the last call."""
        self.stream.synchronize()
        return self.throttle.give_way(lambda: self.stopped)

    def in_order(self, publish: Publish) -> Publish:
        """Return a `publish` that keeps to the order of serving on CUDA."""

        def in_order(weights: Weights, acceptance: float) -> None:
            with self.stream.publishing():
                publish(weights, acceptance)

        return in_order

    def _taken(self) -> list[Observation]:
        with self._changed:
            requests = list(self._waiting)
            self._waiting.clear()
            return requests

    def end(self) -> None:
        """Have the thread end with the step in progress."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
        self.throttle.wake()

    def stop(self) -> None:
        """End the thread, and wait for it: a daemon in the middle of a kernel can crash a dying interpreter."""
        self.end()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE)


def _recover(learner: Learner, error: BaseException) -> None:
    logger.warning("An update of the draft failed; serving goes on with the old weights.", exc_info=error)
    try:
        learner.failed(error)
    except BaseException as again:  # such as no memory
        logger.warning("What the update did to the training copy could not be undone.", exc_info=again)
        learner.start()


@contextmanager
def _own_modes(device: torch.device) -> Iterator[None]:
    """Training needs gradients and its own precision, in whatever mode the waiting request is."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


class TrainingStream:
    """
    A CUDA stream for training, of the lowest priority; serving has the default stream of the device.

    The two share weights: those of the live draft and the live target. Each hand-over is ordered on the device, and no
    host thread waits for it. On other devices than CUDA nothing happens. Not covered: several devices.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream, self._serving = None, None
        if device.type == "cuda":
            # 0 is CUDA's lowest; serving goes first where its own stream has a higher one, and shares otherwise.
            self._stream = torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]
            self._serving = torch.cuda.default_stream(device)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that the clock counts it."""
        if self._stream is not None:
            self._stream.synchronize()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Train inside: after what serving was given so far; the device has done everything on leaving."""
        if self._stream is None or self._serving is None:
            yield
            return
        self._stream.wait_stream(self._serving)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._stream.synchronize()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Copy weights inside: after the rounds that read the old ones, before those to come."""
        if self._stream is None or self._serving is None:
            yield
            return
        self._serving.wait_stream(self._stream)
        with torch.cuda.stream(self._serving):
            yield
        self._stream.wait_stream(self._serving)  # the next step writes what was copied


def leave_cores_to_serving() -> None:
    """
    Let the calling thread compute with the cores that serving does not use, at least one.

    OpenMP gives each thread that computes a team of its own. Once all teams have more threads than there are cores,
    those of every team sleep between operations, and waking them makes small operations twice as slow: serving would
    stay slow even while nothing is learned.
    """
    serving = torch.get_num_threads()
    own = max(1, min(serving, _cores() - serving + 1))
    if own < serving:
        torch.set_num_threads(own)
        # That is also the number for threads to come; a thread that does nothing else sets it back.
        restore = threading.Thread(target=torch.set_num_threads, args=(serving,), name="hf_osd-threads")
        try:
            restore.start()
            restore.join()
        except RuntimeError as error:  # no thread is left
            logger.warning("New threads compute with %d cores, since there is no thread left.", own, exc_info=error)


def _cores() -> int:
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available is not None else os.cpu_count() or 1
