"""
Snapshots of the learner: folders of safetensors and JSON that become visible, whole, by one rename.

`snapshot-000007/` holds `GROUP.safetensors` for each group of tensors, `numbers.json`, and `manifest.json`, which has
the size and SHA-256 of each of them, and its own. Only what the manifest says is there is read.
"""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import StateError
from .files import (
    TEMPORARY,
    DamagedError,
    clean,
    digest,
    discard,
    make_private,
    read_sealed,
    remove_folder,
    seal,
    sync_file,
    sync_folder,
    write_file,
)

logger = logging.getLogger(__name__)

FORMAT = 3  # of snapshots: goes up with what one must hold; the form of the manifest never changes
_KEEP = 2  # snapshots that are kept: the older one counts where the newer is damaged
NAME = re.compile(r"snapshot-(\d{6,})")
_GROUP = re.compile(r"[A-Za-z0-9_-]+")
_MANIFEST, _NUMBERS, _TENSORS = "manifest.json", "numbers.json", ".safetensors"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """
    The state of a learner at one moment.

    Attributes:
        tensors (`Mapping[str, Mapping[str, torch.Tensor]]`): Groups of tensors, such as `"weights"` and `"optimizer"`.
            A group is a file, so its name is of letters, digits, `-` and `_`. Any dtype and shape; on the CPU where
            it was loaded.
        numbers (`Mapping[str, Any]`): Whatever JSON holds.
    """

    tensors: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)


def list_snapshots(folder: Path) -> list[tuple[int, Path]]:
    """Return numbers and paths of the snapshots in a folder, oldest first; other files are ignored."""
    return sorted((number, path) for number, path in _numbered(folder) if path.is_dir())


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield everything with the name of a snapshot, which may be a file."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            yield int(match[1]), path


class SnapshotFolder:
    """
    Keeps the last two snapshots. Not thread-safe; one writer at a time.

    Args:
        folder (`Path`): Made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        clean(folder)
        self._folder = folder

    def write(self, snapshot: Snapshot) -> None:
        """
        Write a snapshot, on disk when this returns, and let old ones leave.

        Raises:
            ValueError, TypeError: A group's name is no file name, or the numbers are nothing that JSON holds.
            OSError, safetensors.SafetensorError: The disk refuses.
        """
        make_private(self._folder)
        self.prune()  # first, so that a disk which refuses to remove does not fill up
        number = max((number for number, _ in _numbered(self._folder)), default=0) + 1
        final = self._folder / f"snapshot-{number:06d}"
        temporary = final.with_name(f"{TEMPORARY}{final.name}")
        try:
            _fill(temporary, snapshot)
            temporary.rename(final)
        except BaseException:
            discard(temporary)
            raise
        sync_folder(self._folder)
        self.prune()

    def prune(self, keep: int = _KEEP) -> None:
        """Remove all but the last `keep` snapshots."""
        for _, path in list_snapshots(self._folder)[:-keep]:
            remove_folder(path)


def _fill(folder: Path, snapshot: Snapshot) -> None:
    """Write all files of a snapshot into a new folder, the manifest last, and bring them to disk."""
    numbers = json.dumps(dict(snapshot.numbers)).encode()
    discard(folder)
    folder.mkdir(mode=0o700)
    for group, tensors in snapshot.tensors.items():
        if not _GROUP.fullmatch(group):
            raise ValueError(f"the name of a group must be of letters, digits, '-' and '_', got {group!r}")
        path = folder / f"{group}{_TENSORS}"
        save_file(_separate(tensors), path)
        sync_file(path)
    write_file(folder / _NUMBERS, numbers)
    write_file(folder / _MANIFEST, seal(_manifest(folder)))  # syncs the folder too


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors on the CPU that share no memory, which safetensors would refuse."""
    separate, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return separate


def _manifest(folder: Path) -> dict[str, Any]:
    files = {path.name: {"size": path.stat().st_size, "sha256": digest(path)} for path in sorted(folder.iterdir())}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"format": FORMAT, "hf_osd_version": _version(), "created_at": created, "files": files}


def _version() -> str:
    try:
        return version("hf-osd")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def read_newest_snapshot(folder: Path, only: Collection[str] | None = None) -> Snapshot | None:
    """
    Read the newest intact snapshot; `None` without one. Damaged ones are skipped with a warning.

    Args:
        folder (`Path`): The folder of snapshots, which need not exist.
        only (`Collection[str]`, *optional*): Groups of tensors to read, if they are there. Defaults to all.

    Raises:
        StateError: A snapshot is of another format.
    """
    for _, path in reversed(list_snapshots(folder)):
        try:
            return _read(path, only)
        except DamagedError as error:
            logger.warning("Skipped a damaged snapshot: %s", error)
    return None


def _read(folder: Path, only: Collection[str] | None = None) -> Snapshot:
    files = _read_manifest(folder)["files"]
    groups = [name.removesuffix(_TENSORS) for name in files if name.endswith(_TENSORS)]
    groups = groups if only is None else [group for group in groups if group in only]
    try:
        for name in (_NUMBERS, *(f"{group}{_TENSORS}" for group in groups)):
            _check_file(folder / name, files[name])
        numbers = dict(json.loads((folder / _NUMBERS).read_bytes()))
        return Snapshot({group: _load_group(folder / f"{group}{_TENSORS}") for group in groups}, numbers)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise DamagedError(f"{folder} cannot be read: {error}") from error


def _load_group(path: Path) -> dict[str, torch.Tensor]:
    # Copies: a tensor that is a mapped file changes, or crashes the process, with the file.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_sealed(folder / _MANIFEST)
    except FileNotFoundError as error:
        raise DamagedError(f"{folder} has no {_MANIFEST}") from error
    written = manifest.get("format")
    if not isinstance(written, int) or _NUMBERS not in manifest.get("files", ()):
        raise DamagedError(f"{folder / _MANIFEST} is not the manifest of a snapshot")
    if written != FORMAT:
        other = "update hf_osd" if written > FORMAT else "delete it"
        raise StateError(
            f"{folder} is of format {written}, written by hf_osd {manifest.get('hf_osd_version')}, and this version "
            f"reads format {FORMAT} alone: {other}, or use another state directory"
        )
    return manifest


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if path.stat().st_size != expected["size"] or digest(path) != expected["sha256"]:
        raise DamagedError(f"{path} is not as it was written")


def refuse_other_formats(folder: Path) -> None:
    """
    Check that the intact snapshots of a folder are of this format.

    Raises:
        StateError: One is of another.
    """
    for _, path in list_snapshots(folder):
        try:
            _read_manifest(path)
        except DamagedError:
            continue
