"""What lies in the places of a state directory and is not its own: links, pipes, files of others, rights of others."""

import contextlib
import os
import shutil
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stored import NEVER, Learner, Warnings, count_of, nothing, numbers, observation, snapshot

from hf_osd.errors import StateError
from hf_osd.storage import StateDirectory, read_state, write_state
from hf_osd.storage.files import TEMPORARY, write_file
from hf_osd.storage.lock import DirectoryLock
from hf_osd.storage.store import Store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")

SHARD = "replay/replay-000000000099-000000000099-0123456789abcdef.parquet"
PLACES = [
    ".lock",
    "replay",
    "snapshots",
    SHARD,
    "snapshots/snapshot-000001",
    "snapshots/snapshot-000009",
    "snapshots/snapshot-000002/numbers.json",
    "snapshots/snapshot-000002/weights.safetensors",
    f"{TEMPORARY}abc",
    f"replay/{TEMPORARY}{Path(SHARD).name}",
    f"snapshots/{TEMPORARY}snapshot-000003",
]


class Precious:
    """A folder of somebody else, with the names that a state directory would write to or remove."""

    def __init__(self, path: Path) -> None:
        self.path = Path(shutil.copytree(path, path.with_name("precious")))
        (self.path / "file").write_text("keep me")
        self._before = self._content()

    def _content(self) -> dict[Path, tuple[int, bytes | None]]:
        paths = [self.path, *sorted(self.path.rglob("*"))]
        return {path: (path.stat().st_mode, path.read_bytes() if path.is_file() else None) for path in paths}

    def is_untouched(self) -> bool:
        return self._content() == self._before


def put_link(place: Path, target: Path) -> None:
    """Put a link in a place, whatever is there."""
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


@pytest.mark.parametrize("target", ["file", "folder", "nothing", "itself"])
@pytest.mark.parametrize("place", PLACES)
def test_a_link_is_refused_at_the_start(copied: Callable[[], Path], place: str, target: str) -> None:
    """Catches any link through which something of somebody else would be overwritten, emptied or removed."""
    path = copied()
    precious = Precious(path)
    where = {"file": "file", "folder": "snapshots", "nothing": "nothing"}
    put_link(path / place, path if target == "itself" else precious.path / where[target])
    for use in (lambda p: StateDirectory(p, collect=nothing), lambda p: write_state(p, snapshot(3), [observation(1)])):
        with pytest.raises(StateError, match=f"{path / place} is a link"):
            use(path)
    assert precious.is_untouched()
    assert (path / place).is_symlink()  # it may be wanted there
    (path / place).unlink()
    StateDirectory(path, collect=nothing).close()  # the refusal left no lock
    assert precious.is_untouched()


@pytest.mark.parametrize("target", ["file", "folder"])
@pytest.mark.parametrize("place", PLACES)
def test_a_link_that_comes_later_is_not_followed(copied: Callable[[], Path], place: str, target: str) -> None:
    """Catches checks at the start alone: a link that is put in place while the directory is in use."""
    path = copied()
    precious = Precious(path)
    folder = place if place in ("replay", "snapshots") else "snapshots/snapshot-000002"
    learner = Learner()
    state = StateDirectory(path, collect=learner.collect, flush_seconds=NEVER, max_bytes=60_000)
    put_link(path / place, precious.path / (folder if target == "folder" else "file"))
    for learner.count in range(15, 20):  # with a merge, and old files that leave
        state.add(observation(learner.count))
        with contextlib.suppress(StateError):
            state.flush()
    state.close()
    assert precious.is_untouched()


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "second name"])
def test_temporary_names_are_not_followed(kind: str, tmp_path: Path) -> None:
    """Catches a temporary name, which anybody can guess, that is opened as it lies there: a link, or a pipe."""
    precious, place = tmp_path / "precious", tmp_path / f"{TEMPORARY}new"
    precious.write_text("keep me")
    {
        "link": lambda: place.symlink_to(precious),
        "folder": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
        "second name": lambda: place.hardlink_to(precious),
    }[kind]()
    (tmp_path / "new").symlink_to(precious)
    in_time(lambda: write_file(tmp_path / "new", b"content"))
    assert precious.read_text() == "keep me"
    assert not (tmp_path / "new").is_symlink()
    assert (tmp_path / "new").read_bytes() == b"content"
    assert not place.exists()


def in_time(work: Callable[[], object]) -> None:
    """Do something that may wait for ever."""
    done = threading.Event()
    threading.Thread(target=lambda: (work(), done.set()), daemon=True).start()
    assert done.wait(20.0), "it waits"


# What is no trouble.


