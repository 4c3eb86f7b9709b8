"""How far to go with what was learned: the average, the places on the way, and the choice between them."""

import json
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.gate import compare
from hf_osd.learning.judge import Score, Weights
from hf_osd.learning.path import _TESTED, MIXING, LearnedPath

VALUES = st.lists(st.integers(-8, 8), min_size=1, max_size=20)
PLACES = len(MIXING) + 1
TOKENS = st.floats(0.0, 5.0)
TESTED = st.lists(st.tuples(*[TOKENS] * PLACES), max_size=24)


def weights(value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2,), value, dtype=dtype), "b": torch.full((1, 3), -value, dtype=dtype)}


def path_of(values: Sequence[float], initial: float = 0.0) -> LearnedPath:
    path = LearnedPath(weights(initial))
    for value in values:
        path.follow(weights(value))
    return path


def learned() -> LearnedPath:
    """A path whose weights are how far they go."""
    return path_of([1.0])


def score(accepted: float) -> Score:
    return Score(accepted / 5.0, accepted, 10)


def with_record(*requests: Sequence[float], path: LearnedPath | None = None) -> LearnedPath:
    """A path with a track record: accepted tokens of the initial weights and of each place, a request."""
    path = learned() if path is None else path
    columns = {mixing: [request[place] for request in requests] for place, mixing in enumerate((0.0, *MIXING))}

    def find(candidate: Weights) -> list[Score]:
        mixing = min(MIXING, key=lambda mixing: abs(mixing - float(candidate["a"][0])))
        return [score(value) for value in columns[mixing]]

    path.test(find, [score(value) for value in columns[0.0]])
    return path


def by_definition(values: Sequence[float]) -> float:
    """The first seven weigh as their numbers; each later one a quarter of all."""
    first = values[:7]
    average = sum(number * value for number, value in enumerate(first, start=1)) / sum(range(1, len(first) + 1))
    for value in values[7:]:
        average = 0.75 * average + 0.25 * value
    return average


# The average.


@given(values=VALUES)
def test_the_average_is_that_of_the_definition(values: list[int]) -> None:
    """Catches a first update that weighs for ever, an average that starts at zero, and one that stops to follow."""
    path = path_of([float(value) for value in values])
    assert path.count == len(values)
    assert path.average["a"].tolist() == pytest.approx([by_definition(values)] * 2, abs=1e-4)
    assert path.average["b"].tolist()[0] == pytest.approx([-by_definition(values)] * 3, abs=1e-4)


def test_the_average_is_a_copy() -> None:
    """Catches training that goes on in the average, and an average that changes the training copy."""
    path = LearnedPath(weights(0.0))
    first, second = weights(4.0), weights(1.0)
    path.follow(first)
    path.follow(second)
    assert (first["a"].tolist(), second["a"].tolist()) == ([4.0] * 2, [1.0] * 2)
    first["a"].fill_(9.0)
    second["a"].fill_(9.0)
    assert path.average["a"].tolist() == pytest.approx([2.0] * 2)


def test_parameters_that_are_trained_can_be_followed() -> None:
    """Catches a graph that grows with each update, and an in-place change of a leaf."""
    path = LearnedPath(weights(0.0))
    trained = {"a": torch.nn.Parameter(torch.ones(2))}
    path.follow(trained)
    path.follow(trained)
    assert not path.average["a"].requires_grad
    assert not path.at(0.5)["a"].requires_grad


def test_small_steps_of_low_precision_are_not_lost() -> None:
    """Catches an average in bfloat16, which rounds a quarter of a small change away."""
    path = LearnedPath(weights(1.0, torch.bfloat16))
    for _ in range(8):
        path.follow(weights(1.0, torch.bfloat16))
    path.follow(weights(1.0078125, torch.bfloat16))  # the next number
    assert path.average["a"].dtype == torch.float32
    assert path.average["a"].tolist() == pytest.approx([1.0 + 0.0078125 / 4] * 2, abs=1e-6)
    assert {tensor.dtype for tensor in path.at(1 / 3).values()} == {torch.float32}


