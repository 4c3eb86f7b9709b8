"""Contenders side by side, and what their samples add up to."""

from typing import Any

import pytest
import torch
from fakes import prompts, tiny_model

from hf_osd.evaluation.contenders import Sample
from hf_osd.evaluation.race import run_race, total

OPTIONS = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}


def test_rates_are_ratios_of_sums() -> None:
    """Would catch a mean of per-request rates, in which a one-token request weighs as much as a long one."""
    one = {"a": Sample(tokens=1, seconds=1.0, drafted=1, accepted=1, passes=1, lookups=4, accepted_lookups=1)}
    two = {"a": Sample(tokens=99, seconds=1.0, learning_seconds=2.0, drafted=99, accepted=0, passes=49, updates=1)}
    both = total([one, two, {}], "a")
    assert both.acceptance == pytest.approx(0.01)
    assert both.lookup_acceptance == pytest.approx(0.25)
    assert both.tokens_per_second == pytest.approx(50)
    assert both.tokens_per_second_with_learning == pytest.approx(25)
    assert both.tokens_per_pass == pytest.approx(2)
    assert both.updates == 1


def test_what_is_not_known_is_none() -> None:
    """Would catch a zero acceptance being reported for contenders that draft nothing or do not say."""
    nothing = total([{"a": Sample(tokens=5, seconds=1.0)}], "a")
    assert (nothing.acceptance, nothing.lookup_acceptance, nothing.tokens_per_pass) == (None, None, None)
    assert total([], "a") == Sample()
    assert Sample().tokens_per_second == 0.0


class Teller:
    """A contender that notes its turns and seeds, and says what `generate` does, or another second token."""

    def __init__(self, name: str, turns: list[tuple[str, int]], target: Any, shift: int = 0) -> None:
        self.name, self.turns, self.target, self.shift = name, turns, target, shift

    def answer(self, inputs: Any, **options: Any) -> tuple[torch.Tensor, Sample]:
        self.turns.append((self.name, torch.initial_seed()))
        new = self.target.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
        new[0, 1] += self.shift
        return new, Sample(2, 1.0)


def tellers(turns: list[tuple[str, int]]) -> list[Teller]:
    target = tiny_model()
    return [Teller(name, turns, target, shift=name == "c") for name in "abc"]


def test_who_goes_first_rotates_and_wrong_outputs_are_found() -> None:
    """Would catch a contender that always finds the caches warm, uneven seeds, and outputs that nobody compares."""
    turns: list[tuple[str, int]] = []
    requests = [prompts(1, seed=seed) for seed in range(2)]
    race = run_race(tellers(turns), requests, OPTIONS, seed=2**64 - 1)
    assert "".join(name for name, _ in turns) == "abcabcbca"  # the first round warms up
    assert [seed for _, seed in turns[3:]] == [2**64 - 1] * 3 + [0] * 3  # begins anew behind the largest
    assert [(one.contender, one.position, one.request) for one in race.mismatches] == [("c", 1, 0), ("c", 1, 1)]
    assert [[*one] for one in race.rounds] == [["a", "b", "c"]] * 2


def test_sampled_outputs_are_not_compared() -> None:
    """Would catch sampled runs failing because two samples differ, as they should."""
    assert run_race(tellers([]), [prompts(1)], OPTIONS | {"do_sample": True}).differences == []


def test_a_contender_may_sit_out() -> None:
    """Would catch an answer that is asked for all the same, and sums over requests of others."""
    turns: list[tuple[str, int]] = []
    race = run_race(
        tellers(turns), [prompts(1)] * 4, OPTIONS, takes_part=lambda one, index: one.name != "b" or index % 2 == 0
    )
    assert [name for name, _ in turns].count("b") == 1 + 2
    assert (len(race.samples("b")), total(race.rounds, "b").tokens) == (2, 4)


def test_a_deadline_ends_a_race_after_a_whole_round() -> None:
    """Would catch half a round, and a race without any."""
    heard: list[int] = []
    race = run_race(tellers([]), [prompts(1)] * 3, OPTIONS, lambda race: heard.append(len(race.rounds)), deadline=0.0)
    assert (race.stopped_early, heard, [*race.rounds[0]]) == (True, [1], ["a", "b", "c"])
