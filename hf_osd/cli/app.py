"""The commands and their options. Each imports what it runs only when it runs, so that `--help` answers at once."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import HfOsdError, is_out_of_memory

app = typer.Typer(
    name="hf-osd",
    help="Online speculative decoding: the target's exact output, from a draft that learns while it serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _folder(name: str | Path) -> Path:
    """Refuse an empty name, such as an unset variable of the shell: as a path, it would be the current folder."""
    if not str(name).strip():
        raise typer.BadParameter("a folder's name is not empty")
    return Path(name)


_Target = Annotated[
    str | None,
    typer.Option(help="Hub id, folder or GGUF file of the target; a pair of its own if left out.", show_default=False),
]
_Assistant = Annotated[
    str | None,
    typer.Option(help="Hub id or folder of the draft; made of the target if left out.", show_default=False),
]
_Embedded = Annotated[
    bool, typer.Option("--embedded", help="Serve the tiny embedded pair, even where SmolLM2 is on this machine.")
]
_Prompts = Annotated[
    str | None,
    typer.Option(
        help="A .jsonl, .json or .txt file, or a datasets id (id:config:split); docstrings of the running Python's "
        "standard library if left out.",
        show_default=False,
    ),
]
_Requests = Annotated[int, typer.Option(min=1, help="Requests to serve.")]
_MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
_DraftLength = Annotated[int, typer.Option(min=1, help="Tokens to draft before each pass of the target, at most.")]
_UpdateEvery = Annotated[int, typer.Option(min=1, help="Requests between two updates of the online draft.")]
_Sample = Annotated[bool, typer.Option("--sample/--greedy", help="Sample, or decode greedily and compare outputs.")]
_Seed = Annotated[int, typer.Option(help="Seed of sampling and of learning.")]
_Device = Annotated[str, typer.Option(help="A torch device; auto takes an accelerator where there is one.")]
_Dtype = Annotated[
    str, typer.Option(help="A torch dtype; auto is the checkpoint's, or float32 on a CPU slower in half precision.")
]
_Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads of torch; 1 for the embedded pair if left out.", show_default=False),
]
_Budget = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Start no request after so many seconds; 300 for the demo's own pairs if left out.",
        show_default=False,
    ),
]
_Output = Annotated[Path, typer.Option(parser=_folder, metavar="FOLDER", help="Folder for the JSON and the plot.")]
_Plot = Annotated[bool, typer.Option("--plot/--no-plot", help="Draw a PNG (needs matplotlib).")]

_Streams = Annotated[
    list[str] | None,
    typer.Option(
        help="A stream: a .jsonl, .json or .txt file, or a datasets id; repeat for more. Docstrings of the running "
        "Python's standard library if left out.",
        show_default=False,
    ),
]
_StreamRequests = Annotated[int, typer.Option(min=1, help="Requests of each stream.")]
_Compiled = Annotated[
    bool | None,
    typer.Option(
        "--compiled/--no-compiled",
        help="Measure plain decoding with transformers' static cache and torch.compile too; on CUDA if left out.",
        show_default=False,
    ),
]
_Batch = Annotated[int, typer.Option(min=1, help="Prompts of each request.")]
_VerifiedTarget = Annotated[
    str | None,
    typer.Argument(help="Hub id or folder of the target; the embedded pair if left out.", show_default=False),
]
_VerifiedRequests = Annotated[int, typer.Option(min=1, help="Prompts to answer.")]
_Dtypes = Annotated[
    list[str] | None,
    typer.Option(
        help="A torch dtype to decode in; repeat for more. auto, if left out: the checkpoint's, or float32 on a CPU "
        "slower in half precision.",
        show_default=False,
    ),
]
_DesignedFor = Annotated[str, typer.Argument(help="Hub id or folder of the target.", show_default=False)]
_DesignPrompts = Annotated[
    list[str] | None,
    typer.Option(
        help="Prompts like those to be served: a .jsonl file of prompt and maybe response, a .json or .txt file, a "
        "datasets id, or a document in .md; stdlib for documented functions of the standard library; target for "
        "prompts that the target writes itself; repeat for more. These last two if left out.",
        show_default=False,
    ),
]
_Texts = Annotated[int, typer.Option(min=1, help="Texts to record, at most.")]
_Candidates = Annotated[
    list[str] | None,
    typer.Option(
        "--candidates",
        help="Draft to consider, such as 1-layer, where it is going to serve on another machine; repeat for more. All "
        "if left out.",
        show_default=False,
    ),
]
_Minutes = Annotated[float, typer.Option(min=0.001, help="Time to distil, beside that of recording.")]
_DesignOutput = Annotated[
    Path, typer.Option(parser=_folder, metavar="FOLDER", help="Folder for the draft.", show_default=False)
]
_JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.", show_default=False)
]


def main() -> None:
    """Run `hf-osd`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files need not fit into the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-osd {version('hf-osd')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Online speculative decoding: the target's exact output, from a draft that learns while it serves."""


@app.command()
def demo(
    target: _Target = None,
    assistant: _Assistant = None,
    embedded: _Embedded = False,
    prompts: _Prompts = None,
    requests: _Requests = 160,
    max_new_tokens: _MaxNewTokens = 48,
    draft_length: _DraftLength = 8,
    update_every: _UpdateEvery = 8,
    sample: _Sample = False,
    seed: _Seed = 0,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    threads: _Threads = None,
    budget_seconds: _Budget = None,
    output: _Output = Path("runs"),
    plot: _Plot = True,
) -> None:
    """
    Serve real prompts by plain decoding, transformers' assistance, and a static and an online draft.

    Exits with 1 if any greedy output of hf_osd is not the target's own, and with 2 if the run cannot start.
    """
    options: dict[str, Any] = dict(locals())
    with _errors():
        from ..demo.command import DemoCommand

        lossless = DemoCommand(**options).run()
    raise typer.Exit(code=0 if lossless else 1)


@app.command()
def bench(
    target: _Target = None,
    assistant: _Assistant = None,
    prompts: _Streams = None,
    requests: _StreamRequests = 32,
    max_new_tokens: _MaxNewTokens = 64,
    compiled: _Compiled = None,
    batch: _Batch = 1,
    seed: _Seed = 0,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    threads: _Threads = None,
    output: _Output = Path("runs/bench"),
    plot: _Plot = True,
) -> None:
    """
    Measure every way to decode on your models and prompts: plain, transformers' assisted and lookup, and hf_osd's.

    Exits with 1 if any output is not the target's own, and with 2 if the run cannot start.
    """
    options: dict[str, Any] = dict(locals())
    options["prompts"] = tuple(options["prompts"] or ())
    with _errors():
        from ..bench.command import BenchCommand

        lossless = BenchCommand(**options).run()
    raise typer.Exit(code=0 if lossless else 1)


@app.command()
def verify(
    target: _VerifiedTarget = None,
    assistant: _Assistant = None,
    prompts: _Prompts = None,
    requests: _VerifiedRequests = 24,
    max_new_tokens: _MaxNewTokens = 64,
    dtype: _Dtypes = None,
    device: _Device = "auto",
    threads: _Threads = None,
    output: _JsonFile = None,
) -> None:
    """
    Count the greedy outputs that differ from the target's own, beside those of its own generate in batches.

    Exits with 1 if an output of hf_osd differs by more than rounding explains, and with 2 if the run cannot start.
    """
    options: dict[str, Any] = dict(locals())
    options["dtypes"] = tuple(options.pop("dtype") or ("auto",))
    with _errors():
        from ..verify.command import VerifyCommand

        lossless = VerifyCommand(**options).run()
    raise typer.Exit(code=0 if lossless else 1)


@app.command()
def design(
    target: _DesignedFor,
    output: _DesignOutput,
    prompts: _DesignPrompts = None,
    texts: _Texts = 2000,
    candidates: _Candidates = None,
    minutes: _Minutes = 15.0,
    seed: _Seed = 0,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    threads: _Threads = None,
    plot: _Plot = True,
) -> None:
    """
    Make a draft for a target, offline: it reads the target's states and learns from what the target says of texts.

    Called again with the same options, it goes on where it was cut off. Exits with 2 if the run cannot start.
    """
    options: dict[str, Any] = dict(locals())
    options |= {name: tuple(options[name] or ()) for name in ("prompts", "candidates")}
    with _errors():
        from ..design.command import DesignCommand

        DesignCommand(**options).run()


@contextmanager
def _errors() -> Iterator[None]:
    """Say in one line what is wrong, and exit with 2; with 130 where the user ends the run."""
    try:
        yield
    except (HfOsdError, OSError, MemoryError) as error:  # of the options, or of the machine: a disk that is full
        raise _exit(f"Error: {error}", 2) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _exit(f"Error: {error}", 2) from error
    except KeyboardInterrupt as error:
        raise _exit("Interrupted.", 130) from error


def _exit(line: str, code: int) -> typer.Exit:
    typer.secho(" ".join(line.split()), fg="red", err=True)
    return typer.Exit(code=code)
