"""Contenders side by side: every request goes to each of them, in one process, and who goes first changes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from .contenders import Contender, Sample
from .encoding import Inputs
from .exactness import Difference, compare
from .options import SEEDS

NEAR_TIE = 1e-4  # logits: what rounding explains in a run, at least; how much it is, outputs that differ may show

Round = Mapping[str, Sample]
"""One request, answered by each contender that took part."""


@dataclass(slots=True)
class Race:
    """
    What a race measured.

    Attributes:
        rounds (`list[Round]`): In the order of the requests.
        differences (`list[Difference]`): Greedy outputs that are not those of `generate`.
        rounding (`float`): How far rounding moves the target's two best tokens against each other.
        stopped_early (`bool`): Whether the deadline ended it.
    """

    rounds: list[Round] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    rounding: float = NEAR_TIE
    stopped_early: bool = False

    def samples(self, name: str) -> list[Sample]:
        """Return what one contender's answers took."""
        return [one[name] for one in self.rounds if name in one]

    @property
    def mismatches(self) -> list[Difference]:
        """Differences that rounding does not explain: each is a bug of somebody."""
        return [one for one in self.differences if not one.is_explained(self.rounding)]

    @property
    def near_ties(self) -> list[Difference]:
        """Those that it does."""
        return [one for one in self.differences if one.is_explained(self.rounding)]


def total(rounds: Sequence[Round], name: str) -> Sample:
    """Sum up one contender's samples over some rounds."""
    return Sample.total(one[name] for one in rounds if name in one)


def answer_plainly(contender: Contender, request: Inputs, options: dict[str, Any]) -> tuple[torch.Tensor, Sample]:
    """Let a contender answer, and look at nothing else."""
    return contender.answer(request, **options)


def run_race(
    contenders: Sequence[Contender],
    requests: Sequence[Inputs],
    options: dict[str, Any],
    observer: Callable[[Race], object] = lambda race: None,
    *,
    warm_up: Inputs | None = None,
    prepare: Callable[[Inputs], None] = lambda request: None,
    answer: Callable[..., tuple[torch.Tensor, Sample]] = answer_plainly,
    takes_part: Callable[[Contender, int], bool] = lambda contender, index: True,
    seed: int = 0,
    deadline: float = float("inf"),
) -> Race:
    """
    Let every contender answer every request.

    Args:
        contenders (`Sequence[Contender]`): Ways to decode of one target.
        requests (`Sequence[Inputs]`): Requests, or batches of them.
        options (`dict[str, Any]`): For `generate`.
        observer (`Callable[[Race], object]`, *optional*): Hears of every round.
        warm_up (`Inputs`, *optional*): A request that does not count: first calls pay for allocations that later ones
            do not. Defaults to the first request.
        prepare (`Callable[[Inputs], None]`, *optional*): Called, untimed, before each request.
        answer (`Callable`, *optional*): Lets a contender answer a request; as [`answer_plainly`] does.
        takes_part (`Callable[[Contender, int], bool]`, *optional*): Whether a contender answers a request.
            Greedy outputs are compared where the first one does: where they differ, that takes another `generate`.
        seed (`int`, defaults to 0): Every contender samples with it, plus the index of the request.
        deadline (`float`, *optional*): Time, by `time.perf_counter`, after which no further request starts.
    """
    race, prepared = Race(), requests[0] if warm_up is None else warm_up
    prepare(prepared)
    for contender in contenders:
        answer(contender, prepared, options)
    for index, request in enumerate(requests):
        if race.rounds and perf_counter() > deadline:
            race.stopped_early = True
            break
        if request is not prepared:
            prepare(request)
            prepared = request
        turn = index % len(contenders)
        answers = {}
        for contender in (*contenders[turn:], *contenders[:turn]):
            if takes_part(contender, index):
                torch.manual_seed((seed + index) % SEEDS)
                answers[contender.name] = answer(contender, request, options)
        race.rounds.append({one.name: answers[one.name][1] for one in contenders if one.name in answers})
        if not options.get("do_sample") and contenders[0].name in answers:
            _check(race, contenders[0].target, request, {name: found[0] for name, found in answers.items()}, options)
        observer(race)
    return race


def _check(
    race: Race, target: Any, request: Inputs, outputs: Mapping[str, torch.Tensor], options: dict[str, Any]
) -> None:
    differences, rounding = compare(target, request, outputs, options, len(race.rounds) - 1)
    race.differences += differences
    race.rounding = max(race.rounding, rounding)
