"""The learning rate: which way it goes, and how far."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.journal import Decision
from hf_osd.learning.path import MIXING
from hf_osd.learning.rates import _HIGHEST, _LOWEST, LearningRate

RESTART = "restart"
MOVES = st.lists(st.tuples(st.sampled_from((*get_args(Decision), RESTART)), st.sampled_from(MIXING)), max_size=200)


def move(rate: LearningRate, name: str, mixing: float) -> None:
    if name == RESTART:
        rate.restart()
    else:
        rate.follow(name, mixing)


@given(initial=st.floats(1e-6, 1.0), moves=MOVES)
def test_it_moves_the_right_way_within_its_bounds(initial: float, moves: list[tuple[str, float]]) -> None:
    """Catches a rate that runs away or dies out, moves the wrong way, or does not come back."""
    rate = LearningRate(initial, adapts=True)
    lowest, highest = pytest.approx(_LOWEST * initial), pytest.approx(_HIGHEST * initial)
    for name, mixing in moves:
        before = rate.value
        move(rate, name, mixing)
        assert _LOWEST * initial * (1 - 1e-9) <= rate.value <= _HIGHEST * initial * (1 + 1e-9)
        assert rate.scale == pytest.approx(rate.value / initial)
        if name == RESTART:
            assert rate.value == initial
        elif name == "rolled back":
            assert rate.value < before or rate.value == lowest
        elif name != "published":
            assert before <= rate.value <= max(before, initial)
            assert rate.value > before or before >= initial
        elif mixing == 1.0:
            assert rate.value > before or rate.value == highest
        elif mixing < 0.5:
            assert rate.value < before or rate.value == lowest
        else:
            assert rate.value == pytest.approx(before)


def test_a_third_of_the_way_undoes_all_of_it() -> None:
    """Catches a rate that climbs, or falls, where both go live as often."""
    rate = LearningRate(1e-3, adapts=True)
    for mixing in (1 / 3, 1.0, 2 / 3) * 5:
        rate.follow("published", mixing)
    assert rate.scale == pytest.approx(1.0)


def test_harm_counts_more_than_help() -> None:
    """Catches a rate that stays where every other update does harm."""
    rate = LearningRate(1e-3, adapts=True)
    for _ in range(5):
        rate.follow("rolled back")
        rate.follow("published", 1.0)
    assert rate.scale < 0.1


def test_a_few_updates_reach_the_bounds() -> None:
    """Catches steps that are too small to find a rate within a stream."""
    rate = LearningRate(1e-3, adapts=True)
    for _ in range(6):
        rate.follow("rolled back")
    assert rate.scale == pytest.approx(_LOWEST)
    for _ in range(100):
        rate.follow("published", 1.0)
    assert rate.scale == pytest.approx(_HIGHEST)


def test_it_comes_back_where_nothing_is_certain() -> None:
    """Catches a rate that one harmful stretch has made too small for ever, and one that grows without a gain."""
    rate = LearningRate(1e-3, adapts=True)
    for _ in range(6):
        rate.follow("rolled back")
    for _ in range(60):
        rate.follow("held", 1.0)
    assert rate.scale == pytest.approx(1.0)


@given(moves=MOVES)
def test_it_stays_where_it_was_told_to(moves: list[tuple[str, float]]) -> None:
    """Catches `adaptive_learning_rate=False` that adapts."""
    rate = LearningRate(1e-3, adapts=False)
    for name, mixing in moves:
        move(rate, name, mixing)
    assert (rate.value, rate.scale) == (1e-3, 1.0)
