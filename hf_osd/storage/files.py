"""
Files and folders that are whole or not there: written under a temporary name, synced, renamed.

A process killed at any moment leaves the old content, or the new one, and perhaps a temporary name, which `clean`
removes. Private to the user: files 0600, folders 0700. Not covered: disks that say they have synced and have not; on
macOS, `fsync` does not empty the disk's own cache, so there a power cut (not a kill) can cost more.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StateError

logger = logging.getLogger(__name__)

TEMPORARY = ".hf_osd-tmp-"  # begins the name of every file or folder that is not finished
_SEAL = "sha256"  # key of a sealed JSON file's own digest


class DamagedError(StateError):
    """A file is not as it was written. Readers of a state skip it with a warning, so users never see this."""


def make_private(folder: Path) -> None:
    """Make a folder that only this user may enter, and its parents; one that exists is left as it is."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file, or leave the old one; on disk when this returns. A link gives way and is not followed."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    discard(temporary)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        discard(temporary)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Bring a file of another library to disk, and make it private."""
    path.chmod(0o600)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk, which Windows does by itself."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder under its name at once: it is there or gone, never in part."""
    leaving = folder.with_name(f"{TEMPORARY}{folder.name}")
    discard(leaving)
    folder.rename(leaving)
    shutil.rmtree(leaving)


def clean(folder: Path) -> None:
    """Remove what a crash left unfinished."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(TEMPORARY):
                discard(path)


def discard(path: Path) -> None:
    """Remove a file, a folder with its content, or a link itself. What stays is logged; the next start tries again."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s is left over, since it cannot be removed: %s", path, error)


def digest(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(values: Mapping[str, Any]) -> bytes:
    """Return JSON that carries its own SHA-256, for [`read_sealed`]."""
    return json.dumps({**values, _SEAL: _fingerprint(values)}, indent=2).encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """
    Read JSON that [`seal`] made.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedError: It is not as it was written.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe may wait for ever
            raise DamagedError(f"{path} is not a file")
        values = json.loads(path.read_bytes())
        sealed = values.pop(_SEAL)
    except (FileNotFoundError, DamagedError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} cannot be read: {error!r}") from error
    if sealed != _fingerprint(values):
        raise DamagedError(f"{path} is not as it was written")
    return dict(values)


def _fingerprint(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()
