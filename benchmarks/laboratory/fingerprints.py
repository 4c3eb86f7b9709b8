"""Short names of what a result depends on, so that a result is used again only where nothing changed."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import hf_osd
from hf_osd.records import Observation

_LIBRARY = Path(hf_osd.__file__).parent
_LABORATORY = Path(__file__).parent
# What a replay runs through; serving, the demo and the reports do not change its figures.
_SOURCES = (
    *sorted((_LIBRARY / "learning").glob("*.py")),
    *sorted((_LIBRARY / "routing").glob("*.py")),
    *(_LIBRARY / f"{name}.py" for name in ("budget", "config", "learning_draft", "records", "routes")),
    _LABORATORY / "replay.py",
    _LABORATORY / "routed.py",
)
_SAMPLED = 64  # weights of a parameter that go into the hash as they are; the rest is summed


def of_values(values: Any) -> str:
    """Hash anything that JSON can hold; others by their `repr`."""
    return _short(json.dumps(values, sort_keys=True, default=repr).encode())


def of_sources() -> str:
    """Hash the code that a replay runs through."""
    return _short(b"".join(path.read_bytes() for path in _SOURCES))


def of_model(model: PreTrainedModel) -> str:
    """Hash a model by its weights, wherever it was loaded from: names, shapes, sums and a sample of each."""
    parts: list[Any] = []
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLED)].float().tolist()
        parts.append([name, list(weight.shape), flat.sum(dtype=torch.float64).item(), sample])
    return of_values(parts)


def of_requests(requests: Iterable[Observation]) -> str:
    """Hash recorded requests, in order: prompts, answers, and how sure the teacher was."""
    digest = hashlib.sha256()
    for request in requests:
        for tensor in (request.prompt_ids, request.output_ids, request.teacher_tail):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
