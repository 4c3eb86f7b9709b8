"""
Replay recorded answers of a target through learning recipes; each request is scored before it is learned from.

    python -m benchmarks.learning --recordings recordings --output results              # the embedded pair
    python -m benchmarks.learning --target T --draft D --prompts spider=spider.jsonl --prompts gsm8k=gsm8k.jsonl \
        --recordings recordings --output results --preset full --streams spider gsm8k shift return

docs/laboratory.md says what the figures are.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID
from transformers.utils import logging as transformers_logging

from hf_osd.drafts.features import FeatureDraft
from hf_osd.errors import HfOsdError
from hf_osd.evaluation.models import EMBEDDED_PAIR, Pair, load_pair
from hf_osd.evaluation.output import require_matplotlib
from hf_osd.evaluation.prompts import Prompt, load_prompts
from hf_osd.records import Observation

from .laboratory import fingerprints, plots, report
from .laboratory.goals import Run
from .laboratory.recipes import RECIPES, USUAL, Recipe, choose, load_recipes
from .laboratory.recording import RecordingSettings, prompt_tokens, recorded
from .laboratory.runs import Task, make_tasks, run_all, run_here, run_in_processes
from .laboratory.streams import PRESETS, Sizes, Stream, make

_ENOUGH = 1_000_000  # prompts: all of them


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="Hub id or folder; the embedded pair by default")
    parser.add_argument("--draft")
    parser.add_argument(
        "--prompts", action="append", default=[], metavar="NAME=FILE", help=".jsonl with a prompt column; repeat it"
    )
    parser.add_argument("--recordings", type=Path, default=Path("recordings"), help="folder of the target's answers")
    parser.add_argument("--output", type=Path, default=Path("laboratory"), help="folder of runs and reports")
    parser.add_argument("--preset", choices=list(PRESETS), default="quick", help="lengths of the streams")
    for size in fields(Sizes):
        parser.add_argument(f"--{size.name}", type=int, metavar="REQUESTS", help="instead of the preset's")
    parser.add_argument(
        "--streams", nargs="+", help="domains, and shift, gradual, mix, return, or e.g. shift:spider,gsm8k"
    )
    parser.add_argument("--recipes", nargs="+", default=list(USUAL), help="names or families, or all")
    parser.add_argument("--recipes-file", type=Path, default=RECIPES)
    for setting in fields(RecordingSettings):
        if setting.name not in ("top_k_teacher", "state_layers"):
            kind = type(setting.default)
            parser.add_argument(f"--{setting.name.replace('_', '-')}", type=kind, default=setting.default)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--any-library", action="store_true", help="take results of other versions of hf_osd as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Record what is missing, run what is missing, report."""
    options = parse(arguments)
    try:
        require_matplotlib()
        recipes = choose(load_recipes(options.recipes_file), options.recipes)
        prompts = _prompts(options.prompts)
        streams = _streams(options, {name: len(found) for name, found in prompts.items()})
    except (ValueError, OSError, HfOsdError) as error:
        sys.exit(str(error))
    torch.set_num_threads(1 if options.jobs == 1 else min(options.jobs, os.cpu_count() or 1))
    transformers_logging.disable_progress_bar()
    pair = load_pair(options.target, options.draft, "cpu", options.dtype)
    target, draft = pair.target, pair.draft
    recordings, files = _record(options, prompts, _needed(streams), pair)
    tasks = make_tasks(streams, recipes, recordings, draft, options.output / "runs")
    results = run_all(tasks, _runner(options, pair, recordings, files), _tell, options.any_library)
    measured = [(stream, _runs(stream, recipes, results)) for stream in streams]
    about = {"pair": {"target": _about(target), "draft": _about(draft)}, "max_new_tokens": options.max_new_tokens}
    _write(report.document({**about, "temperature": options.temperature}, measured), options.output)


def _prompts(named: Sequence[str]) -> dict[str, list[Prompt]]:
    if not named:
        return {"stdlib": load_prompts(None, _ENOUGH)}
    pairs = [one.partition("=") for one in named]
    if wrong := [name for name, _, path in pairs if not name or not path]:
        raise ValueError(f"--prompts takes NAME=FILE, got {wrong[0]}")
    return {name: load_prompts(path, _ENOUGH) for name, _, path in pairs}


def _streams(options: argparse.Namespace, available: dict[str, int]) -> list[Stream]:
    chosen = {size.name: getattr(options, size.name) for size in fields(Sizes)}
    sizes = replace(PRESETS[options.preset], **{name: value for name, value in chosen.items() if value is not None})
    return [make(spec, available, sizes) for spec in options.streams or available]


def _settings(options: argparse.Namespace) -> RecordingSettings:
    names = (one.name for one in fields(RecordingSettings))
    return RecordingSettings(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def _needed(streams: Sequence[Stream]) -> dict[str, int]:
    needed: dict[str, int] = {}
    for stream in streams:
        for domain, count in stream.needed().items():
            needed[domain] = max(needed.get(domain, 0), count)
    return needed


def _record(
    options: argparse.Namespace, prompts: dict[str, list[Prompt]], needed: dict[str, int], pair: Pair
) -> tuple[dict[str, list[Observation]], dict[str, Path]]:
    """Return the recordings of each domain, and their files."""
    layers = pair.draft.state_layers if isinstance(pair.draft, FeatureDraft) else ()
    settings = replace(_settings(options), state_layers=layers)
    folder = options.recordings / settings.fingerprint(pair.target)
    files = {domain: folder / f"{domain}.parquet" for domain in needed}
    recordings = {}
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for domain, count in needed.items():
            tokens = prompt_tokens(pair, prompts[domain][:count], settings)
            line = progress.add_task(f"recording {domain}", total=count)
            tell = partial(_advance, progress, line)
            recordings[domain] = recorded(files[domain], tokens, pair.target, settings, tell)
    return recordings, files


def _advance(progress: Progress, line: TaskID, done: int) -> None:
    progress.update(line, completed=done)


def _runner(options: argparse.Namespace, pair: Pair, recordings: Any, files: dict[str, Path]) -> Any:
    def run(tasks: Sequence[Task]) -> Iterator[Task]:
        if options.jobs == 1:
            return run_here(tasks, pair.draft, recordings, pair.target)
        source = options.draft or str(EMBEDDED_PAIR / "draft")
        jobs = min(options.jobs, len(tasks))
        return run_in_processes(tasks, source, files, jobs, options.target, options.dtype)

    return run


def _tell(task: Task, fresh: bool) -> None:
    result = task.finished(any_library=True)
    seconds = f"{result['seconds']:.0f} s" if fresh and result else "kept"
    print(f"{task.stream.name}: {task.recipe.name}: {seconds}", flush=True)


def _runs(stream: Stream, recipes: Sequence[Recipe], results: dict[tuple[str, str], Any]) -> list[Run]:
    return [Run(recipe, results[stream.name, recipe.name]) for recipe in recipes]


def _about(model: Any) -> dict[str, Any]:
    return {"parameters": model.num_parameters(), "fingerprint": fingerprints.of_model(model)}


def _write(found: dict[str, Any], folder: Path) -> None:
    (folder / "learning.json").write_text(report.compact(found) + "\n", encoding="utf-8")
    text = "\n".join((report.markdown(found), report.summary(found)))
    (folder / "learning.md").write_text(text + "\n", encoding="utf-8")
    plots.write_plot(found, folder / "learning.png")
    print(text)


if __name__ == "__main__":
    main()
