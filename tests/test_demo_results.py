"""The figures that a run's measures add up to."""

import pytest

from hf_osd.demo.display import percent, sparkline
from hf_osd.demo.results import (
    CONTENDERS,
    ONLINE,
    STATIC,
    STOCK,
    DemoResult,
    Difference,
    Measure,
    Round,
    aggregate,
    moving,
)


def _round(index: int) -> Round:
    measure = Measure(tokens=10, seconds=0.5, learning_seconds=0.5, drafted=20, accepted=index, passes=4, updates=1)
    return Round(dict.fromkeys(CONTENDERS, measure))


def test_rates_are_ratios_of_sums() -> None:
    """Would catch a mean of per-request rates, in which a one-token request weighs as much as a long one."""
    one = Round({ONLINE: Measure(tokens=1, seconds=1.0, drafted=1, accepted=1, passes=1)})
    two = Round({ONLINE: Measure(tokens=99, seconds=1.0, learning_seconds=2.0, drafted=99, accepted=0, passes=49)})
    both = aggregate([one, two], ONLINE)
    assert both.acceptance == pytest.approx(0.01)
    assert both.tokens_per_second == pytest.approx(50)
    assert both.tokens_per_second_with_learning == pytest.approx(25)
    assert both.tokens_per_pass == pytest.approx(2)


def test_what_is_not_known_is_none() -> None:
    """Would catch a zero acceptance being reported for contenders that draft nothing or do not say."""
    nothing = aggregate([Round({STOCK: Measure(tokens=5, seconds=1.0)})], STOCK)
    assert nothing.acceptance is None
    assert nothing.tokens_per_pass is None
    assert percent(None) == "-"


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 161])
def test_quarters_are_disjoint_parts_of_the_run(size: int) -> None:
    """Would catch a last quarter that starts too early, or is empty in a short run."""
    result = DemoResult([_round(index) for index in range(size)])
    quarters = [result.quarter(which) for which in (1, 2, 3, 4)]
    assert all(quarters)
    assert quarters[3][-1] is result.rounds[-1]
    if size >= 4:
        assert [one for quarter in quarters for one in quarter] == result.rounds


def test_moving_averages_look_back_and_never_ahead() -> None:
    """Would catch curves that show learning before it happened."""
    curve = moving([_round(index) for index in range(5)], STATIC, window=2)
    assert [one.accepted for one in curve] == [0, 1, 3, 5, 7]


def test_only_our_own_differences_that_are_no_ties_are_mismatches() -> None:
    """Would catch a failing exit code for transformers' own near tie, or a passing one for a bug of ours."""
    kinds = [(STOCK, False), (ONLINE, True), (ONLINE, False), (STATIC, False)]
    differences = tuple(Difference(0, name, 3, 0.5, tie) for name, tie in kinds)
    result = DemoResult([Round({}, differences)])
    assert result.mismatches == list(differences[2:])


@pytest.mark.parametrize("length", [0, 1, 59, 60, 61, 1000])
def test_sparklines_fit_their_width_and_end_with_the_newest_value(length: int) -> None:
    """Would catch a chart that wraps, or that hides the present behind the past."""
    line = sparkline([0.0] * (length - 1) + [1.0] * (length > 0), width=60)
    assert len(line) == min(length, 60)
    assert line.endswith("█" if length else "")
    assert percent(0.571) == ".57"
    assert percent(1.0) == "1.00"
