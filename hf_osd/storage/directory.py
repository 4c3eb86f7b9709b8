"""`StateDirectory`: a thread of its own writes to disk what serving observes and the learner learns."""

import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from inspect import ismethod
from pathlib import Path

from ..errors import ClosedError, ConfigError, StateError
from ..records import Observation
from .rows import Row, to_row
from .snapshots import Snapshot
from .store import Store

logger = logging.getLogger(__name__)

Collect = Callable[[], Snapshot | None]
Redact = Callable[[Observation], Observation | None]

_MAX_PENDING = 2**26  # bytes of observations that wait for the disk, at most; the oldest leave first
_PATIENCE = 60.0  # seconds that `close`, and the exit of the interpreter, wait for a write in progress


class StateDirectory:
    """
    Keeps a learner's state on disk while it serves, so that a restart, or a crash, costs the last few seconds at most.

    A thread writes what has come every `flush_seconds`: pending observations as a Parquet shard, then a snapshot of
    the learner. A write that fails (disk full, directory gone) is logged once, counted and tried again at the next
    flush; serving never waits for the disk and never sees its errors. `kill -9` at any moment loses at most what came
    since the last flush, and nothing that is half written is ever loaded. The on-disk format is in
    `docs/durability.md`.

    Args:
        path (`str` or `Path`):
            The directory; made, private to the user, if it does not exist. One `StateDirectory` at a time.
        collect (`Callable[[], Snapshot | None]`):
            Called in the writing thread for the learner's state; `None` says that nothing is new. The tensors of a
            snapshot must not change afterwards. The thread keeps no reference to it, so the owner of a bound method
            can be dropped.
        flush_seconds (`float`, defaults to 30.0):
            Seconds between two flushes.
        max_bytes (`int`, defaults to 268435456):
            Bound on the observations on disk, 256 MiB; the oldest leave first. While a flush runs there may be a
            quarter more. The last two snapshots come on top.
        time_to_live (`float`, *optional*):
            Seconds until an observation no longer counts; its file leaves at most an eighth of that (and a flush)
            later. Defaults to no limit.
        redact (`Callable[[Observation], Observation | None]`, *optional*):
            Applied in [`add`] before anything is kept for the disk; `None` drops the observation, and so does an
            error, with a warning. Defaults to keeping everything.

    Raises:
        ConfigError: `flush_seconds`, `max_bytes` or `time_to_live` is not positive.
        StateError: The path is the current folder or a file, cannot be written to, is in use by another process or
            assistant, is of another format, or has a link, or something else that does not belong there, in a place
            of its own.

    Example:

    ```python
    >>> with StateDirectory("state", collect=learner.snapshot) as state:
    ...     snapshot, observations = state.load()
    ...     state.add(observation)
    ```
    """

    def __init__(
        self,
        path: str | Path,
        *,
        collect: Collect,
        flush_seconds: float = 30.0,
        max_bytes: int = 2**28,
        time_to_live: float | None = None,
        redact: Redact | None = None,
    ) -> None:
        positive = {"flush_seconds": flush_seconds, "max_bytes": max_bytes, "time_to_live": time_to_live}
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {value!r}")
        self._collect, self._redact = collect, redact
        self._writer = _Writer(Store(Path(path), max_bytes, time_to_live), _weak(collect), flush_seconds)
        self._stop = weakref.finalize(self, self._writer.stop)  # also at interpreter exit
        self._rejected = 0

    def __enter__(self) -> "StateDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def failures(self) -> int:
        """Flushes that failed."""
        return self._writer.failures

    @property
    def dropped(self) -> int:
        """Observations that did not get to disk: rejected by an error, or too many while the disk refused."""
        return self._rejected + self._writer.dropped

    def add(self, observation: Observation) -> None:
        """
        Keep an observation at the next flush. Never waits for the disk, and never raises.

        Args:
            observation (`Observation`): Copied. Ignored without output, after `close`, and in a forked child.
        """
        if not self._writer.open:
            return
        try:
            kept = observation if self._redact is None else self._redact(observation)
            row = None if kept is None or not kept.output_ids.numel() else to_row(kept)
        except Exception as error:
            self._rejected += 1
            if self._rejected == 1:
                logger.warning("An observation is not kept on disk; more are only counted.", exc_info=error)
            return
        if row is not None:
            self._writer.put(row)

    def load(self, limit: int | None = None) -> tuple[Snapshot | None, list[Observation]]:
        """
        Read what is on disk. Damaged files are skipped with a warning. Loaded observations need not be added again.

        Args:
            limit (`int`, *optional*): Observations to read, at most: the newest.

        Returns:
            `tuple[Snapshot | None, list[Observation]]`: The newest intact snapshot, if any, and observations, oldest
            first. The last ones may be newer than the snapshot.

        Raises:
            StateError: The directory cannot be read, or a snapshot in it is of another format.
        """
        return self._writer.load(limit)

    def flush(self) -> None:
        """
        Write everything now, and wait until it is on disk.

        Raises:
            ClosedError: After `close`.
            StateError: The disk, or `collect`, failed; what could not be written is tried again at the next flush.
        """
        if self._writer.stopped:
            raise ClosedError("flush() after close()")
        self._writer.flush()

    def save(self, snapshot: Snapshot) -> None:
        """
        Write a snapshot at the next flush, which is now unless the disk refuses; never raises for that.

        Args:
            snapshot (`Snapshot`): Its tensors must not change afterwards.
        """
        self._writer.save(snapshot)

    def end(self) -> None:
        """Begin to close: `close` waits until everything is written."""
        self._writer.end()

    def close(self) -> None:
        """Write everything, and let others have the directory. Idempotent; logs what it cannot write."""
        self._stop()