def test_it_is_where_the_training_copy_is() -> None:
    """Catches initial weights of the processor, or an average from the disk, that meet weights of an accelerator."""
    path = LearnedPath({"a": torch.zeros(2)})
    path.load_state({"a": torch.zeros(2)}, {"count": 3, "tested": []})
    path.follow({"a": torch.ones(2, device="meta")})
    assert path.average["a"].device.type == "meta"
    assert path.at(0.5)["a"].device.type == "meta"


# Places.


@given(initial=st.floats(-1e3, 1e3, width=32), value=st.floats(-1e3, 1e3, width=32))
def test_the_way_begins_and_ends_where_it_says(initial: float, value: float) -> None:
    """Catches a way from the average to the initial weights, and ends that rounding has moved."""
    path = path_of([value], initial)
    assert path.at(0.0)["a"].tolist() == [initial] * 2
    assert path.at(1.0)["a"].tolist() == [value] * 2
    assert path.at(1.0)["b"].tolist() == [[-value] * 3]
    third = initial + (value - initial) / 3
    assert path.at(1 / 3)["a"].tolist() == pytest.approx([third] * 2, rel=1e-5, abs=1e-3)


def test_a_place_is_a_copy() -> None:
    """Catches live weights that move with the average, or the initial ones with them."""
    path = path_of([1.0])
    for mixing in (0.0, 0.5, 1.0):
        path.at(mixing)["a"].fill_(9.0)
    assert path.average["a"].tolist() == [1.0] * 2
    assert path.initial["a"].tolist() == [0.0] * 2
    end, saved = path.at(1.0), path.on_cpu()
    path.follow(weights(5.0))
    assert end["a"].tolist() == saved["a"].tolist() == [1.0] * 2


# The choice.


@given(requests=TESTED)
def test_the_choice_is_what_paid(requests: list[tuple[float, ...]]) -> None:
    """Catches places that are mixed up, a promise of another place, and a way that goes on without a reason."""
    path = with_record(*requests)
    mixing, promise = path.best()
    place = MIXING.index(mixing) + 1
    columns = [[score(request[index]) for request in requests] for index in range(PLACES)]
    assert promise == compare(columns[place], columns[0])
    assert promise.requests == len(requests)
    nearer, further = columns[1:place], columns[place + 1 :]
    assert not nearer or any(compare(columns[place], other).is_better(1.0) for other in nearer)
    assert not any(compare(other, columns[place]).is_better(1.0) for other in further)


@pytest.mark.parametrize(
    ("requests", "chosen"),
    [
        ([(1.0, 1.5, 2.0, 2.5)] * 8, 1.0),
        ([(1.0, 2.0, 2.5, 2.5)] * 8, 2 / 3),
        ([(1.0, 2.0, 1.5, 1.0)] * 8, 1 / 3),
        ([(1.0, 2.0, 1.5, 2.5)] * 8, 1.0),  # over a hill
        ([(1.0, 2.0, 2.0, 2.0)] * 8, 1 / 3),
        ([(1.0, 2.0, 0.5, 4.0), (1.0, 2.0, 4.0, 0.5)] * 4, 1 / 3),  # better for some, worse for others
        ([(1.0, 2.0, 2.01, 2.02)], 1 / 3),  # better, and not certainly
        ([(1.0, 2.0, 1.6, 2.02)] * 4, 1 / 3),  # better than the second place alone
    ],
)
def test_it_goes_no_further_than_pays_certainly(requests: list[tuple[float, ...]], chosen: float) -> None:
    """Catches the highest mean, which is often luck; the furthest place; and a choice that stops at a valley."""
    assert with_record(*requests).best()[0] == chosen


def test_one_standard_error_is_enough() -> None:
    """Catches a rule of two standard errors, with which good weights would stay at a third of the way."""
    further, nearer = ([2.2, 2.4, 2.0, 2.3] * 2, [2.0, 2.1, 2.1, 2.1] * 2)
    comparison = compare([score(value) for value in further], [score(value) for value in nearer])
    assert comparison.is_better(1.0)
    assert not comparison.is_better(2.0)
    found = with_record(*[(1.0, near, far, far) for near, far in zip(nearer, further, strict=True)]).best()
    assert found[0] == 2 / 3


