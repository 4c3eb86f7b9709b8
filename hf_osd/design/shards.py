"""Recorded texts on disk: files written once and read text by text, so that memory holds one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..drafts.machine import digest
from ..errors import StateError
from ..records import Observation

_KINDS = {"ids": torch.int32, "teacher_ids": torch.int32}  # dtypes on disk; other tensors keep theirs


def write_shard(path: Path, observations: Sequence[Observation]) -> None:
    """Write observations to one file, all of it or nothing."""
    sizes = [[len(one.prompt_ids), len(one.output_ids)] for one in observations]
    values = {
        "sizes": torch.tensor(sizes, dtype=torch.int32),
        "ids": torch.cat([torch.cat((one.prompt_ids, one.output_ids)) for one in observations]),
    }
    for name in ("teacher_ids", "teacher_log_probs", "teacher_tail", "states"):
        parts = [getattr(one, name) for one in observations]
        if parts[0] is not None:
            values[name] = torch.cat(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    kept = {name: value.to(_KINDS.get(name, value.dtype)).contiguous() for name, value in values.items()}
    save_file(kept, unfinished)
    unfinished.replace(path)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the tokens and the output of an observation begin in a file."""

    shard: Any
    prompt: int
    output: int
    first_token: int
    first_output: int
    first_state: int


class Recording(Sequence[Observation]):
    """
    Recorded texts, read from disk whenever one is asked for. The files are mapped: what memory holds of them beside
    is the system's cache.

    Args:
        paths (`Sequence[Path]`): Files of [`write_shard`], in order.

    Attributes:
        lengths (`list[int]`): Tokens of each text.
        name (`str`): A short name, different for different texts.

    Raises:
        StateError: A file is no such file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places = [place for path in paths for place in _places(path)]
        self.name = digest([path.stem for path in paths])
        self.lengths = [place.prompt + place.output for place in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return _read(self._places[index])


def _places(path: Path) -> list[_Place]:
    try:
        shard: Any = safe_open(path, "pt")
        sizes: list[list[int]] = shard.get_tensor("sizes").tolist()
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path}: no file of recorded texts ({error}); delete it to record anew") from error
    tokens = [0, *accumulate(prompt + output for prompt, output in sizes)]
    outputs = [0, *accumulate(output for _, output in sizes)]
    return [
        _Place(shard, prompt, output, tokens[row], outputs[row], tokens[row] - row)
        for row, (prompt, output) in enumerate(sizes)
    ]


def _read(place: _Place) -> Observation:
    names = set(place.shard.keys())
    length = place.prompt + place.output

    def part(name: str, start: int, count: int) -> torch.Tensor:
        found: torch.Tensor = place.shard.get_slice(name)[start : start + count]
        return found.long() if name in _KINDS else found

    ids = part("ids", place.first_token, length)
    output = ids[place.prompt :]
    teacher = {
        name: part(name, place.first_output, place.output)
        for name in ("teacher_ids", "teacher_log_probs", "teacher_tail")
    }
    return Observation(
        prompt_ids=ids[: place.prompt],
        output_ids=output,
        **teacher,
        draft_ids=torch.full_like(output, -1),
        accepted=torch.zeros_like(output, dtype=torch.bool),
        states=part("states", place.first_state, length - 1) if "states" in names else None,
    )
