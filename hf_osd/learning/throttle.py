"""The throttle: when learning may work, and for how long."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

IDLE_AFTER = 0.02  # seconds without a request after which serving counts as idle
SCORING_SHARE = 0.5  # share of learning's time that scoring takes at most, so that as much goes into training
MOST_SAVED = 0.25  # of the latest request: time to learn that is kept, so that none is left over from better times


class Throttle:
    """
    Limits the time that learning takes, in two ways.

    `duty_cycle` limits learning beside requests in flight. Learning calls [`give_way`] between parts of its work: a
    second of work moves the start of the next part by `1 / duty_cycle` seconds. While serving is idle, learning does
    not pause.

    `learning_share` limits learning that requests wait for. Each request earns a share of its own time, and learning
    spends it, soon: little is kept. An update may begin while anything is left, and ends once it has taken as long as
    the latest request; what it overdraws has to be earned before the next one.

    Args:
        duty_cycle (`float`, defaults to 1.0): Share of the time that serving is not idle, in (0, 1]. 1.0 never pauses.
        learning_share (`float`, *optional*): Seconds of learning for each second of serving, at most; `None` sets no
            limit.

    Attributes:
        eagerness (`float`): Factor on the learning share from now on, in (0, 1].
    """

    def __init__(self, duty_cycle: float = 1.0, learning_share: float | None = None) -> None:
        self._duty_cycle, self._share = duty_cycle, learning_share
        self._changed = threading.Condition()
        self.lock, self.here = threading.RLock(), threading.local()  # of all learners that share it
        self._in_flight = 0
        self._idle_from = 0.0  # where none is in flight
        self._stopped = False
        self._resumed = self._next = time.perf_counter()
        self._earned = self._spent = self._scored = self._latest = 0.0  # seconds
        self.eagerness = 1.0
        self._paused = 0.0  # seconds of all pauses

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Mark a request as in flight; when it ends, it has earned time for learning."""
        begun = time.perf_counter()
        with self._changed:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._latest = time.perf_counter() - begun
                earned = self._earned + (self._share or 0.0) * self.eagerness * self._latest
                self._earned = min(earned, self._spent + MOST_SAVED * self._latest)
                self._in_flight -= 1
                self._idle_from = time.perf_counter() + IDLE_AFTER
                self._changed.notify_all()

    # What a request waits for.

    def allows_training(self) -> bool:
        """Whether an update may begin."""
        return self._share is None or self._spent < self._earned

    def allows_scoring(self) -> bool:
        """Whether a request may be scored."""
        return self._share is None or self._scored <= SCORING_SHARE * self._earned

    def is_used_up(self, seconds: float) -> bool:
        """Whether an update that has taken some seconds has to end with the step in progress."""
        return self._share is not None and seconds >= self._latest

    def spend(self, seconds: float, scoring: float = 0.0) -> None:
        """Count seconds of learning, and how many of them went into scoring."""
        with self._changed:
            self._spent += seconds
            self._scored += scoring

    # Beside requests.

    def now(self) -> float:
        """Return the time in seconds, on a clock that stands still during pauses."""
        return time.perf_counter() - self._paused

    def resume(self) -> None:
        """Start to count work from now on."""
        self._resumed = time.perf_counter()

    def give_way(self) -> float:
        """Wait until serving is idle, the duty cycle allows work, or `stop`; return the seconds worked before."""
        now = time.perf_counter()
        worked = now - self._resumed
        with self._changed:
            if self._in_flight or self._resumed < self._idle_from:
                self._next = max(self._next, self._resumed) + worked / self._duty_cycle
            while not self._stopped and (pause := self._pause()) > 0.0:
                self._changed.wait(pause)
        self._resumed = time.perf_counter()
        self._paused += self._resumed - now
        return worked

    def _pause(self) -> float:
        """Return the seconds until learning may go on, unless a request begins or ends."""
        go_on = self._next if self._in_flight else min(self._next, self._idle_from)
        return go_on - time.perf_counter()

    def stop(self) -> None:
        """End the pause in progress, and never pause again."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
