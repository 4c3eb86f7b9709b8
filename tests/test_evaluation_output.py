"""The folder of a run: tried before the work, left as it was, and named when it fails."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from hf_osd.errors import ConfigError
from hf_osd.evaluation import output
from hf_osd.evaluation.output import try_output, writing


@pytest.mark.parametrize("there", ["", "a", "a/b"])
def test_trying_leaves_everything_as_it_was(tmp_path: Path, there: str) -> None:
    """Catches folders, or a file in them, of a run that was refused."""
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    try_output(tmp_path / "a" / "b")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_in_the_folder_stays(tmp_path: Path) -> None:
    """Catches a trial that clears the results of an earlier run."""
    (tmp_path / "old.json").write_text("{}")
    try_output(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """Catches hours of measurements that have no place to go."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "file/sub", "file/sub/deeper", "loop/sub", "x" * 300, "new/" + "x" * 300):
        with pytest.raises(ConfigError, match=r"cannot write to '.*' \(.+\): choose another output folder"):
            try_output(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a read-only folder, which can be made and not be used; root may write everywhere, so it is played."""

    def refuse(**_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(output, "NamedTemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"cannot write to '.*new' \(Permission denied\): choose another"):
        try_output(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_only_the_file_system_is_blamed(tmp_path: Path) -> None:
    """Catches a bug of ours that is told as a full disk."""
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(ConfigError, match="No space left on device"), writing(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
