"""Contenders side by side: every request goes to each of them, in one process, and who goes first changes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..demo.models import Inputs
from ..demo.results import PLAIN, Difference
from ..demo.runner import find_differences
from .contenders import Contender, Sample
from .floor import Floor

Observer = Callable[[], None]
"""Hears of every request that all contenders have answered."""

REPLAYED = 16  # requests of a race whose forwards are replayed: a replay takes about as long as its request


@dataclass(slots=True)
class Race:
    """
    What a race measured.

    Attributes:
        samples (`dict[str, list[Sample]]`): By contender, in the order of the requests.
        differences (`list[Difference]`): Outputs that are not those of the contender that all are compared with.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


def run_race(
    contenders: Sequence[Contender],
    requests: Sequence[Inputs],
    options: dict[str, Any],
    observer: Observer = lambda: None,
    *,
    warm_up: Inputs | None = None,
    prepare: Callable[[Inputs], None] = lambda request: None,
    floor: Floor | None = None,
) -> Race:
    """
    Let every contender answer every request.

    Args:
        contenders (`Sequence[Contender]`): The first one's outputs are what the others are compared with.
        requests (`Sequence[Inputs]`): Requests, or batches of them.
        options (`dict[str, Any]`): For `generate`.
        observer (`Observer`, *optional*): Hears of every round.
        warm_up (`Inputs`, *optional*): A request that does not count: first calls pay for allocations that later ones
            do not. Defaults to the first request.
        prepare (`Callable[[Inputs], None]`, *optional*): Called, untimed, before each request.
        floor (`Floor`, *optional*): Replays the forwards of every contender right after its answer, for `REPLAYED`
            requests at most, evenly spread.
    """
    race = Race({one.name: [] for one in contenders})
    prepared = requests[0] if warm_up is None else warm_up
    prepare(prepared)
    for contender in contenders:
        _answer(contender, prepared, options, floor)
    stride = -(-len(requests) // REPLAYED)
    for index, request in enumerate(requests):
        if request is not prepared:
            prepare(request)
            prepared = request
        _play(race, contenders, request, index, options, floor if index % stride == 0 else None)
        observer()
    return race


def _play(
    race: Race,
    contenders: Sequence[Contender],
    request: Inputs,
    index: int,
    options: dict[str, Any],
    floor: Floor | None,
) -> None:
    turn = index % len(contenders)
    outputs: dict[str, torch.Tensor] = {}
    for contender in (*contenders[turn:], *contenders[:turn]):
        outputs[contender.name], sample = _answer(contender, request, options, floor)
        race.samples[contender.name].append(sample)
    first = contenders[0]
    race.differences += compare(first.models["target"], request, outputs, first.name, index)


def _answer(
    contender: Contender, request: Inputs, options: dict[str, Any], floor: Floor | None
) -> tuple[torch.Tensor, Sample]:
    with contender.recorder() as recorder:
        output, sample = contender.answer(request, **options)
    forwards = recorder.shapes()
    return output, replace(sample, forwards=forwards, floor=floor.seconds(forwards) if floor is not None else None)


def compare(
    target: PreTrainedModel, request: Inputs, outputs: dict[str, torch.Tensor], reference: str, index: int
) -> list[Difference]:
    """
    Compare outputs row by row, token for token.

    Args:
        target (`PreTrainedModel`): Says how far apart its two best tokens are where an output differs.
        request (`Inputs`): Left-padded prompts, `(batch, prompt)`.
        outputs (`dict[str, torch.LongTensor]`): New tokens by contender, each of shape `(batch, new)`.
        reference (`str`): The contender that all others are compared with.
        index (`int`): Index of the request.
    """
    found: list[Difference] = []
    for row in range(len(outputs[reference])):
        prompt = request["input_ids"][row, request["attention_mask"][row].bool()]
        rows = {PLAIN if name == reference else name: output[row] for name, output in outputs.items()}
        found += find_differences(target, {"input_ids": prompt[None]}, rows, index)
    return found


def describe_differences(race: Race) -> dict[str, Any]:
    """Return what is to be said of the outputs, ready for JSON."""
    mismatches = [item for item in race.differences if not item.near_tie]
    return {
        "requests": max((len(samples) for samples in race.samples.values()), default=0),
        "near_ties": len(race.differences) - len(mismatches),
        "mismatches": [asdict(item) for item in mismatches],
    }
