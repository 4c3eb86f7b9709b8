"""The comparison of two sets of scores: against numpy and brute force, and what has to hold of any."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.gate import _PRIOR_SPREAD, _PRIOR_VALUES, Comparison, compare, variance
from hf_osd.learning.judge import Score

TOKENS = st.floats(0.0, 5.0)
REQUESTS = st.lists(st.tuples(TOKENS, TOKENS, st.integers(1, 500)), min_size=1, max_size=20)
VALUES = st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=20)

Requests = list[tuple[float, float, int]]  # accepted tokens of the new and of the old weights, and positions


def scores(values: list[float], positions: list[int] | None = None) -> list[Score]:
    """Scores by accepted tokens alone; the acceptance says the opposite, so that nobody looks at it."""
    lengths = positions if positions is not None else [10] * len(values)
    return [Score(1.0 - value / 5.0, value, length) for value, length in zip(values, lengths, strict=True)]


def compared(requests: Requests) -> Comparison:
    new, old, lengths = ([request[place] for request in requests] for place in range(3))
    positions = [int(length) for length in lengths]
    return compare(scores(new, positions), scores(old, positions))


def tokens_a_round(accepted: list[float], positions: list[int]) -> float:
    """Of all requests one after the other: each round gives the accepted tokens and one more."""
    rounds = sum(length / (1.0 + tokens) for tokens, length in zip(accepted, positions, strict=True))
    return sum(positions) / rounds


@given(requests=REQUESTS)
def test_the_gain_is_that_of_all_rounds(requests: Requests) -> None:
    """Catches a mean over requests, one without their lengths, and one of accepted tokens instead of rounds."""
    new, old, positions = (list(column) for column in zip(*requests, strict=True))
    found = compared(requests)
    assert found.requests == len(requests)
    assert found.gain == pytest.approx(tokens_a_round(new, positions) - tokens_a_round(old, positions), abs=1e-9)


def expected_error(requests: Requests) -> float:
    """Numpy's variance of the rounds saved a mean length, with a prior, through the derivative of 1/x."""
    new, old, positions = (np.array(column) for column in zip(*requests, strict=True))
    lengths = positions / positions.mean()
    saved = lengths * (1.0 / (1.0 + old) - 1.0 / (1.0 + new))
    deviations = np.concatenate((saved - saved.mean(), np.full(_PRIOR_VALUES, _PRIOR_SPREAD)))
    spread = np.sum(deviations**2) / (len(deviations) - 1) / len(saved)
    slope = 1.0 / (np.mean(lengths / (1.0 + old)) * np.mean(lengths / (1.0 + new)))
    return float(slope * np.sqrt(spread))


@given(pairs=st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=20))
def test_uncertainty_of_equal_lengths_against_numpy(pairs: list[tuple[float, float]]) -> None:
    """Catches unpaired spreads, a deviation for a standard error, a prior that never fades, and a missing slope."""
    requests = [(new, old, 7) for new, old in pairs]
    assert compared(requests).uncertainty == pytest.approx(expected_error(requests), rel=1e-7)


@given(requests=REQUESTS)
def test_uncertainty_of_lengths_against_numpy(requests: Requests) -> None:
    """Catches a spread that forgets the lengths; without a gain, so that all ways to count them are the same."""
    balanced = requests + [(old, new, length) for new, old, length in requests]
    found = compared(balanced)
    assert found.gain == pytest.approx(0.0, abs=1e-9)
    assert found.uncertainty == pytest.approx(expected_error(balanced), rel=1e-7)


@given(requests=REQUESTS, errors=st.floats(0.0, 3.0))
def test_properties(requests: Requests, errors: float) -> None:
    """Catches a comparison that depends on who is first or on the order, and weights that are better and worse."""
    found, back = compared(requests), compared([(old, new, length) for new, old, length in requests])
    assert found.uncertainty > 0.0
    assert back.gain == pytest.approx(-found.gain, abs=1e-9)
    assert back.uncertainty == pytest.approx(found.uncertainty, rel=1e-6)
    assert found.is_better(errors) == (found.gain > errors * found.uncertainty)
    assert found.is_worse(errors) == (found.gain < -errors * found.uncertainty)
    assert not (found.is_better(errors) and found.is_worse(errors))
    turned = compared(requests[::-1])
    assert (turned.gain, turned.uncertainty) == pytest.approx((found.gain, found.uncertainty), abs=1e-9)