class _Writer:
    """The writing thread, and what it shares with its owner. The thread must not keep the owner alive."""

    def __init__(self, store: Store, collect: Callable[[], Collect | None], flush_seconds: float) -> None:
        self.failures = self.dropped = 0
        self.stopped = False
        self._store, self._collect, self._flush_seconds = store, collect, flush_seconds
        self._changed = threading.Condition()
        self._pending: deque[Row] = deque()
        self._pending_bytes = 0
        self._urgent = self._failing = False
        self._writing = threading.Lock()  # held during a flush
        self._unsaved: Snapshot | None = None
        self._thread = threading.Thread(target=self._run, name="hf_osd-writer", daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        """Whether rows are taken: not after `stop`, and not in a forked child."""
        return not self.stopped and self._store.held

    # Called by serving.

    def put(self, row: Row) -> None:
        """Take a row. Half of `_MAX_PENDING` wakes the thread; beyond all of it the oldest rows leave."""
        with self._changed:
            self._pending.append(row)
            self._pending_bytes += row.nbytes
            self._drop_surplus()
            if 2 * self._pending_bytes > _MAX_PENDING and not self._failing:
                self._urgent = True
                self._changed.notify_all()

    def _drop_surplus(self) -> None:
        while self._pending_bytes > _MAX_PENDING:
            self._pending_bytes -= self._pending.popleft().nbytes
            self.dropped += 1

    # Called by the owner, and by whoever ends it.

    def load(self, limit: int | None) -> tuple[Snapshot | None, list[Observation]]:
        with self._writing:
            return self._store.read(limit)

    def save(self, snapshot: Snapshot) -> None:
        with self._writing:
            self._unsaved = snapshot
        with self._changed:
            self._urgent = True
            self._changed.notify_all()

    def end(self) -> None:
        """Let the thread write the rest and end."""
        if self._store.held:  # not in a forked child: the thread is the parent's
            with self._changed:
                self.stopped = True
                self._changed.notify_all()

    def stop(self) -> None:
        """Let the thread write the rest and end, and wait for it."""
        if not self._store.held:
            return
        self.end()
        if self._thread is threading.current_thread():  # the garbage collector ran here
            return
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            logger.warning("%s is still being written to; what is not finished is lost.", self._store.directory)

    # Called by the thread, and by `flush`.

    def _run(self) -> None:
        while not self._wait():
            self._try_to_flush()
        self._failing = False  # the last failure is always worth a warning
        self._try_to_flush()
        self._store.close()

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or self._urgent, self._flush_seconds)
            self._urgent = False
            return self.stopped

    def _try_to_flush(self) -> None:
        try:
            self.flush()
        except BaseException as error:  # nothing may end the thread in silence
            if not self._failing:
                then = "what came since the last flush is lost" if self.stopped else "every flush tries again"
                logger.warning("%s; serving goes on, and %s.", error, then, exc_info=error)
            self._failing = True
        else:
            self._failing = False

    def flush(self) -> None:
        """Write everything that has come. Raises `StateError`."""
        if not self._store.held:  # the lock below may be one that the parent held when it forked
            raise StateError(f"the state directory {self._store.directory} is not held by this process")
        with self._writing:
            try:
                self._flush()
            except BaseException as error:  # of safetensors, Arrow and `collect` too
                self.failures += 1
                raise StateError(f"cannot write to the state directory {self._store.directory}: {error}") from error

    def _flush(self) -> None:
        self._store.prepare()
        try:
            self._collect_snapshot()  # first, so that all it has seen is among the rows
        finally:
            self._write_rows()
        if self._unsaved is not None:
            self._store.save(self._unsaved)
            self._unsaved = None

    def _collect_snapshot(self) -> None:
        collect = self._collect()
        snapshot = None if collect is None else collect()
        if snapshot is not None:
            self._unsaved = snapshot

    def _write_rows(self) -> None:
        with self._changed:
            rows, self._pending, self._pending_bytes = list(self._pending), deque(), 0
        try:
            while rows:
                del rows[: self._store.append(rows)]
            self._store.tidy()
        finally:
            with self._changed:
                self._pending.extendleft(reversed(rows))
                self._pending_bytes += sum(row.nbytes for row in rows)
                self._drop_surplus()


def _weak(function: Collect) -> Callable[[], Collect | None]:
    return weakref.WeakMethod(function) if ismethod(function) else weakref.ref(function)
