"""Sums of shortfalls, and how unusual they are, against the definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traffic import request

from hf_osd.learning.drift import _FEW, _PRIOR_SPREAD, ShortfallSum, errors_below
from hf_osd.records import Observation

SHORTFALLS = st.lists(st.integers(-10, 10), min_size=1, max_size=60)  # tenths: exact sums
RATES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40)
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


@given(shortfalls=SHORTFALLS)
def test_it_counts_the_requests_since_the_sum_left_zero(shortfalls: list[int]) -> None:
    """Catches a count of all requests, one that stops at the suspects that are kept, and one that outlives the sum."""
    alarm = ShortfallSum(5)
    for number, shortfall in enumerate(shortfalls, start=1):
        alarm.add(shortfall, REQUESTS[0])
        totals = [largest_sum(shortfalls[:until]) for until in range(number + 1)]
        assert alarm.count == number - max(until for until, total in enumerate(totals) if total == 0)
        assert len(alarm.requests) == min(alarm.count, 8)
    alarm.clear()
    assert alarm.count == 0


@given(now=RATES, before=RATES)
def test_errors_below_against_numpy(now: list[float], before: list[float]) -> None:
    """Catches the wrong sign, a spread that includes the values in question, and a standard error of one mean only."""
    found = errors_below(now, before)
    if len(before) < _FEW:
        assert found == 0.0
        return
    deviations = np.concatenate((np.array(before) - np.mean(before), [_PRIOR_SPREAD] * 2))
    spread = np.sqrt(np.sum(deviations**2) / (len(before) + 1))
    error = spread * np.sqrt(1.0 / len(now) + 1.0 / len(before))
    assert found == pytest.approx((np.mean(before) - np.mean(now)) / error, abs=1e-7)


def test_few_values_are_nothing_to_compare_with() -> None:
    """Catches a change that is seen where nothing is known of what is usual, and an error where nothing is asked."""
    assert errors_below([0.0], [1.0] * 7) == 0.0
    assert errors_below([0.0], [1.0] * 8) > 4.5
    assert errors_below([], [1.0] * 8) == 0.0
    assert errors_below([], []) == 0.0


def test_what_varies_anyway_is_not_unusual() -> None:
    """Catches a drop that is judged by its size alone, and one that does not get clearer with more requests."""
    steady, mixed = [0.5] * 16, [0.1, 0.9] * 8
    assert errors_below([0.2] * 4, steady) > 4.5
    assert errors_below([0.2] * 4, mixed) < 2.0
    assert errors_below([0.2] * 8, mixed) > errors_below([0.2] * 4, mixed) > errors_below([0.2], mixed) > 0.0
    assert errors_below([0.8], steady) < 0.0
