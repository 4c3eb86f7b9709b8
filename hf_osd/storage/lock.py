"""
One writer at a time: a lock of the operating system, which ends with the process.

Not covered: network file systems without locks, where a state directory is refused. The Windows branch is written from
the documentation and has not been run.
"""

import contextlib
import os
import stat
import sys
import weakref
from pathlib import Path

from ..errors import StateError
from .places import LOCK, check_lock

_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_DIGITS = 20  # digits of a process's number, at most; a longer content is that of another file

_held: "weakref.WeakSet[DirectoryLock]" = weakref.WeakSet()


class DirectoryLock:
    """
    Holds a directory for this process and this object, until `release` or the end of the process.

    A forked child does not hold it: the parent's death alone must free the directory.

    Args:
        directory (`Path`):
            Where the file `.lock` is made. The number of the process is written to it, for messages only, unless the
            file has other content.

    Raises:
        StateError: Another process, or another object of this one, holds it; `.lock` is a link or no file; or the file
            system has no locks.
        OSError: The file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._descriptor: int | None = self._acquire()
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether this process holds the directory."""
        return self._descriptor is not None

    def renew(self) -> None:
        """
        Take the lock again if its file has been deleted, since others could take a new file's by now.

        Raises:
            StateError: Another process has it by now, or this one is a forked child or has released it.
            OSError: The file cannot be made.
        """
        if self._descriptor is None:
            raise StateError(f"{self._path.parent} is no longer held by this process")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._descriptor), self._path.lstat()):
                return
        self._descriptor, old = self._acquire(), self._descriptor
        os.close(old)

    def release(self) -> None:
        """Let others have the directory. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _acquire(self) -> int:
        check_lock(self._path.parent)
        descriptor = os.open(self._path, _FLAGS, 0o600)
        try:
            self._lock(descriptor)
            with contextlib.suppress(OSError):  # the disk is full: the lock holds, and messages lack the number
                _sign(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _lock(self, descriptor: int) -> None:
        try:
            _lock(descriptor)
        except (BlockingIOError, PermissionError) as error:
            holder = _holder(descriptor) or "unknown"
            raise StateError(
                f"{self._path.parent} is in use by process {holder}: close the assistant that has it, or give this "
                "one a state directory of its own"
            ) from error
        except OSError as error:
            raise StateError(
                f"{self._path.parent} cannot be locked ({error}): use a directory on a local disk"
            ) from error


def _sign(descriptor: int) -> None:
    """Write the number of the process to a lock file, unless it has other content."""
    found = os.fstat(descriptor)
    is_ours = not found.st_size or _holder(descriptor) is not None
    if is_ours and found.st_nlink == 1 and stat.S_ISREG(found.st_mode):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, str(os.getpid()).encode())


def _holder(descriptor: int) -> str | None:
    """Return the number in a lock file; `None` where it holds anything else."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    content = os.read(descriptor, _DIGITS + 1)
    return content.decode() if content.isdigit() and len(content) <= _DIGITS else None


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        # Locked bytes cannot be read by others, so a byte far behind the number is taken.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leave_to_parent() -> None:
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
