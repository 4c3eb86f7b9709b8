"""The suites between their options and their files: what is refused before the work, and what is kept after it."""

import errno
import io
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import test_bench
import torch
from rich.console import Console
from test_bench import ABOUT, ODD, TIMES, fail

from benchmarks.suites import command
from benchmarks.suites.__main__ import main
from benchmarks.suites.architecture import llama_config, random_model
from benchmarks.suites.command import SuitesCommand, run_replot
from benchmarks.suites.models import ModelOptions
from benchmarks.suites.results import read_results
from benchmarks.suites.training import load_rows
from hf_osd.bench import command as bench_command
from hf_osd.errors import ConfigError, HfOsdError, InputError, PromptSourceError

options = test_bench.options  # a fixture


def lengths_of(name: str) -> dict[str, Any]:
    """Figures of the suite `lengths` for a stream of that name."""
    found = {"0": TIMES | {"lookup_acceptance": None}}
    stream = {"contenders": found, "total_time_over_best_fixed_length": {"0": 1.0}, "outputs": {"mismatches": []}}
    return {"streams": {name: stream}}


@pytest.mark.parametrize("name", [field.name for field in fields(SuitesCommand)])
@pytest.mark.parametrize("value", [*ODD.values()], ids=[*ODD])
def test_every_option_is_checked_when_it_is_set(name: str, value: Any) -> None:
    """Would catch an option that is added without a rule, and one that fails after a pair was trained for hours."""
    with pytest.raises(ConfigError, match=f"^{name} must be .*, got "):
        SuitesCommand(**{name: value})


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
        SuitesCommand(**options | made | wrong).run(Console(file=io.StringIO()))
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


def test_what_cannot_be_written_is_printed_for_every_suite(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a full disk that takes the figures with it, or the suites after the first."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(bench_command, "write_json", fail(full))
    ran: list[str] = []
    monkeypatch.setitem(command._RUN, "engine", lambda session: ran.append("engine") or {"axes": {}})
    monkeypatch.setitem(command._RUN, "lengths", lambda session: ran.append("lengths") or lengths_of("[/b]"))
    screen = io.StringIO()
    with pytest.raises(ConfigError, match=r"cannot write to .*out' \(No space left on device\)"):
        SuitesCommand(**options, suites=["lengths", "engine"]).run(Console(file=screen, width=160))
    assert ran == ["engine", "lengths"]
    assert "draft lengths: [/b]" in screen.getvalue()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"suites": ["speed"]}, "suites are serving, engine, lengths, promise, got 'speed'"),
        ({"requests": 0}, r"requests must be in \[1, .*, got 0"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be in \[1, .*, got 0"),
        ({"suites": ["promise"], "models": "scripted"}, "models='scripted' says nothing about promise"),
        ({"models": "trained", "target": "x"}, "target='x' means nothing with models='trained'"),
    ],
)
def test_bad_options_are_refused_before_any_work(wrong: dict[str, Any], message: str) -> None:
    """Would catch minutes of measurements before an error that could have come first."""
    with pytest.raises(HfOsdError, match=message):
        SuitesCommand(**wrong)


@pytest.mark.parametrize("text", ["", "[]", '{"suite": "engine"}', '{"suite": "engine", "figures": 1, "about": 2}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    """Would catch a traceback out of matplotlib for a file of something else."""
    (tmp_path / "serving.json").write_text(text)
    with pytest.raises(InputError, match=r"serving\.json: not a result of the suite"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "figures",
    [[1], {"streams": 5}, {"streams": {}}, {"streams": {"a": {}}}, {"streams": {"a": {"contenders": {"b": 1}}}}],
)
def test_a_result_that_cannot_be_drawn_is_named(tmp_path: Path, figures: Any) -> None:
    """Would catch a traceback out of matplotlib for a file that was edited by hand."""
    (tmp_path / "serving.json").write_text(json.dumps({"suite": "serving", "about": ABOUT, "figures": figures}))
    with pytest.raises(InputError, match=r"serving\.json: not figures of the suite serving \("):
        run_replot(tmp_path, Console(file=io.StringIO()))


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "\0"])
def test_a_result_that_cannot_be_parsed_is_named(tmp_path: Path, text: str) -> None:
    """Would catch a RecursionError for a file of brackets."""
    (tmp_path / "serving.json").write_text(text)
    with pytest.raises(InputError, match=r"serving\.json: not a result of the suites \("):
        run_replot(tmp_path, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "suites are serving, engine, lengths, promise, got 'speed'"),
        (["promise", "--models", "scripted"], "models='scripted' says nothing about promise"),
        (["--models", "scripted", "--target-shape", "big"], "a model's shape is HIDDENxLAYERS"),
        (["--prompts", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--replot", "."], "no results of the suites"),
        (["--acceptance", "2"], "acceptance"),
    ],
)
def test_the_command_line_refuses_with_a_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """Would catch a traceback in the developer's face, or files of a run that never was."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("lossless", "code"), [(True, 0), (False, 1)])
def test_the_command_line_passes_every_option_on(monkeypatch: pytest.MonkeyPatch, lossless: bool, code: int) -> None:
    """Would catch an option that gets lost or has another type, and a mismatch that a script cannot see."""
    seen: list[SuitesCommand] = []
    monkeypatch.setattr(SuitesCommand, "run", lambda self: seen.append(self) or lossless)
    words = "serving lengths --prompts a --prompts b --no-compiled --batch 2 --threads 1 --no-plot --train-seconds 2"
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == code
    (found,) = seen
    assert (found.suites, found.prompts, found.compiled) == (("serving", "lengths"), ("a", "b"), False)
    assert (found.batch, found.threads, found.plot, found.train_seconds) == (2, 1, False, 2.0)
    assert found.output == Path("runs/bench")
