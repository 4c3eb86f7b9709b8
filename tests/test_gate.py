"""The comparison of two sets of scores: against numpy, and what has to hold of any."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.gate import _PRIOR_REQUESTS, _PRIOR_SPREAD, Comparison, compare
from hf_osd.learning.judge import Score

TOKENS = st.floats(0.0, 5.0)
PAIRS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=20)


def scores(values: list[float]) -> list[Score]:
    """Scores by accepted tokens alone; the acceptance says the opposite, so that nobody looks at it."""
    return [Score(1.0 - value / 5.0, value, 10) for value in values]


def compared(pairs: list[tuple[float, float]]) -> Comparison:
    return compare(scores([new for new, _ in pairs]), scores([old for _, old in pairs]))


@given(pairs=PAIRS)
def test_against_numpy(pairs: list[tuple[float, float]]) -> None:
    """Catches unpaired spreads, a standard deviation for a standard error, and a prior that never fades."""
    differences = np.array([new - old for new, old in pairs])
    count = len(differences)
    deviations = np.concatenate((differences - differences.mean(), np.full(_PRIOR_REQUESTS, _PRIOR_SPREAD)))
    error = np.sqrt(np.sum(deviations**2) / (len(deviations) - 1) / count)
    found = compared(pairs)
    assert found.requests == count
    assert found.gain == pytest.approx(differences.mean(), abs=1e-9)
    assert found.uncertainty == pytest.approx(error, rel=1e-9)


@given(pairs=PAIRS, errors=st.floats(0.0, 3.0))
def test_properties(pairs: list[tuple[float, float]], errors: float) -> None:
    """Catches a comparison that depends on who is first or on the order, and weights that are better and worse."""
    found, back = compared(pairs), compared([(old, new) for new, old in pairs])
    assert found.uncertainty > 0.0
    assert back.gain == pytest.approx(-found.gain, abs=1e-9)
    assert back.uncertainty == pytest.approx(found.uncertainty, rel=1e-6)
    assert found.is_better(errors) == (found.gain > errors * found.uncertainty)
    assert not (found.is_better(errors) and found.is_worse(errors))
    assert compared(pairs[::-1]).gain == pytest.approx(found.gain, abs=1e-9)
    certain = found.is_better(errors + 1.0)
    assert not certain or found.is_better(errors)


@given(values=st.lists(TOKENS, min_size=1, max_size=20))
def test_the_same_weights_are_neither_better_nor_worse(values: list[float]) -> None:
    """Catches an update that is published, or rolled back, for nothing."""
    found = compared([(value, value) for value in values])
    assert not found.is_better(0.0)
    assert not found.is_worse(0.0)


def test_a_gain_gets_certain_with_requests() -> None:
    """Catches one lucky request that publishes, and a small steady gain that never does."""
    assert not compared([(1.1, 1.0)]).is_better(2.0)
    assert compared([(1.1, 1.0)] * 16).is_better(2.0)
    assert compared([(1.0, 1.1)] * 16).is_worse(2.0)
    assert not compared([(3.0, 1.0), (1.0, 3.0)] * 8).is_better(0.5)


def test_without_requests_nothing_is_said() -> None:
    """Catches a division by zero, and untestable weights that pass."""
    found = compare([], [])
    assert found.requests == 0
    assert not any((found.is_better(0.0), found.is_worse(0.0), found.is_better(-1.0), found.is_worse(-1.0)))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_scores_that_are_no_numbers_publish_nothing(broken: float) -> None:
    """Catches NaN that passes a comparison the wrong way round."""
    assert not compare(scores([1.0, broken]), scores([1.0, 1.0])).is_better(0.0)
    assert not compare(scores([1.0, 1.0]), scores([1.0, broken])).is_better(0.0)


def test_scores_of_other_requests_are_refused() -> None:
    """Catches two lists that are not of the same requests, and a rest that is ignored."""
    with pytest.raises(ValueError, match="zip"):
        compare(scores([1.0, 2.0]), scores([1.0]))