@given(requests=REQUESTS, factor=st.integers(2, 9))
def test_only_ratios_of_lengths_count(requests: Requests, factor: int) -> None:
    """Catches longer traffic that looks more, or less, certain."""
    found, longer = compared(requests), compared([(new, old, length * factor) for new, old, length in requests])
    assert (longer.gain, longer.uncertainty) == pytest.approx((found.gain, found.uncertainty), abs=1e-9)


def test_long_requests_count_more() -> None:
    """Catches weights that are published for what they do on short requests, and lose on most tokens."""
    assert compared([(2.0, 1.0, 10)] * 3 + [(1.0, 2.0, 100)]).gain < 0.0
    assert compared([(2.0, 1.0, 100)] + [(1.0, 2.0, 10)] * 3).gain > 0.0


def test_requests_without_output_are_none() -> None:
    """Catches a division by zero, and requests that say nothing but move the gain."""
    assert compared([(3.0, 1.0, 0)]).requests == 0
    assert not compared([(3.0, 1.0, 0)]).is_better(0.0)
    assert compared([(3.0, 1.0, 0), (1.0, 2.0, 5)]).gain == pytest.approx(-1.0)


@given(values=st.lists(TOKENS, min_size=1, max_size=20))
def test_the_same_weights_are_neither_better_nor_worse(values: list[float]) -> None:
    """Catches an update that is published, or rolled back, for nothing."""
    found = compared([(value, value, 10) for value in values])
    assert not found.is_better(0.0)
    assert not found.is_worse(0.0)


def test_a_gain_gets_certain_with_requests() -> None:
    """Catches one lucky request that publishes, and a small steady gain that never does."""
    assert not compared([(1.1, 1.0, 10)]).is_better(2.0)
    assert compared([(1.1, 1.0, 10)] * 16).is_better(2.0)
    assert compared([(1.0, 1.1, 10)] * 16).is_worse(2.0)
    assert not compared([(3.0, 1.0, 10), (1.0, 3.0, 10)] * 8).is_better(0.5)


def test_without_requests_nothing_is_said() -> None:
    """Catches a division by zero, and untestable weights that pass."""
    found = compare([], [])
    assert found.requests == 0
    assert not any((found.is_better(0.0), found.is_worse(0.0), found.is_better(-1.0), found.is_worse(-1.0)))


def test_scores_that_are_no_numbers_publish_nothing() -> None:
    """Catches NaN that passes a comparison the wrong way round."""
    broken = scores([1.0, math.nan])
    for found in (compare(broken, scores([1.0, 1.0])), compare(scores([1.0, 1.0]), broken)):
        assert not found.is_better(0.0)
        assert not found.is_worse(0.0)


def test_scores_of_other_requests_are_refused() -> None:
    """Catches two lists that are not of the same requests, and a rest that is ignored."""
    for new, old in (([1.0, 2.0], [1.0]), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="zip"):
            compare(scores(new), scores(old))


@given(values=VALUES, prior=st.floats(0.01, 2.0))
def test_variance_lies_between_the_prior_and_the_sample(values: list[float], prior: float) -> None:
    """Catches a prior that does not count, one in the wrong unit, and a sum that is not divided."""
    found = variance(values, prior)
    sample = float(np.var(values, ddof=1)) if len(values) > 1 else prior**2
    low, high = sorted((sample, prior**2))
    assert low * (1.0 - 1e-9) - 1e-12 <= found <= high * (1.0 + 1e-9)
    assert variance(values * 500, prior) == pytest.approx(float(np.var(values)), rel=0.01, abs=0.01 * prior**2)


def test_the_prior_counts_as_much_as_two_values() -> None:
    """Catches a prior that drowns the sample, or that is gone at once."""
    assert variance([3.0], 0.5) == pytest.approx(0.25)
    assert variance([3.0, 3.0, 3.0], 0.5) == pytest.approx(0.25 * 2 / 4)
    assert variance([0.0, 2.0], 0.0) == pytest.approx(2.0 / 3)
