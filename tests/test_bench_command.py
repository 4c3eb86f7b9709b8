"""The benchmark between its options and its files: what is refused before the work, and what is kept after it."""

import errno
import io
import json
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_demo_runner import make_model, make_tokenizer

from benchmarks.suites.architecture import llama_config, random_model
from benchmarks.suites.models import ModelOptions
from benchmarks.suites.training import load_rows
from hf_osd.bench import command as bench_command
from hf_osd.bench.command import BenchCommand, run_replot, try_compiling
from hf_osd.bench.plots import write_plot
from hf_osd.errors import ConfigError, InputError, PromptSourceError
from hf_osd.evaluation.streams import load_prompt_streams

TIMES = {"ms_per_token": 1.0, "total_seconds": 1.0, "engine_efficiency": 0.9, "acceptance": 0.5}
ABOUT = {
    "models": {"kind": "given", "parameters": {"target": 1, "draft": 1}, "dtype": "float32"},
    "machine": {"processor": "a $\\frac"},
    "threads": 1,
}

ODD = {"object": object(), "nan": math.nan, "bytes": b"x", "empty": "", "number": [3], "empty text": [""]}


def fail(error: BaseException) -> Any:
    def failing(*arguments: Any, **options: Any) -> None:
        raise error

    return failing


def lengths_of(name: str) -> dict[str, Any]:
    """Figures of the suite `lengths` for a stream of that name."""
    found = {"0": TIMES | {"lookup_acceptance": None}}
    stream = {"contenders": found, "total_time_over_best_fixed_length": {"0": 1.0}, "outputs": {"mismatches": []}}
    return {"streams": {name: stream}}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A tiny pair, a file of prompts and a folder, as options."""
    for name, model in (("target", make_model(2, seed=1)), ("draft", make_model(1, seed=2))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    return {
        "target": str(tmp_path / "target"), "assistant": str(tmp_path / "draft"), "prompts": [str(tmp_path / "p.txt")],
        "requests": 2, "max_new_tokens": 4, "device": "cpu", "output": tmp_path / "out", "plot": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(BenchCommand)])
@pytest.mark.parametrize("value", [*ODD.values()], ids=[*ODD])
def test_every_option_is_checked_when_it_is_set(name: str, value: Any) -> None:
    """Would catch an option that is added without a rule, and one that fails after a pair was trained for hours."""
    with pytest.raises(ConfigError, match=f"^{name} must be .*, got "):
        BenchCommand(**{name: value})


@pytest.mark.parametrize(
    "shape", ["9" * 5000 + "x1", "16x999999999", "999999984x2", "٤x٢", "16x-1", "16x1x1", "16x1\n"]
)
def test_a_shape_beyond_any_model_is_refused_at_once(shape: str) -> None:
    """Would catch a model of a billion layers being made, one by one."""
    with pytest.raises(ConfigError, match="a model's shape is HIDDENxLAYERS"):
        ModelOptions(models="scripted", target_shape=shape)


def test_a_model_larger_than_the_memory_is_refused() -> None:
    """Would catch a process that the system ends without a word, in the middle of drawing weights."""
    with pytest.raises(
        ConfigError, match=r"a model of shape 65536x64 with 99 tokens has no room on cpu: it needs .* GiB"
    ):
        random_model(llama_config("65536x64", 99), torch.device("cpu"), torch.float32, seed=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocabulary": 8}, "vocabulary must be at least 4096, the prompts' tokens, got 8"),
        ({"models": "trained", "dtype": "int8"}, "dtype must be 'auto' or a floating torch dtype"),
        ({"models": "trained", "device": "meta"}, "device must be a torch device that computes here"),
        ({"models": "trained", "train_prompts": ["empty.jsonl"]}, "empty.jsonl: no prompts and responses in it"),
    ],
)
def test_a_pair_that_cannot_be_made_is_refused_before_it_is_trained(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    """Would catch a dtype that is only looked at when the training has ended, and a division by zero rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.setattr("benchmarks.suites.models.train", fail(AssertionError("too late")))
    made = {"models": "scripted", "target": None, "assistant": None, "target_shape": "32x1", "draft_shape": "16x1"}
    with pytest.raises((ConfigError, PromptSourceError), match=message):
        BenchCommand(**options | made | wrong).run(Console(file=io.StringIO()))
    assert not options["output"].exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "response": "\\ud800"}', r"line 1: '\\ud800' is half of a character"),
        ('{"prompt": 1, "response": 2}', r"line 1: expected an object with 'prompt' and 'response', two "),
        ('\n["prompt", "response"]', "line 2: expected an object with"),
        ("[" * 100_000, "line 1: JSON that cannot be read"),
        ('{"prompt": "a", "response": ' + "9" * 5000 + "}", "line 1: JSON that cannot be read"),
        ("\n\n", "no prompts and responses in it"),
    ],
)  # fmt: skip
def test_a_file_to_train_on_is_read_like_one_of_prompts(tmp_path: Path, content: str, message: str) -> None:
    """Would catch two readers of JSON lines, one of which takes U+2028 for an end and a number for a text."""
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(PromptSourceError, match=message):
        load_rows([str(path)])
    path.write_text('{"prompt": "a\u2028b", "response": "c\u0085d"}\n', encoding="utf-8")
    assert load_rows([str(path)]) == [("a\u2028b", "c\u0085d")]


