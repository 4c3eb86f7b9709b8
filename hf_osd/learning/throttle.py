"""The throttle: when learning may work beside requests."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

IDLE_AFTER = 0.02  # seconds without a request after which serving counts as idle


class Throttle:
    """
    Limits learning beside requests in flight, of all learners that share it; one works at a time.

    Learning calls [`give_way`] between parts of its work: a second of work moves the start of the next part by
    `1 / duty_cycle` seconds. While serving is idle, learning does not pause.

    Args:
        duty_cycle (`float`, defaults to 1.0): Share of the time that serving is not idle, in (0, 1]. 1.0 never pauses.
    """

    def __init__(self, duty_cycle: float = 1.0) -> None:
        self._duty_cycle = duty_cycle
        self._changed = threading.Condition()
        self.lock, self.here = threading.RLock(), threading.local()
        self._in_flight = 0
        self._idle_from = 0.0  # where none is in flight
        self._resumed = self._next = time.perf_counter()
        self._paused = 0.0  # seconds of all pauses

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Mark a request as in flight."""
        with self._changed:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1
                self._idle_from = time.perf_counter() + IDLE_AFTER
                self._changed.notify_all()

    def now(self) -> float:
        """Return the time in seconds, on a clock that stands still during pauses."""
        return time.perf_counter() - self._paused

    def resume(self) -> None:
        """Start to count work from now on."""
        self._resumed = time.perf_counter()

    def give_way(self, is_over: Callable[[], bool] = lambda: False) -> float:
        """Wait until serving is idle, the duty cycle allows work, or it is over; return the seconds worked before."""
        now = time.perf_counter()
        worked = now - self._resumed
        with self._changed:
            if self._in_flight or self._resumed < self._idle_from:
                self._next = max(self._next, self._resumed) + worked / self._duty_cycle
            while not is_over() and (pause := self._pause()) > 0.0:
                self._changed.wait(pause)
        self._resumed = time.perf_counter()
        self._paused += self._resumed - now
        return worked

    def _pause(self) -> float:
        """Return the seconds until learning may go on, unless a request begins or ends."""
        go_on = self._next if self._in_flight else min(self._next, self._idle_from)
        return go_on - time.perf_counter()

    def wake(self) -> None:
        """Have whoever is in a pause look whether it is over."""
        with self._changed:
            self._changed.notify_all()
