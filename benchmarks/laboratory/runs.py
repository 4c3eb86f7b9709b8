"""Runs every recipe over every stream, in several processes, and keeps each result as it comes."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_osd.drafts.features import FeatureDraft
from hf_osd.records import Observation

from . import fingerprints
from .recipes import Recipe
from .recording import read
from .replay import replay
from .routed import replay_routed
from .streams import Stream

Recordings = Mapping[str, Sequence[Observation]]


@dataclass(frozen=True)
class Task:
    """
    One recipe over one stream.

    Attributes:
        stream (`Stream`): Which requests, in which order.
        recipe (`Recipe`): How to learn.
        path (`Path`): Where its result is kept.
        depends_on (`Mapping[str, str]`): Fingerprints of the draft, the requests, the settings and the library; the
            result is used again where they are the same.
    """

    stream: Stream
    recipe: Recipe
    path: Path
    depends_on: Mapping[str, str]

    def finished(self, any_library: bool = False) -> dict[str, Any] | None:
        """Return the result, if it is there and of this very task; with `any_library`, of any version of the code."""
        try:
            result: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        ignored = {"library"} if any_library else set()
        kept = result.get("depends_on", {})
        return (
            result
            if all(kept.get(name) == self.depends_on[name] for name in self.depends_on.keys() - ignored)
            else None
        )

    def keep(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the result, all of it or nothing, and return it as it was written."""
        document = {
            "stream": self.stream.name,
            "recipe": self.recipe.name,
            "depends_on": dict(self.depends_on),
            **result,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(document) + "\n", encoding="utf-8")
        unfinished.replace(self.path)
        return document


def make_tasks(
    streams: Sequence[Stream], recipes: Sequence[Recipe], recordings: Recordings, draft: PreTrainedModel, folder: Path
) -> list[Task]:
    """Pair every stream with every recipe, stream by stream."""
    library, weights = fingerprints.of_sources(), fingerprints.of_model(draft)
    tasks = []
    for stream in streams:
        requests = fingerprints.of_requests(pick(stream, recordings))
        for recipe in recipes:
            settings = fingerprints.of_values([asdict(recipe.online_config()), recipe.epochs, recipe.router])
            depends_on = {"draft": weights, "requests": requests, "settings": settings, "library": library}
            tasks.append(Task(stream, recipe, folder / stream.name / f"{recipe.name}.json", depends_on))
    return tasks


def pick(stream: Stream, recordings: Recordings) -> list[Observation]:
    """Return the recorded requests of a stream, in its order."""
    return [recordings[domain][index] for domain, index in stream.requests]


def run_here(
    tasks: Sequence[Task], draft: PreTrainedModel, recordings: Recordings, target: PreTrainedModel | None = None
) -> Iterator[Task]:
    """Run tasks one by one in this process; yield each when its result is kept."""
    for task in tasks:
        task.keep(_result(task, draft, recordings, target))
        yield task


def _result(
    task: Task, draft: PreTrainedModel, recordings: Recordings, target: PreTrainedModel | None
) -> dict[str, Any]:
    requests = pick(task.stream, recordings)
    if not task.recipe.router:
        return replay(draft, requests, task.recipe)
    assert target is not None, "a router needs the target"
    return replay_routed(draft, target, requests, [domain for domain, _ in task.stream.requests], task.recipe)


def run_in_processes(
    tasks: Sequence[Task],
    draft: str,
    files: Mapping[str, Path],
    jobs: int,
    target: str | None = None,
    dtype: str = "float32",
) -> Iterator[Task]:
    """
    Run tasks in processes of one thread each; yield each when its result is kept.

    Args:
        tasks (`Sequence[Task]`): What to run.
        draft (`str`): Hub id or folder of the draft.
        files (`Mapping[str, Path]`): Recordings by domain.
        jobs (`int`): Processes.
        target (`str`, *optional*): Hub id or folder of the target, from which a draft may borrow.
        dtype (`str`, defaults to `"float32"`): Of both.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come; more threads only wait for one another
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        jobs, context, initializer=_prepare, initargs=(draft, dict(files), target, dtype)
    ) as pool:
        waiting = {pool.submit(_work, task): task for task in tasks}
        for future in as_completed(waiting):
            future.result()
            yield waiting[future]


def _prepare(draft: str, files: Mapping[str, Path], target: str | None, dtype: str) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    model, lender = AutoModelForCausalLM.from_pretrained(draft, dtype=dtype).eval(), None
    if target is not None:
        lender = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
    if isinstance(model, FeatureDraft):
        model.borrow(lender)
    _worker = _Worker(model, files, lender)


def _end_with_parent() -> None:
    """A run that was killed must not go on, and write its results into those of the next one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Worker:
    """What a process keeps between tasks."""

    def __init__(self, draft: PreTrainedModel, files: Mapping[str, Path], lender: PreTrainedModel | None) -> None:
        self.draft, self.files, self.lender = draft, files, lender  # the draft itself holds its target weakly
        self.recordings: dict[str, list[Observation]] = {}

    def run(self, task: Task) -> None:
        for domain in task.stream.needed().keys() - self.recordings.keys():
            self.recordings[domain] = read(self.files[domain])[1]
        task.keep(_result(task, self.draft, self.recordings, self.lender))


_worker: _Worker | None = None


def _work(task: Task) -> None:
    assert _worker is not None
    _worker.run(task)


def run_all(
    tasks: Sequence[Task],
    run: Callable[[Sequence[Task]], Iterator[Task]],
    tell: Callable[[Task, bool], None] = lambda task, fresh: None,
    any_library: bool = False,
) -> dict[tuple[str, str], dict[str, Any]]:
    """
    Return the result of every task by stream and recipe; only those are run that are not finished.

    Args:
        tasks (`Sequence[Task]`): What is wanted.
        run (`Callable`): Runs what is left.
        tell (`Callable[[Task, bool], None]`, *optional*): Told each task that has a result, and whether it is new.
        any_library (`bool`, defaults to `False`): Whether results of other versions of the code count as finished.
    """
    left = [task for task in tasks if task.finished(any_library) is None]
    for task in tasks:
        if task not in left:
            tell(task, False)
    for task in run(left) if left else ():
        tell(task, True)
    results = {(task.stream.name, task.recipe.name): task.finished(any_library) for task in tasks}
    return {key: result for key, result in results.items() if result is not None}
