"""The folder that a run leaves its files in: tried before the work, and named where writing fails after it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from ..config import shown
from ..errors import ConfigError


def try_output(folder: Path) -> None:
    """
    Find out whether a folder can be made and written to, and leave everything as it was.

    Raises:
        ConfigError: It cannot.
    """
    made: list[Path] = []
    try:
        with writing(folder):
            made += _missing(folder)
            folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=folder, prefix=".hf-osd-") as trial:
                trial.write(b"hf-osd")
    finally:
        for path in made:
            with suppress(OSError):  # of somebody else by now, or never made
                path.rmdir()


def _missing(folder: Path) -> list[Path]:
    """Return what has to be made for a folder to exist, itself first."""
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot write to {shown(str(folder))} ({reason}): choose another output folder") from error
