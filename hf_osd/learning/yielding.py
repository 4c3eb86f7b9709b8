"""How learning keeps out of the way of serving. Not covered: cutting the work into short parts; see `collation.py`."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds without a request after which serving counts as idle: in a shorter gap the next one is being prepared.
_IDLE_AFTER = 0.02


class DutyCycle:
    """
    Lets learning run freely while serving is idle, and for a share of the time otherwise.

    Learning calls [`give_way`] between parts of its work. Each second of work beside requests moves the time when the
    next part may start beside requests by `1 / share` seconds; so the share holds however long the parts are, and
    learning goes on however busy serving is. No lock is held while either of them works.

    Args:
        share (`float`): Of the time that serving is not idle, in (0, 1]. 1.0 never pauses.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._changed = threading.Condition()
        self._in_flight = 0
        self._idle_from = 0.0  # where none is in flight
        self._stopped = False
        self._resumed = self._next = time.perf_counter()

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
                self._idle_from = time.perf_counter() + _IDLE_AFTER
                self._changed.notify_all()

    def resume(self) -> None:
        """Start to count work, after a time without any."""
        self._resumed = time.perf_counter()

    def give_way(self) -> tuple[float, float]:
        """
        Wait until learning may go on: serving is idle, the share allows it, or learning is stopped.

        Returns:
            `tuple[float, float]`: Seconds of work since it went on the last time, and seconds of this pause.
        """
        now = time.perf_counter()
        worked = now - self._resumed
        with self._changed:
            if self._in_flight or self._resumed < self._idle_from:
                self._next = max(self._next, self._resumed) + worked / self._share
            while not self._stopped and (pause := self._pause()) > 0.0:
                self._changed.wait(pause)
        self._resumed = time.perf_counter()
        return worked, self._resumed - now

    def _pause(self) -> float:
        """Seconds until learning may go on, unless a request begins or ends."""
        go_on = self._next if self._in_flight else min(self._next, self._idle_from)
        return go_on - time.perf_counter()

    def stop(self) -> None:
        """Never pause again."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
