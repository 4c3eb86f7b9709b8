"""What the laboratory makes of scores: curves of acceptance, and the figures of the goals."""

from typing import Any

import pytest

from benchmarks.laboratory import goals, streams
from benchmarks.laboratory.curves import Curve, change_on_return, share_to_reach, worst_window
from benchmarks.laboratory.recipes import Recipe


def test_rates_are_of_tokens_and_not_of_requests() -> None:
    """Would catch a mean of means, in which a request of one token counts as much as one of a thousand."""
    curve = Curve([1, 0, 2, 8], [1, 9, 10, 10])
    assert curve.rate(0, 2) == pytest.approx(0.1)
    assert curve.windows(3) == [pytest.approx(0.15), pytest.approx(0.8)]
    assert curve.quarters() == [1.0, 0.0, 0.2, 0.8]
    assert curve.final() == 0.8


def level(*parts: tuple[float, int]) -> Curve:
    """A curve of so much acceptance for so many requests each."""
    rates = [rate for rate, count in parts for _ in range(count)]
    return Curve([10 * rate for rate in rates], [10] * len(rates))


def test_a_level_is_reached_once_a_window_has_it_and_it_is_kept() -> None:
    """Would catch a lucky window that counts, and a level that is reached before anything was measured."""
    assert share_to_reach(level((0.0, 20), (0.5, 80)), 0.5, width=10) == pytest.approx(0.30)
    assert share_to_reach(level((0.5, 100)), 0.5, width=10) == pytest.approx(0.10)
    assert share_to_reach(level((0.9, 10), (0.1, 40), (0.5, 50)), 0.5, width=10) == pytest.approx(0.60)
    assert share_to_reach(level((0.4, 100)), 0.5, width=10) is None


def test_the_worst_window_is_found_wherever_it_is() -> None:
    """Would catch windows that do not overlap, between which a loss can hide, and the sign the wrong way round."""
    static, online = level((0.5, 60)), level((0.6, 15), (0.4, 10), (0.9, 35))
    assert worst_window(online, static, 10) == pytest.approx(-0.1)
    assert worst_window(online, static, 20) == pytest.approx(0.0)
    assert worst_window(online, static, 100) == pytest.approx((0.6 * 15 + 0.4 * 10 + 0.9 * 35) / 60 - 0.5)


def test_a_return_compares_the_end_of_one_visit_with_the_beginning_of_the_next() -> None:
    """Would catch forgetting that is hidden by the fast relearning after it, or by the slow start of the stream."""
    curve = level((0.0, 20), (0.6, 10), (0.9, 30), (0.5, 10), (0.6, 20))
    assert change_on_return(curve, (0, 30), (60, 90), width=10) == pytest.approx(-0.1)


def run_of(name: str, curve: Curve) -> goals.Run:
    reached = [curve.rate(i, i + 1) * 10 for i in range(len(curve))]
    result: dict[str, Any] = {"scores": {"agreed": reached, "positions": [10] * len(curve)}}
    return goals.Run(Recipe(name, name.partition("@")[0]), result)


def test_the_baseline_is_algorithm_1_at_its_own_best_rate() -> None:
    """Would catch a comparison with a learning rate that Algorithm 1 does badly with."""
    found = [
        run_of("static", level((0.1, 100))),
        run_of("algorithm_1@0.1", level((0.2, 100))),
        run_of("algorithm_1@0.2", level((0.1, 50), (0.4, 50))),
        run_of("defaults", level((0.1, 10), (0.5, 90))),
        run_of("offline", level((0.9, 100))),
    ]
    figures = goals.figures(streams.alone("a", 100), found)
    assert set(figures) == {"algorithm_1@0.1", "algorithm_1@0.2", "defaults"}
    assert figures["defaults"]["final_above_algorithm_1"] == pytest.approx(0.1)
    assert figures["defaults"]["share_to_reach_algorithm_1"] == pytest.approx(0.29)
    assert figures["defaults"]["worst_window_above_static"] == pytest.approx(0.36)
    shifted = goals.figures(streams.shift(["a", "b"], 50), found)["defaults"]
    assert set(shifted) == {"worst_window_above_static"}
    back = goals.figures(streams.returning(["a", "b"], 40, 20), found)["defaults"]
    assert back["change_on_return"] == pytest.approx(0.5 - (0.1 * 10 + 0.5 * 30) / 40)
    assert back["change_on_return_static"] == pytest.approx(0.0)


def test_goals_are_met_in_their_own_direction() -> None:
    """Would catch a bold figure in a table that misses its goal, and a level never reached that counts as fast."""
    assert goals.met("share_to_reach_algorithm_1", 0.25)
    assert goals.met("share_to_reach_algorithm_1", None) is False
    assert not goals.met("final_above_algorithm_1", 0.079)
    assert goals.met("worst_window_above_static", -0.004)
    assert goals.met("change_on_return_static", 0.0) is None
