"""Distils a draft offline from recorded texts of its target. Resumable; judged on held-out texts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

from ..drafts.features import FeatureDraft
from ..learning.student import Student
from ..precision import multiplies_bfloat16
from ..records import Observation
from .history import Evaluation, is_over, read_history, write_history
from .judging import Quality, judge
from .processes import wait
from .recipe import Recipe
from .shards import Recording

_BEST = "best.safetensors"


def distil(
    draft: FeatureDraft,
    recording: Recording,
    held_out: Sequence[Observation],
    folder: Path,
    recipe: Recipe,
    tell: Callable[[Evaluation], object] = lambda evaluation: None,
) -> list[Evaluation]:
    """
    Train a draft on recorded texts of its target, in place.

    A float32 copy is trained by TRL, under bfloat16 autocast where the device multiplies it natively, and the best
    weights on the held-out texts are what the draft gets, in its own dtype. The borrowed embedding and head are not
    touched. An interrupted run resumes from its last evaluation.

    Args:
        draft (`FeatureDraft`): The draft, which borrows from its target.
        recording (`Recording`): What to learn.
        held_out (`Sequence[Observation]`): Answers of the target to judge by; see [`~hf_osd.design.judging.judge`].
        folder (`Path`): For checkpoints and `history.json`; made if missing.
        recipe (`Recipe`): How, and how long.
        tell (`Callable[[Evaluation], object]`, *optional*): Told of every new evaluation.

    Returns:
        `list[Evaluation]`: All of them, those of an earlier run included.
    """
    history = read_history(folder)
    if not is_over(recipe, history):
        history = _train(draft, recording, held_out, folder, recipe, tell)
    draft.load_state_dict(load_file(folder / _BEST), strict=False)
    draft.config.solved = None  # trained, so never to be solved for again
    return history


def _train(
    draft: FeatureDraft,
    recording: Recording,
    held_out: Sequence[Observation],
    folder: Path,
    recipe: Recipe,
    tell: Callable[[Evaluation], object],
) -> list[Evaluation]:
    from .training import OfflineCallback, OfflineTrainer  # TRL takes seconds to import

    student = Student(draft)
    bf16 = draft.dtype == torch.bfloat16 and multiplies_bfloat16(draft.device)

    def evaluate() -> Quality:
        with torch.autocast(draft.device.type, torch.bfloat16, enabled=bf16):
            return judge(student.model, held_out)

    def note(history: list[Evaluation]) -> None:
        _write(folder, history, student)
        tell(history[-1])

    callback = OfflineCallback(recipe, evaluate, note)
    trainer = OfflineTrainer(student.model, recording, recipe, callback, folder, bf16)
    trainer.train(resume_from_checkpoint=_checkpoint(folder))
    wait()  # until the first process has written the best weights
    return read_history(folder)


def _checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _write(folder: Path, history: Sequence[Evaluation], student: Student) -> None:
    """Write what is known of the run, and its weights where they are the best so far."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [evaluation.quality.accepted for evaluation in history]
    if found[-1] >= max(found):
        unfinished = folder / f"{_BEST}.unfinished"
        save_file({name: value.contiguous() for name, value in student.weights().items()}, unfinished)
        unfinished.replace(folder / _BEST)
    write_history(folder, history)