def test_the_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    """Catches a refusal of what the user has named: a place on another disk, say."""
    (tmp_path / "disk").mkdir(0o700)
    (tmp_path / "state").symlink_to(tmp_path / "disk")
    with StateDirectory(tmp_path / "state", collect=nothing, flush_seconds=NEVER) as state:
        state.add(observation(0))
        state.flush()
        with pytest.raises(StateError, match="in use"):
            StateDirectory(tmp_path / "disk", collect=nothing)
    assert numbers(read_state(tmp_path / "disk")[1]) == [0]
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with pytest.raises(StateError, match="it is a link to nothing"):
        StateDirectory(tmp_path / "nowhere", collect=nothing)


def test_links_of_other_names_stay(copied: Callable[[], Path]) -> None:
    """Catches a directory that cannot be used for a link which is none of its business, and such a link removed."""
    path = copied()
    precious = Precious(path)
    links = [path / "notes", path / "replay/other.parquet", path / "snapshots/best", path / "snapshots/snapshot-old"]
    for link in links:
        link.symlink_to(precious.path / "snapshots")
    with StateDirectory(path, collect=nothing, flush_seconds=NEVER) as state:
        state.add(observation(15))
        state.flush()
        assert numbers(state.load()[1]) == list(range(16))
    assert all(link.is_symlink() for link in links)
    assert precious.is_untouched()


def test_a_state_is_read_through_links(copied: Callable[[], Path], tmp_path: Path) -> None:
    """Catches a saved draft that cannot be loaded from a cache, where files are links to what was downloaded."""
    path, cache = copied(), tmp_path / "cache"
    for file in path.rglob("*"):
        if file.is_file():
            (cache / file.relative_to(path)).parent.mkdir(parents=True, exist_ok=True)
            (cache / file.relative_to(path)).symlink_to(file)
    found, loaded = read_state(cache)
    assert (count_of(found), numbers(loaded)) == (2, list(range(15)))


def test_a_file_in_the_way_of_the_next_snapshot(copied: Callable[[], Path]) -> None:
    """Catches snapshots that are never written again once they would get the name of a file."""
    path = copied()
    (path / "snapshots/snapshot-000003").write_text("mine")
    with StateDirectory(path, collect=nothing, flush_seconds=NEVER) as state:
        state.save(snapshot(7))
        state.flush()
        assert count_of(state.load()[0]) == 7
    assert (path / "snapshots/snapshot-000003").read_text() == "mine"


# The lock.


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))  # a short name: sockets have no longer ones


KINDS: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "socket": make_socket,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_that_is_no_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start that waits for the other end of a pipe, and a lock on something that cannot be one."""
    monkeypatch.chdir(tmp_path)
    KINDS[kind](tmp_path / ".lock")

    def start() -> None:
        with pytest.raises(StateError, match=r"\.lock is not a file: remove it"):
            StateDirectory(tmp_path, collect=nothing)

    in_time(start)


@pytest.mark.parametrize("content", ["keep me", "12 monkeys", "1" * 40, " 7", "\n"])
def test_the_lock_keeps_the_content_of_others(content: str, tmp_path: Path) -> None:
    """Catches a number that is written over the content of a file which another program calls `.lock`."""
    (tmp_path / ".lock").write_text(content)
    with StateDirectory(tmp_path, collect=nothing):
        with pytest.raises(StateError, match="in use by process unknown"):
            StateDirectory(tmp_path, collect=nothing)
        assert (tmp_path / ".lock").read_text() == content
    assert (tmp_path / ".lock").read_text() == content


def test_a_lock_with_a_second_name(tmp_path: Path) -> None:
    """Catches a number that is written to a file which has another name elsewhere; it locks all the same."""
    state = tmp_path / "state"
    state.mkdir(0o700)
    for content in ("", "keep me", "123"):
        (tmp_path / "precious").write_text(content)
        (state / ".lock").hardlink_to(tmp_path / "precious")
        with StateDirectory(state, collect=nothing), pytest.raises(StateError, match="in use"):
            StateDirectory(state, collect=nothing)
        assert (tmp_path / "precious").read_text() == content
        (state / ".lock").unlink()


def test_the_lock_says_who_holds_it(tmp_path: Path) -> None:
    """Catches the number of an earlier process that stays, or shines through behind a shorter one."""
    (tmp_path / ".lock").write_text("9" * 20)
    with StateDirectory(tmp_path, collect=nothing):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_lock_is_not_renewed_through_a_link(tmp_path: Path) -> None:
    """Catches a lock file that is moved away and linked to, so that another may take its place unseen."""
    lock = DirectoryLock(tmp_path)
    (tmp_path / ".lock").rename(tmp_path / "moved")
    (tmp_path / ".lock").symlink_to(tmp_path / "moved")
    with pytest.raises(StateError, match="is a link"):
        lock.renew()
    lock.release()


# Folders.


@pytest.mark.parametrize("name", ["replay", "snapshots"])
@pytest.mark.parametrize("kind", ["file", "pipe", "socket"])
def test_a_folder_that_is_none(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that finds out at each flush, and tells its log alone, that it can keep nothing."""
    monkeypatch.chdir(tmp_path)
    {**KINDS, "file": lambda path: path.write_text("keep me")}[kind](tmp_path / name)
    for use in (lambda: StateDirectory(tmp_path, collect=nothing), lambda: write_state(tmp_path, snapshot(1), [])):
        with pytest.raises(StateError, match=f"{tmp_path / name} is not a folder: remove it"):
            use()
    (tmp_path / name).unlink()
    StateDirectory(tmp_path, collect=nothing).close()


