"""The budget of a draft: the time that serving earns for its learning, and that learning spends."""

import threading

SCORING_SHARE = 0.5  # share of learning's time that scoring takes at most, so that as much goes into training
MOST_SAVED = 0.25  # of the latest request: time to learn that is kept, so that none is left over from better times


class Budget:
    """
    Limits the time that one draft learns while requests wait for that.

    Each request earns a share of its own time for the draft that has served it, by that draft's eagerness, and the
    draft spends it, soon: little is kept. So drafts that serve side by side take no more than their share in all, and
    one that has little to gain leaves the others theirs. An update may begin while anything is left, and ends once it
    has taken as long as the latest request; what it overdraws has to be earned before the next one.

    Args:
        learning_share (`float`, *optional*): Seconds of learning for each second of serving, at most; `None` sets no
            limit.
    """

    def __init__(self, learning_share: float | None = None) -> None:
        self._share, self._lock = learning_share, threading.Lock()
        self._earned = self._spent = self._scored = self._latest = 0.0  # seconds

    def earn(self, seconds: float, eagerness: float = 1.0) -> None:
        """Count a request that took some seconds, if any; an eagerness in (0, 1] is a factor on the share."""
        if not seconds:  # of a batch in which this draft's rows got no token
            return
        with self._lock:
            earned = self._earned + (self._share or 0.0) * eagerness * seconds
            self._earned = min(earned, self._spent + MOST_SAVED * seconds)
            self._latest = seconds

    def spend(self, seconds: float, scoring: float = 0.0) -> None:
        """Count seconds of learning, and how many of them went into scoring."""
        with self._lock:
            self._spent += seconds
            self._scored += scoring

    def allows_training(self) -> bool:
        """Whether an update may begin."""
        return self._share is None or self._spent < self._earned

    def allows_scoring(self) -> bool:
        """Whether a request may be scored."""
        return self._share is None or self._scored <= SCORING_SHARE * self._earned

    def is_used_up(self, seconds: float) -> bool:
        """Whether an update that has taken some seconds has to end with the step in progress."""
        return self._share is not None and seconds >= self._latest