def test_without_a_test_nothing_is_promised() -> None:
    """Catches a first update that is published untested, and an error where there is no traffic to test by."""
    path = LearnedPath(weights(0.0))
    path.test(refuse, [score(1.0)])  # nothing is learned yet
    for _ in range(2):
        mixing, promise = path.best()
        assert (mixing, promise.requests) == (1 / 3, 0)
        assert not promise.is_better(0.0)
        path.follow(weights(1.0))
        path.test(lambda candidate: [], [])


def refuse(candidate: Weights) -> list[Score]:
    raise AssertionError("there is nothing to score")


def test_requests_of_all_updates_count_until_they_are_old() -> None:
    """Catches a choice by the last few requests alone, and one by traffic that is long gone."""
    path = learned()
    for _ in range(3):
        with_record((1.0, 2.0, 1.5, 1.0), path=path)
    assert path.best()[1].requests == 3
    assert path.best()[0] == 1 / 3
    with_record(*[(1.0, 1.5, 2.0, 2.5)] * _TESTED, path=path)
    mixing, promise = path.best()
    assert (mixing, promise.requests) == (1.0, _TESTED)
    assert promise.gain == pytest.approx(1.5)


def test_scores_are_those_of_weights_before_the_update() -> None:
    """Catches a track record that is found anew with weights that have learned from the requests by now."""
    path = path_of([1.0])
    seen: list[float] = []

    def find(candidate: Weights) -> list[Score]:
        seen.append(float(candidate["a"][0]))
        return [score(2.0)]

    path.test(find, [score(1.0)])
    path.follow(weights(4.0))
    path.best()
    assert seen == pytest.approx(list(MIXING))


def too_few(candidate: Weights) -> list[Score]:
    return [score(1.0)]


def test_scores_of_other_requests_are_refused() -> None:
    """Catches a track record in which the initial weights did other requests than the new ones."""
    with pytest.raises(ValueError, match="zip"):
        learned().test(too_few, [score(1.0), score(2.0)])


def test_restarting_forgets_what_was_learned() -> None:
    """Catches weights of the last traffic in the average, and their track record as a promise of the new ones."""
    path = with_record(*[(1.0, 1.5, 2.0, 2.5)] * 8)
    path.restart()
    assert (path.count, path.average, path.best()[1].requests) == (0, {}, 0)
    path.follow(weights(3.0))
    assert path.at(1.0)["a"].tolist() == [3.0] * 2
    assert path.at(0.0)["a"].tolist() == [0.0] * 2


# Saving.


def through_json(path: LearnedPath) -> LearnedPath:
    other = LearnedPath(path.initial)
    other.load_state(path.on_cpu(), json.loads(json.dumps(path.state_dict())))
    return other


@given(values=st.lists(st.integers(-8, 8), max_size=9), requests=TESTED, more=VALUES)
def test_a_saved_path_goes_on_as_if_nothing_had_happened(
    values: list[int], requests: list[tuple[float, ...]], more: list[int]
) -> None:
    """Catches a count that starts again, so that the next update is all there is, and a track record that is lost."""
    path = path_of([float(value) for value in values])
    if values:
        path.test(lambda candidate: [score(request[1]) for request in requests], [score(r[0]) for r in requests])
    other = through_json(path)
    assert other.best() == path.best()
    for value in more:
        path.follow(weights(value))
        other.follow(weights(value))
    assert other.count == path.count
    for mixing in (0.0, *MIXING):
        assert all(torch.equal(tensor, path.at(mixing)[name]) for name, tensor in other.at(mixing).items())


def test_a_state_is_a_copy_and_replaces_what_was_there() -> None:
    """Catches a saved average that training changes, and a track record of before the state."""
    path = with_record(*[(1.0, 1.5, 2.0, 2.5)] * 4)
    saved, numbers = path.on_cpu(), path.state_dict()
    other = with_record(*[(1.0, 2.0, 1.5, 1.0)] * 9, path=path_of([1.0]))
    other.load_state(saved, numbers)
    assert other.best() == path.best()
    other.follow(weights(9.0))
    with_record(*[(1.0, 2.0, 1.5, 1.0)] * 9, path=other)
    assert saved["a"].tolist() == path.average["a"].tolist() == [1.0] * 2
    assert len(numbers["tested"]) == 4
    assert path.state_dict() == numbers