@contextlib.contextmanager
def ordinary_user(*paths: Path) -> Iterator[None]:
    """Nothing may be done against the mode of a file in here. Paths are given to that user first."""
    if os.geteuid() != 0:
        yield
        return
    for path in paths:
        for one in [path, *path.rglob("*")]:
            os.chown(one, 65534, -1)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o500, 0o600])
@pytest.mark.parametrize("name", [".", "replay", "snapshots"])
def test_a_folder_without_rights(aged: Path, name: str, mode: int) -> None:
    """Catches folders that cannot be read or written to, which are found out at the first flush or never."""
    with tempfile.TemporaryDirectory() as top:  # where an ordinary user may go
        path = Path(shutil.copytree(aged, Path(top) / "state"))
        (path / name).chmod(mode)
        with ordinary_user(Path(top)):
            with pytest.raises(StateError, match="cannot be used"):
                StateDirectory(path, collect=nothing)
            (path / name).chmod(0o700)
            with StateDirectory(path, collect=nothing) as state:
                assert numbers(state.load()[1]) == list(range(15))


def test_pipes_under_the_names_of_a_state(copied: Callable[[], Path]) -> None:
    """Catches a reader that waits for the other end of a pipe, for ever."""
    path = copied()
    os.mkfifo(path / SHARD)
    manifest = path / "snapshots/snapshot-000002/manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    found: list[object] = []

    def use() -> None:
        found.append(read_state(path))
        with StateDirectory(path, collect=nothing, flush_seconds=NEVER) as state:
            state.flush()
            found.append(state.load())

    in_time(use)
    for snapshot_found, loaded in found:  # type: ignore[misc]
        assert (count_of(snapshot_found), numbers(loaded)) == (1, list(range(15)))


@pytest.mark.parametrize("path", ["", ".", "./", "./."])
def test_the_current_folder_is_no_state_directory(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an empty setting that fills the folder where the server was started."""
    monkeypatch.chdir(tmp_path)
    for use in (lambda: StateDirectory(path, collect=nothing), lambda: Store(Path(path))):
        with pytest.raises(StateError, match="a folder of its own"):
            use()
    assert list(tmp_path.iterdir()) == []


# Rights of others.


@pytest.mark.parametrize(
    ("name", "mode", "warns"),
    [
        (".", 0o700, False),
        (".", 0o755, False),
        (".", 0o775, True),
        (".", 0o777, True),
        (".", 0o707, True),
        (".", 0o702, True),
        (".", 0o1777, False),
        ("replay", 0o777, True),
        ("snapshots", 0o770, True),
        ("replay", 0o750, False),
    ],
)
def test_rights_of_others_are_said_once(copied: Callable[[], Path], name: str, mode: int, warns: bool) -> None:
    """Catches a draft that learns what other users of the machine want, without a word, or with one at each flush."""
    path = copied()
    (path / name).chmod(mode)
    warnings = Warnings()
    with StateDirectory(path, collect=nothing, flush_seconds=NEVER) as state:
        for number in range(15, 18):
            state.add(observation(number))
            state.flush()
    said = [message for message in warnings.messages if "Others may change" in message]
    assert len(said) == warns
    assert all(f"chmod 700 {path / name}" in message for message in said)
    assert stat.S_IMODE((path / name).stat().st_mode) == mode  # which is the user's to change


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root gives files away")
def test_a_directory_of_somebody_else(copied: Callable[[], Path]) -> None:
    """Catches silence about an owner who may change the mode at any time."""
    path, warnings = copied(), Warnings()
    os.chown(path, 65534, -1)
    StateDirectory(path, collect=nothing).close()
    said = [message for message in warnings.messages if "belongs to user 65534" in message]
    assert len(said) == 1
