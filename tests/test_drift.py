"""Sums of shortfalls and moving averages, against the definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traffic import request

from hf_osd.learning.drift import MovingAverage, ShortfallSum
from hf_osd.records import Observation

SHORTFALLS = st.lists(st.integers(-10, 10), min_size=1, max_size=60)  # tenths: exact sums
REQUESTS = [request(number) for number in range(12)]


def largest_sum(values: list[int]) -> int:
    """Of all stretches that end with the last value; the empty one is a stretch."""
    return max(sum(values[start:]) for start in range(len(values) + 1))


@given(shortfalls=SHORTFALLS, limit=st.integers(1, 30))
def test_it_is_the_largest_sum_of_a_stretch_that_ends_now(shortfalls: list[int], limit: int) -> None:
    """Catches a sum that goes below zero, so that a good past pays for a bad present, and one that never recovers."""
    alarm = ShortfallSum(limit)
    for number, shortfall in enumerate(shortfalls, start=1):
        raised = alarm.add(shortfall, REQUESTS[0])
        assert alarm.total == largest_sum(shortfalls[:number])
        assert raised == (alarm.total > limit)


@given(shortfalls=SHORTFALLS, limit=st.integers(1, 30))
def test_no_stretch_loses_more_than_the_limit_and_one_request(shortfalls: list[int], limit: int) -> None:
    """Catches a broken promise: every stretch before the alarm, and the one that ends with it."""
    alarm = ShortfallSum(limit)
    raised = [alarm.add(shortfall, REQUESTS[0]) for shortfall in shortfalls]
    until = raised.index(True) + 1 if True in raised else len(raised)
    before = shortfalls[: until - 1] if True in raised else shortfalls
    stretches = [sum(before[a:b]) for a in range(len(before)) for b in range(a + 1, len(before) + 1)]
    assert all(stretch <= limit for stretch in stretches)
    if True in raised:
        ending = [sum(shortfalls[start:until]) for start in range(until)]
        assert limit < max(ending) <= limit + shortfalls[until - 1]


def test_the_requests_of_the_stretch_are_kept() -> None:
    """Catches suspects from before the stretch, too many of them, or the oldest instead of the latest."""
    alarm = ShortfallSum(100.0)

    def numbers() -> list[int]:
        return [next(i for i, known in enumerate(REQUESTS) if known is o) for o in alarm.requests]

    def add(shortfall: float, observation: Observation) -> None:
        alarm.add(shortfall, observation)

    add(1.0, REQUESTS[0])
    add(-2.0, REQUESTS[1])
    assert numbers() == []
    for number in range(2, 5):
        add(1.0, REQUESTS[number])
    add(-0.5, REQUESTS[5])
    assert numbers() == [2, 3, 4, 5]
    for number in range(6, 12):
        add(1.0, REQUESTS[number])
    assert 1 < len(numbers()) < 10
    assert numbers() == list(range(12))[-len(numbers()) :]
    alarm.clear()
    assert (alarm.total, numbers()) == (0.0, [])
    assert not alarm.add(0.0, REQUESTS[0])


def test_a_shortfall_that_is_no_number_raises_no_alarm_for_ever() -> None:
    """Catches a sum that stays NaN: no later change would be noticed."""
    alarm = ShortfallSum(1.0)
    assert not alarm.add(math.nan, REQUESTS[0])
    assert not alarm.add(0.9, REQUESTS[0])
    assert alarm.add(0.9, REQUESTS[0])


@given(values=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30), span=st.integers(1, 10))
def test_moving_average(values: list[float], span: int) -> None:
    """Catches a first value that weighs for ever, an average outside its values, and a wrong span."""
    average = MovingAverage(span)
    expected = 0.0
    for number, value in enumerate(values, start=1):
        average.add(value)
        share = 1.0 / min(number, span)
        expected = (1.0 - share) * expected + share * value
        assert average.value == pytest.approx(expected, abs=1e-12)
        if number <= span:
            assert average.value == pytest.approx(sum(values[:number]) / number, abs=1e-12)
    assert min(values) - 1e-12 <= average.value <= max(values) + 1e-12


def test_a_restarted_average_knows_one_value() -> None:
    """Catches a past that survives, and a value that counts as a whole span."""
    average = MovingAverage(4)
    for _ in range(10):
        average.add(1.0)
    average.restart(0.2)
    assert (average.value, average.count) == (0.2, 1)
    average.add(0.4)
    assert average.value == pytest.approx(0.3)
