"""What learning may cost: a share of the time of serving, and no request waits for long."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class LearningBudget:
    """
    Earns a share of the time that requests take, and is spent by learning.

    An update may begin while there is something left. It ends once it has taken as long as the latest request, so that
    a request which waits for it takes about twice its own time; what it overdraws, later requests pay back first.

    Args:
        share (`float`, *optional*): Seconds of learning for each second of serving; `None` sets no limit.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._left = self._latest = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Take the time of a request."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._latest = time.perf_counter() - begun
                self._left += (self._share or 0.0) * self._latest

    def spend(self, seconds: float) -> None:
        """Take the time of learning."""
        with self._lock:
            self._left -= seconds

    def allows_update(self) -> bool:
        """Whether an update may begin."""
        return self._share is None or self._left > 0.0

    def is_used_up(self, seconds: float) -> bool:
        """Whether an update that has taken so long has to end with the step in progress."""
        return self._share is not None and seconds >= self._latest
