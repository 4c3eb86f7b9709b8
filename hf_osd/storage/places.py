"""
The places of a state directory: nothing is written or removed through links.

Others who may write into the directory could put a link in such a place, which leads to files of somebody else. The
directory itself may be a link, since the user has named it.
"""

import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import StateError
from .files import TEMPORARY, make_private
from .shards import NAME as SHARD_NAME
from .snapshots import NAME as SNAPSHOT_NAME

logger = logging.getLogger(__name__)

LOCK, REPLAY, SNAPSHOTS = ".lock", "replay", "snapshots"
_ELSE = "remove it, or use another state directory"


def make_directory(directory: Path) -> None:
    """
    Make a state directory, private to the user, if there is none.

    Raises:
        StateError: It is not named, or is the current folder.
        OSError: It is a file, or cannot be written to.
    """
    if directory == Path():  # `Path("")` too
        raise StateError("a state directory needs a folder of its own, got the current one: name it, such as 'state'")
    check_is_folder(directory)
    make_private(directory)
    _check_writable(directory)


def check_is_folder(directory: Path) -> None:
    """Raise `OSError` where a state directory is a file, or a link to nothing."""
    if directory.is_dir():
        return
    if directory.is_symlink() and not directory.exists():
        raise FileNotFoundError("it is a link to nothing")
    if directory.exists():
        raise NotADirectoryError("it is a file")


def _check_writable(folder: Path) -> None:
    """Raise `OSError` where files cannot be made, now rather than at every write."""
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    os.close(descriptor)
    Path(name).unlink(missing_ok=True)  # whoever holds the directory may have cleaned it


def check_lock(directory: Path) -> None:
    """Raise `StateError` where the lock is no file: a link leads elsewhere, and opening a device may do something."""
    _check(directory / LOCK, stat.S_ISREG, "file")


def check_folders(directory: Path) -> None:
    """Raise `StateError` where observations and snapshots do not go to folders of the directory itself."""
    for name in (REPLAY, SNAPSHOTS):
        _check(directory / name, stat.S_ISDIR, "folder")


def check_content(directory: Path) -> None:
    """
    Check everything with a name of this format: it has to be no link, in folders that can be written to.

    Raises:
        StateError: Something is a link.
        OSError: A folder cannot be read or written to.
    """
    check_folders(directory)
    for path in _content(directory):
        if path.is_symlink():
            raise StateError(_link(path))
    for folder in _folders(directory)[1:]:
        _check_writable(folder)


def _folders(directory: Path) -> list[Path]:
    return [directory, *(folder for name in (REPLAY, SNAPSHOTS) if (folder := directory / name).is_dir())]


def _content(directory: Path) -> Iterator[Path]:
    for folder in _folders(directory):
        for path in folder.iterdir():
            if path.name.startswith(TEMPORARY) or SHARD_NAME.fullmatch(path.name):
                yield path
            elif SNAPSHOT_NAME.fullmatch(path.name):
                yield path
                yield from path.iterdir() if path.is_dir() and not path.is_symlink() else ()


def _check(path: Path, is_right: Callable[[int], bool], kind: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise StateError(_link(path))
    if not is_right(mode):
        raise StateError(f"{path} is not a {kind}: {_ELSE}")


def _link(path: Path) -> str:
    return f"{path} is a link, and nothing is written or removed through links: {_ELSE}"


def warn_of_others(directory: Path) -> None:
    """Warn where other users may put files into a state, or take some out of it."""
    for folder in _folders(directory):
        reason = _who_may_write(folder)
        if reason is not None:
            logger.warning("Others may change what is kept in %s, and so what the draft learns: %s", folder, reason)
            return


def _who_may_write(folder: Path) -> str | None:
    """Say which other users may write to a folder, and what to do about it; `None` if there are none."""
    if os.name == "nt":
        return None
    found = folder.stat()
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}; chown it to user {os.geteuid()} and chmod 700, or use another one."
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        return f"its mode is {stat.S_IMODE(found.st_mode):03o}; chmod 700 {folder}"
    return None
