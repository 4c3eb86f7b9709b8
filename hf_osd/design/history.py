"""Evaluations of a draft during its distillation, kept as JSON."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..storage.files import write_file
from .judging import Quality
from .recipe import Recipe

HISTORY = "history.json"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """
    What a draft could do at some point.

    Attributes:
        step (`int`): Optimiser steps so far.
        minutes (`float`): Minutes so far.
        loss (`float`, *optional*): Mean loss since the last evaluation, in nats; `None` before the first step.
        quality ([`~hf_osd.design.judging.Quality`]): On texts that were held out.
    """

    step: int
    minutes: float
    loss: float | None
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {"step": self.step, "minutes": self.minutes, "loss": self.loss, **asdict(self.quality)}


def evaluations_in(entries: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """Return the evaluations among entries of a log, as [`Evaluation.to_dict`] wrote them."""
    return [
        Evaluation(
            entry["step"],
            entry["minutes"],
            entry["loss"],
            Quality(entry["agreement"], entry["accepted"], tuple(entry["chances"])),
        )
        for entry in entries
        if "accepted" in entry
    ]


def read_history(folder: Path) -> list[Evaluation]:
    """Return the evaluations of an earlier run; none where there was no run."""
    path = folder / HISTORY
    return evaluations_in(json.loads(path.read_text())) if path.is_file() else []


def write_history(folder: Path, history: Sequence[Evaluation]) -> None:
    """Write the evaluations of a run."""
    entries = [evaluation.to_dict() for evaluation in history]
    write_file(folder / HISTORY, json.dumps(entries, indent=1).encode() + b"\n")


def is_over(recipe: Recipe, history: Sequence[Evaluation]) -> bool:
    """Return whether a run has used its time, or no longer gets better."""
    if not history:
        return False
    accepted = [evaluation.quality.accepted for evaluation in history]
    last = history[-1]
    return recipe.progress(last.step, 60 * last.minutes) >= 1.0 or recipe.stopped_rising(accepted)
