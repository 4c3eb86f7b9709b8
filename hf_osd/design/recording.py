"""Records texts in lots, one file each, so that an interrupted run resumes behind its last file."""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..drafts.machine import digest
from ..records import Observation
from ..storage.identity import sample
from .reading import read_texts
from .requests import Request
from .shards import Recording, write_shard
from .writing import rows_at_once, write_answers

_LOT = 128  # texts of a file, at least; some 100 MB with states, which is the most that an interruption loses


def record(
    target: PreTrainedModel,
    requests: Sequence[Request],
    folder: Path,
    *,
    state_layers: Sequence[int] = (),
    top_k: int = 32,
    max_new_tokens: int = 96,
    tell: Callable[[int], object] = lambda done: None,
) -> Recording:
    """
    Let the target answer the prompts without an answer, and record all texts, in one pass over each.

    What the folder holds already is not recorded again, whatever else was asked for when it was. So a run that was
    cut off goes on, and one with more texts adds to it.

    Args:
        target (`PreTrainedModel`): The target.
        requests (`Sequence[Request]`): The texts.
        folder (`Path`): Where the files go; made if missing.
        state_layers (`Sequence[int]`, defaults to `()`): Layers to keep the states of, in bfloat16: two bytes for each
            number of a state, 4.6 KB a token of a model of 576 dimensions with four layers.
        top_k (`int`, defaults to 32): Log-probabilities to keep at a position.
        max_new_tokens (`int`, defaults to 96): Tokens of an answer that the target writes, at most.
        tell (`Callable[[int], object]`, *optional*): Called with the number of texts recorded so far.

    Returns:
        [`Recording`]: An observation of each request, in order. Its `prompt_ids` are what teaches nothing.

    Raises:
        OSError: A file cannot be written.
        StateError: A file of the folder is damaged.
    """
    about = [_fingerprint(target), list(state_layers), top_k, max_new_tokens]
    paths, size = [], max(_LOT, rows_at_once(target))
    for start in range(0, len(requests), size):
        lot = requests[start : start + size]
        path = folder / f"{digest([about, *map(_describe, lot)])}.safetensors"
        if not path.is_file():
            write_shard(path, _observe(target, lot, state_layers, top_k, max_new_tokens))
        paths.append(path)
        tell(start + len(lot))
    return Recording(paths)


def _observe(
    target: PreTrainedModel, requests: Sequence[Request], state_layers: Sequence[int], top_k: int, max_new_tokens: int
) -> list[Observation]:
    asked = [request.prompt_ids for request in requests if request.answer_ids is None]
    written = iter(write_answers(target, asked, max_new_tokens))
    answers = [next(written) if one.answer_ids is None else one.answer_ids for one in requests]
    texts = [torch.cat((one.prompt_ids, answer)) for one, answer in zip(requests, answers, strict=True)]
    heads = [min(one.head, len(text) - 1) for one, text in zip(requests, texts, strict=True)]
    return read_texts(target, texts, heads, state_layers, top_k)


def _describe(request: Request) -> list[int | str | None]:
    answer = None if request.answer_ids is None else _hash(request.answer_ids)
    return [_hash(request.prompt_ids), answer, request.head]


def _hash(tensor: torch.Tensor) -> str:
    return sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _fingerprint(target: PreTrainedModel) -> str:
    """Identify a target by a sample of its weights, wherever it was loaded from."""
    values = {name: values.tolist() for name, values in sample(target.named_parameters()).items()}
    return digest([type(target).__name__, str(target.dtype), values])
