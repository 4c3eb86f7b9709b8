"""The commands and their options. Each imports what it runs only when it runs, so that `--help` answers at once."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import HfOsdError

app = typer.Typer(
    name="hf-osd",
    help="Online speculative decoding: the target's exact output, from a draft that learns while it serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Target = Annotated[
    str | None, typer.Option(help="Hub id or folder of the target; the embedded pair if left out.", show_default=False)
]
_Assistant = Annotated[str | None, typer.Option(help="Hub id or folder of the draft.", show_default=False)]
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
_DraftLength = Annotated[int, typer.Option(min=1, help="Tokens to draft before each pass of the target.")]
_UpdateEvery = Annotated[int, typer.Option(min=1, help="Requests between two updates of the online draft.")]
_Sample = Annotated[bool, typer.Option("--sample/--greedy", help="Sample, or decode greedily and compare outputs.")]
_Seed = Annotated[int, typer.Option(help="Seed of sampling and of learning.")]
_Device = Annotated[str, typer.Option(help="A torch device; auto takes an accelerator where there is one.")]
_Dtype = Annotated[str, typer.Option(help="A torch dtype; auto is the checkpoint's, but float32 on the CPU.")]
_Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads of torch; 1 for the embedded pair if left out.", show_default=False),
]
_Budget = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Start no request after so many seconds; 240 for the embedded pair if left out.",
        show_default=False,
    ),
]
_Output = Annotated[Path, typer.Option(file_okay=False, help="Folder for the JSON and the plot.")]
_Plot = Annotated[bool, typer.Option("--plot/--no-plot", help="Draw a PNG (needs matplotlib).")]


def main() -> None:
    """Run `hf-osd`."""
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
    prompts: _Prompts = None,
    requests: _Requests = 160,
    max_new_tokens: _MaxNewTokens = 48,
    draft_length: _DraftLength = 3,
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
    Serve real prompts and watch the draft learn, next to plain, assisted and static decoding.

    Exits with 1 if any greedy output of hf_osd is not the target's own, and with 2 if the run cannot start.
    """
    options: dict[str, Any] = dict(locals())
    try:
        from ..demo.command import DemoCommand

        lossless = DemoCommand(**options).run()
    except HfOsdError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(code=2) from error
    raise typer.Exit(code=0 if lossless else 1)
