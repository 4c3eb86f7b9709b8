"""What was accepted, remembered with the right weight."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.serving.acceptance import Average, Calibration, RequestFactor

MEMORY = 1 - 1 / 64


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=40))
def test_calibration_against_the_definition(judged):
    """Catches bins that share what they learned, a prior of the wrong weight, and weights that do not decay."""
    priors = (0.1, 0.5, 0.9)
    calibration = Calibration(priors)
    for index, accepted in judged:
        calibration.note(index, accepted)
    for index, prior in enumerate(priors):
        own = [accepted for i, accepted in judged if i == index]
        weights = [MEMORY ** (len(own) - 1 - age) for age in range(len(own))]
        start = 3 * MEMORY ** len(own)
        expected = (prior * start + sum(w for w, a in zip(weights, own, strict=True) if a)) / (start + sum(weights))
        assert calibration.rate(index) == pytest.approx(expected)


def test_calibration_follows_a_change():
    """Catches a rate that an old record holds back for ever."""
    calibration = Calibration([0.5])
    for accepted, expected in ((True, 1.0), (False, 0.0)):
        for _ in range(400):
            calibration.note(0, accepted)
        assert calibration.rate(0) == pytest.approx(expected, abs=0.01)


def test_request_factor():
    """Catches a factor that one token throws about, leaves its bounds, or ignores what was expected."""
    factor = RequestFactor()
    assert factor.value == 1.0
    factor.note(0.5, False)
    assert 0.9 < factor.value < 1.0
    for _ in range(300):
        factor.note(0.8, False)
    assert factor.value == 0.5
    for _ in range(300):
        factor.note(0.3, True)
    assert factor.value == 1.5
    for _ in range(300):
        for accepted in (True, True, False, False):
            factor.note(0.5, accepted)
    assert factor.value == pytest.approx(1.0, abs=0.03)


def test_average():
    """Catches a start that never fades or counts for nothing, and a mean that never forgets."""
    average = Average(1.0, memory=4, weight=1)
    for sample, expected in ((3.0, 2.0), (5.0, 3.0), (7.0, 4.0), (8.0, 5.0), (1.0, 4.0)):
        average.note(sample)
        assert average.value == pytest.approx(expected)
    fresh = Average(0.0, memory=16, weight=0)
    fresh.note(7.0)
    assert fresh.value == 7.0
