"""
Run suites, print their tables, and write a JSON and a plot of each.

    python -m benchmarks.suites                       # all of them: the embedded pair, docstrings of Python's library
    python -m benchmarks.suites serving --peers --batch 4
    python -m benchmarks.suites --models scripted --acceptance 0.8
    python -m benchmarks.suites --replot benchmarks/results/cpu   # draw committed figures again; measures nothing

Exits with 1 if any output is not the target's own, and with 2 if the run cannot start.
"""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from hf_osd.errors import HfOsdError

from .command import SuitesCommand, run_replot
from .results import SUITES

_HELP = {
    "models": "given: --target and --assistant, or the embedded pair; trained: a pair trained here first; scripted: "
    "random weights, and a draft that is accepted at a chosen rate, for the cost of the engine at true scale",
    "target": "Hub id, folder or GGUF file; the embedded pair if left out",
    "assistant": "Hub id or folder of the draft; made of the target if left out",
    "target_shape": "HIDDENxLAYERS of the Llama to train or to script; 2048x16 and 4096x32 if left out",
    "draft_shape": "the same for its draft; 1024x3 and 2048x4 if left out",
    "vocabulary": "tokens of the scripted pair; 128256 if left out",
    "acceptance": "how likely a scripted proposal is the target's own token",
    "train_prompts": ".jsonl file of prompt and response to train on; repeat it; documented functions if left out",
    "draft_train_prompts": "the same for the draft; what the target learns if left out",
    "train_seconds": "time to train both models",
    "prompts": "a stream: .jsonl, .json or .txt file, or a datasets id; repeat it; docstrings if left out",
    "requests": "of each stream",
    "max_new_tokens": "longest answer",
    "compiled": "measure compiled plain decoding too; on CUDA if left out",
    "batch": "prompts of each request in serving",
    "peers": "let economize and flashspec serve too (extra peers)",
    "eagle3": "with --peers: a folder with an EAGLE-3 head that economize has trained for the target",
    "plot": "draw a PNG of each suite",
}
_KINDS = {"vocabulary": int, "threads": int, "eagle3": Path}  # of options without a default that says it
_REPEATED = ("prompts", "train_prompts", "draft_train_prompts")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line: an option for each field of [`SuitesCommand`]."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.suites", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", help=f"any of {', '.join(SUITES)}; all of them if left out")
    parser.add_argument("--replot", type=Path, metavar="FOLDER", help="only draw the plots of results again")
    for field in fields(SuitesCommand):
        option, about = f"--{field.name.replace('_', '-')}", _HELP.get(field.name)
        if field.name in _REPEATED:
            parser.add_argument(option, action="append", default=[], help=about)
        elif field.name == "compiled" or isinstance(field.default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default, help=about)
        elif field.name != "suites" and field.default is not MISSING:
            kind = _KINDS.get(field.name, str if field.default is None else type(field.default))
            kind = Path if isinstance(field.default, Path) else kind
            parser.add_argument(option, type=kind, default=field.default, help=about)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = vars(parse(arguments))
    folder = options.pop("replot")
    try:
        if folder is not None:
            run_replot(folder)
            return
        lossless = SuitesCommand(**options).run()
    except HfOsdError as error:
        print(f"Error: {error}")
        raise SystemExit(2) from error
    raise SystemExit(0 if lossless else 1)


if __name__ == "__main__":
    main()
