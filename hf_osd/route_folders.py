"""Where routes lie on disk: a folder for each draft, and one for what is known of all of them."""

from pathlib import Path
from urllib.parse import quote

from .errors import StateError
from .storage import Snapshot, read_state, write_state
from .storage.files import remove_folder
from .storage.places import REPLAY, SNAPSHOTS

ROUTER = "router"  # folder inside of a state: which routes there are, and what the router knows


def folder_of(name: str) -> str:
    """Return the name of a route's folder."""
    return f"route-{quote(name, safe='')}"


def saved_routes(state: Path) -> Snapshot | None:
    """Return what is known of the routes that a state is of; `None` for that of a single draft."""
    return read_state(state / ROUTER)[0] if (state / ROUTER).is_dir() else None


def save_routes(state: Path, snapshot: Snapshot | None) -> None:
    """
    Make a state one of routes or, without a snapshot, that of a single draft.

    What is there of drafts stays, and no longer counts: it may be all that somebody has.
    """
    if snapshot is not None:
        write_state(state / ROUTER, snapshot, [])
    elif (state / ROUTER).is_dir():
        remove_folder(state / ROUTER)


def check_directory(state: Path, first: str | None) -> None:
    """
    Refuse a state directory of the other kind: its drafts would begin anew, and leave what it holds behind.

    Args:
        state (`Path`): The directory.
        first (`str`, *optional*): Name of the first route; `None` for a single draft.

    Raises:
        StateError: It is that of a single draft, and there are routes, or the other way round.
    """
    if first is None and (state / ROUTER / SNAPSHOTS).is_dir():
        raise StateError(
            f"{state} holds the drafts of several routes: make the OnlineAssistant with the router or the drafts that "
            "it had, or use another state directory"
        )
    if first is not None and (state / SNAPSHOTS).is_dir():
        raise StateError(
            f"{state} holds the state of a single draft: use another state directory, or move its {SNAPSHOTS} and "
            f"{REPLAY} to {state / folder_of(first)}, and that draft goes on as the first route"
        )