def test_without_a_compiler_nothing_is_measured(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a run that measures all contenders but the last, which needs a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function: fail(RuntimeError("No working\nC++ compiler found")))
    monkeypatch.setattr(bench_command, "open_models", fail(AssertionError("too late")))
    with pytest.raises(ConfigError, match="nothing can be compiled here: No working C\\+\\+ compiler found"):
        BenchCommand(**options, compiled=True).run(Console(file=io.StringIO()))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    try_compiling("cpu")


def test_what_cannot_be_written_is_printed_for_every_suite(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a full disk that takes the figures with it, or the suites after the first."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(bench_command, "write_result", fail(full))
    ran: list[str] = []
    monkeypatch.setitem(bench_command._RUN, "engine", lambda session: ran.append("engine") or {"axes": {}})
    monkeypatch.setitem(bench_command._RUN, "lengths", lambda session: ran.append("lengths") or lengths_of("[/b]"))
    screen = io.StringIO()
    with pytest.raises(ConfigError, match=r"cannot write to .*out' \(No space left on device\)"):
        BenchCommand(**options, suites=["lengths", "engine"]).run(Console(file=screen, width=160))
    assert ran == ["engine", "lengths"]
    assert "draft lengths: [/b]" in screen.getvalue()


def test_the_output_is_tried_before_anything_is_loaded(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a pair that is trained for hours, and whose figures have no place to go."""
    options["output"].write_text("x")
    monkeypatch.setattr(bench_command, "load_prompt_streams", fail(AssertionError("too late")))
    with pytest.raises(ConfigError, match="cannot write to"):
        BenchCommand(**options).run(Console(file=io.StringIO()))


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("name", ["$\\frac{", "[/b]", "日本", "a$b$c"])
def test_names_of_files_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    """Would catch a dollar in a file's name that is taken for mathematics, at the end of a run."""
    document = {"suite": "lengths", "about": ABOUT, "figures": lengths_of(name)}
    assert write_plot(document, tmp_path / "lengths.png").stat().st_size > 0


def test_names_that_no_terminal_can_print_are_written_out(tmp_path: Path) -> None:
    """Would catch a name of bytes that are no UTF-8, which neither matplotlib nor a JSON file takes."""
    path = tmp_path / os.fsdecode(b"p\xff.txt")
    path.write_text("hello\n")
    assert [*load_prompt_streams([str(path)], 1)] == ["p\\udcff"]


def test_names_of_folders_alone_are_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an error about an empty name where two sources have none, such as `.` and `/`."""
    monkeypatch.setattr("hf_osd.evaluation.streams.load_prompts", lambda source, count: [source])
    assert len(load_prompt_streams([".", "/", ".."], 1)) == 3


@pytest.mark.parametrize(
    "figures",
    [[1], {"streams": 5}, {"streams": {}}, {"streams": {"a": {}}}, {"streams": {"a": {"contenders": {"b": 1}}}}],
)
def test_a_result_that_cannot_be_drawn_is_named(tmp_path: Path, figures: Any) -> None:
    """Would catch a traceback out of matplotlib for a file that was edited by hand."""
    (tmp_path / "serving.json").write_text(json.dumps({"suite": "serving", "about": ABOUT, "figures": figures}))
    with pytest.raises(InputError, match=r"serving\.json: not figures of hf-osd bench serving \("):
        run_replot(tmp_path, Console(file=io.StringIO()))


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "\0"])
def test_a_result_that_cannot_be_parsed_is_named(tmp_path: Path, text: str) -> None:
    """Would catch a RecursionError for a file of brackets."""
    (tmp_path / "serving.json").write_text(text)
    with pytest.raises(InputError, match=r"serving\.json: not a result of hf-osd bench \("):
        run_replot(tmp_path, Console(file=io.StringIO()))
