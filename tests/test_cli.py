"""The command line: help, version, errors and exit codes."""

import errno
import signal
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hf_osd
from hf_osd.bench.command import BenchCommand
from hf_osd.cli import main
from hf_osd.cli.app import app
from hf_osd.demo.command import DemoCommand
from hf_osd.errors import StateError

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_without_its_extra_the_command_says_what_to_install(missing: str) -> None:
    """Would catch an installation of the library alone whose command ends in a traceback."""
    code = f"import sys; sys.modules[{missing!r}] = None; from hf_osd.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'hf-osd needs {missing}: pip install "hf-osd[cli]"\n'


def test_help_lists_the_command_and_its_options() -> None:
    """Would catch an option that was renamed in the code but not for its users."""
    assert "demo" in runner.invoke(app, ["--help"]).output
    text = runner.invoke(app, ["demo", "--help"]).output
    for option in ("target", "assistant", "prompts", "requests", "max-new-tokens", "draft-length", "update-every"):
        assert f"--{option}" in text
    for option in ("device", "dtype", "seed", "sample", "greedy", "output", "budget-seconds", "threads", "no-plot"):
        assert f"--{option}" in text


def test_help_lists_the_benchmark_and_its_options() -> None:
    """Would catch an option of the benchmark that the command line does not pass on, or names otherwise."""
    assert "bench" in runner.invoke(app, ["--help"]).output
    text = runner.invoke(app, ["bench", "--help"]).output
    for field in fields(BenchCommand):
        assert f"--{field.name.replace('_', '-')}" in text.lower()
    for option in ("--no-plot", "--no-compiled"):
        assert option in text


def test_version_is_the_one_installed() -> None:
    """Would catch a version written down twice."""
    try:
        installed = version("hf-osd")
    except PackageNotFoundError:
        pytest.skip("hf-osd runs from its sources here, without being installed")
    assert installed == hf_osd.__version__
    assert runner.invoke(app, ["--version"]).output == f"hf-osd {installed}\n"


def test_the_command_line_loads_without_what_the_demo_needs() -> None:
    """Would catch an import that makes `hf-osd --help` take seconds."""
    code = "import sys, hf_osd.cli; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"hf_osd.bench", "hf_osd.demo", "hf_osd.evaluation", "datasets", "matplotlib", "trl"} & set(modules)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--assistant", "somewhere"], 2, "an assistant needs its target"),
        (["--prompts", "missing.jsonl"], 2, "missing.jsonl: cannot be read"),
        (["--prompts", "p.txt", "--target", "no/such/model", "--assistant", "x"], 2, "cannot load 'no/such/model'"),
        (["--prompts", "p.txt", "--device", "abacus"], 2, "device must be a torch device"),
        (["--prompts", "p.txt", "--dtype", "int64"], 2, "dtype must be 'auto' or a floating torch dtype"),
        (["--requests", "0"], 2, "requests"),
        (["--frobnicate"], 2, "frobnicate"),
    ],
)
def test_bad_options_are_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    """Would catch a traceback in the user's face, or a run of minutes that ends in one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("hello\n")
    if "--prompts" not in arguments:
        arguments = [*arguments, "--prompts", "p.txt"]
    result = runner.invoke(app, ["demo", *arguments])
    assert result.exit_code == code
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--assistant", "somewhere"], "an assistant needs its target"),
        (["--batch", "0"], "batch"),
    ],
)
def test_bad_options_of_the_benchmark_are_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """Would catch a traceback in the user's face, or files of a run that never was."""
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("lossless", "code"), [(True, 0), (False, 1)])
def test_the_benchmark_exits_with_what_it_found(monkeypatch: pytest.MonkeyPatch, lossless: bool, code: int) -> None:
    """Would catch a mismatch that a script around the benchmark cannot see, and repeated options that get lost."""
    seen: dict[str, Any] = {}

    def run(self: BenchCommand) -> bool:
        seen.update(prompts=self.prompts, compiled=self.compiled)
        return lossless

    monkeypatch.setattr(BenchCommand, "run", run)
    result = runner.invoke(app, ["bench", "--prompts", "a", "--prompts", "b", "--no-compiled"])
    assert result.exit_code == code
    assert seen == {"prompts": ("a", "b"), "compiled": False}


