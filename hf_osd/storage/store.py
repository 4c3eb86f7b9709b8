"""
A state directory as a whole: what [`StateDirectory`] and `OnlineAssistant.save_pretrained` share.

```
DIRECTORY/
  .lock                     one writer at a time
  replay/replay-*.parquet   observations; see `shards.py`
  snapshots/snapshot-*/     the learner; see `snapshots.py`
```

`places.py` makes sure that nothing else is in these places.

The observations that a learner has seen are written before its snapshot. So a crash between the two leaves
observations that the snapshot does not count, never a snapshot that counts observations which are not there.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import StateError
from ..records import Observation
from .files import clean, make_private
from .lock import DirectoryLock
from .places import (
    REPLAY,
    SNAPSHOTS,
    check_content,
    check_folders,
    check_is_folder,
    make_directory,
    warn_of_others,
)
from .replay_log import ReplayLog
from .rows import Row, to_row
from .shards import read_observations
from .snapshots import Snapshot, SnapshotFolder, read_newest_snapshot, refuse_other_formats


class Store:
    """
    A state directory, held for writing. Not thread-safe.

    Args:
        directory (`Path`): Made if it does not exist.
        max_bytes (`int`, *optional*): Bound on the observations on disk.
        time_to_live (`float`, *optional*): Seconds until an observation no longer counts.

    Raises:
        StateError: The directory is the current one or a file, cannot be written to, is in use, is of another format,
            or has a link, or something else that does not belong there, in a place of its own.
    """

    def __init__(self, directory: Path, max_bytes: int | None = None, time_to_live: float | None = None) -> None:
        self.directory = directory
        with _explained(directory):
            make_directory(directory)
            self._lock = DirectoryLock(directory)
        try:
            with _explained(directory):
                check_content(directory)
                warn_of_others(directory)
                refuse_other_formats(directory / SNAPSHOTS)
                clean(directory)
                self._replay = ReplayLog(directory / REPLAY, max_bytes, time_to_live)
                self._snapshots = SnapshotFolder(directory / SNAPSHOTS)
        except BaseException:
            self._lock.release()
            raise

    @property
    def held(self) -> bool:
        """Whether this process may write: not after `close`, and not in a forked child."""
        return self._lock.held

    def prepare(self) -> None:
        """
        Make sure, before anything is written, that the directory is there and ours.

        Raises:
            StateError: Another process has taken it since it was deleted, or there is a link in a place of its own.
            OSError: It cannot be made again.
        """
        make_private(self.directory)
        self._lock.renew()
        check_folders(self.directory)

    def append(self, rows: Sequence[Row]) -> int:
        """Write a shard; return how many of the first rows are on disk now."""
        return self._replay.append(rows)

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot."""
        self._snapshots.write(snapshot)

    def tidy(self) -> None:
        """Remove old observations, and merge small shards."""
        self._replay.tidy()

    def keep_only(self, first: int) -> None:
        """Remove observations before a number, and all snapshots but the last."""
        self._snapshots.prune(keep=1)
        self._replay.remove_before(first)

    def read(self, limit: int | None = None) -> tuple[Snapshot | None, list[Observation]]:
        """Return what [`read_state`] returns, without what has outlived its time."""
        return read_newest_snapshot(self.directory / SNAPSHOTS), self._replay.read(limit)

    @property
    def next_number(self) -> int:
        """Return the number of the next observation."""
        return self._replay.next_number

    def close(self) -> None:
        """Let others have the directory. Idempotent."""
        self._lock.release()


def write_state(directory: str | Path, snapshot: Snapshot, observations: Iterable[Observation]) -> None:
    """
    Write a state in place of the one that a directory holds, if any.

    A crash in the middle leaves the old snapshot, or the new one, with all old observations and perhaps new ones.

    Args:
        directory (`str` or `Path`): Made if it does not exist. Not one that a [`StateDirectory`] has open.
        snapshot (`Snapshot`): The learner.
        observations (`Iterable[Observation]`): Oldest first. They count as recorded now.

    Raises:
        StateError: As [`Store`] says.
        ValueError: An observation's shapes contradict each other.
    """
    rows = [to_row(observation) for observation in observations]
    store = Store(Path(directory))
    try:
        with _explained(store.directory):
            first = store.next_number
            while rows:
                del rows[: store.append(rows)]
            store.save(snapshot)
            store.keep_only(first)
    finally:
        store.close()


def read_state(directory: str | Path, limit: int | None = None) -> tuple[Snapshot | None, list[Observation]]:
    """
    Read a state, without a lock and without changing anything. Whatever is damaged is skipped with a warning.

    Args:
        directory (`str` or `Path`): As [`write_state`] or a [`StateDirectory`] wrote it; it may be missing or empty.
        limit (`int`, *optional*): Observations to read, at most: the newest.

    Returns:
        `tuple[Snapshot | None, list[Observation]]`: The newest intact snapshot, if any, and observations, oldest
        first.

    Raises:
        StateError: The directory is a file, cannot be read, or is of another format.
    """
    directory = Path(directory)
    with _explained(directory):
        check_is_folder(directory)
        return read_newest_snapshot(directory / SNAPSHOTS), read_observations(directory / REPLAY, limit)


def read_groups(directory: str | Path, groups: Collection[str]) -> Mapping[str, Mapping[str, torch.Tensor]] | None:
    """
    Read some groups of tensors of the newest intact snapshot as [`read_state`] does, and nothing else.

    Args:
        directory (`str` or `Path`): As for `read_state`.
        groups (`Collection[str]`): Their names.

    Returns:
        `Mapping[str, Mapping[str, torch.Tensor]]`, *optional*: Those that are there; `None` without a snapshot.

    Raises:
        StateError: As `read_state`.
    """
    directory = Path(directory)
    with _explained(directory):
        check_is_folder(directory)
        found = read_newest_snapshot(directory / SNAPSHOTS, groups)
        return None if found is None else found.tensors


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except StateError:
        raise
    except Exception as error:  # safetensors and Arrow have errors of their own
        raise StateError(f"the state directory {directory} cannot be used: {error}") from error