@pytest.mark.parametrize(("lossless", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_outputs_were_the_targets_own(
    monkeypatch: pytest.MonkeyPatch, lossless: bool, code: int
) -> None:
    """Would catch a mismatch that a script around the demo cannot see."""
    seen: dict[str, Any] = {}

    def run(self: DemoCommand) -> bool:
        seen.update(requests=self.requests, sample=self.sample, prompts=self.prompts)
        return lossless

    monkeypatch.setattr(DemoCommand, "run", run)
    result = runner.invoke(app, ["demo", "--requests", "3", "--sample", "--prompts", "x.txt"])
    assert result.exit_code == code
    assert seen == {"requests": 3, "sample": True, "prompts": "x.txt"}


def test_a_missing_plotting_package_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch minutes of measurements being lost to an import error at their end."""
    monkeypatch.setattr("hf_osd.evaluation.output.find_spec", lambda name: None)
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 2
    assert "pip install 'hf-osd[demo]'" in result.output


@pytest.mark.parametrize("command", ["demo", "bench"])
@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_folder_is_not_the_current_one(command: str, name: str) -> None:
    """Would catch `--output "$UNSET"`, which would write wherever the shell happens to be."""
    result = runner.invoke(app, [command, "--output", name])
    assert result.exit_code == 2
    assert "a folder's name is not empty" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "9" * 23],
        ["--seed", "9" * 5000],
        ["--seed", "1e3"],
        ["--threads", "99999"],
        ["--threads", "-1"],
        ["--requests", "1" + "0" * 30],
        ["--max-new-tokens", "1" + "0" * 9],
        ["--draft-length", "1" + "0" * 20],
        ["--update-every", "1" + "0" * 30],
        ["--budget-seconds", "nan"],
        ["--budget-seconds", "inf"],
        ["--budget-seconds", "1e999"],
        ["--device", "cuda:99"],
        ["--device", "meta"],
        ["--device", ""],
        ["--dtype", "float8_e5m2"],
        ["--prompts", ""],
        ["--prompts", "a:b:c:d"],
        ["--prompts", "/dev/zero"],
        ["--prompts", "x" * 5000 + ".txt"],
        ["--target", "", "--assistant", ""],
        ["--target", "p.txt", "--assistant", "p.txt"],
        ["--output", "p.txt/sub"],
        ["--output", "x" * 300],
        ["[/b]"],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_whatever_is_typed_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Would catch a traceback, a crash of torch, or a run of minutes, for values that no run can have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "p.txt").write_text("hello\n")
    prompts = [] if "--prompts" in arguments else ["--prompts", "p.txt"]
    result = runner.invoke(app, ["demo", "--no-plot", *prompts, *arguments])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "rror" in result.output
    assert sorted(tmp_path.iterdir()) == [tmp_path / "p.txt"]


ENDS = {
    "an error of ours": (StateError("the state\nis gone"), 2, "Error: the state is gone"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), 2, "Error: [Errno 28] No space left on device"),
    "no memory": (MemoryError("of 3 GiB"), 2, "Error: of 3 GiB"),
    "no memory of torch": (RuntimeError("CUDA out of memory. Tried"), 2, "Error: CUDA out of memory. Tried"),
    "ctrl-c": (KeyboardInterrupt(), 130, "Interrupted."),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("command", [DemoCommand, BenchCommand])
def test_what_ends_a_run_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, command: type, end: str) -> None:
    """Would catch a traceback for a full disk or for Ctrl-C, and an exit code that says something else."""
    error, code, line = ENDS[end]
    monkeypatch.setattr(command, "run", failing(error))
    result = runner.invoke(app, [command.__name__.removesuffix("Command").lower()])
    assert (result.exit_code, result.output) == (code, f"{line}\n")


def failing(error: BaseException) -> Any:
    def run(self: object) -> None:
        raise error

    return run


@pytest.mark.parametrize("error", [RuntimeError("a bug"), AssertionError(), TypeError("another")], ids=repr)
def test_a_bug_is_not_taken_for_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Would catch errors of ours that are swallowed: their tracebacks are what a report needs."""
    monkeypatch.setattr(DemoCommand, "run", failing(error))
    assert runner.invoke(app, ["demo"]).exception is error


def test_names_that_the_terminal_cannot_print_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a UnicodeEncodeError at the end of a run whose folder has a name of other bytes than UTF-8."""
    streams = [TextIOWrapper(BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    monkeypatch.setattr("hf_osd.cli.app.app", lambda: print("\udcff\u65e5", end="", flush=True))  # noqa: T201
    main()
    assert streams[0].buffer.getvalue() == rb"\udcff\u65e5"  # type: ignore[attr-defined]


def test_ctrl_c_ends_a_real_run(tmp_path: Path) -> None:
    """Would catch an interrupt that the command-line library turns into exit code 1, which means a wrong output."""
    code = "from hf_osd.cli import main; from hf_osd.demo import command; import time\n"
    code += "def wait(*_): print('ready', flush=True); time.sleep(60)\n"
    code += "command.load_prompts = wait; import sys; sys.argv = ['hf-osd', 'demo', '--no-plot']; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "Interrupted.\n")
