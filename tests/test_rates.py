"""The learning rate: which way it goes, and how far."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.journal import Decision
from hf_osd.learning.rates import _HIGHEST, _LOWEST, LearningRate

RESTART = "restart"
MOVES = st.lists(st.sampled_from((*get_args(Decision), RESTART)), max_size=200)


def move(rate: LearningRate, name: str) -> None:
    if name == RESTART:
        rate.restart()
    else:
        rate.follow(name)


@given(initial=st.floats(1e-6, 1.0), moves=MOVES)
def test_it_moves_the_right_way_within_its_bounds(initial: float, moves: list[str]) -> None:
    """Catches a rate that runs away or dies out, moves the wrong way, or does not come back."""
    rate = LearningRate(initial, adapts=True)
    for name in moves:
        before = rate.value
        move(rate, name)
        assert _LOWEST * initial * (1 - 1e-9) <= rate.value <= _HIGHEST * initial * (1 + 1e-9)
        assert rate.scale == pytest.approx(rate.value / initial)
        if name == "published":
            assert rate.value > before or rate.value == pytest.approx(_HIGHEST * initial)
        elif name == "rolled back":
            assert rate.value < before or rate.value == pytest.approx(_LOWEST * initial)
        elif name == RESTART:
            assert rate.value == initial


def test_harm_counts_more_than_help() -> None:
    """Catches a rate that stays where every other update does harm."""
    rate = LearningRate(1e-3, adapts=True)
    for _ in range(5):
        rate.follow("rolled back")
        rate.follow("published")
    assert rate.scale < 0.1


def test_a_few_updates_reach_the_bounds() -> None:
    """Catches steps that are too small to find a rate within a stream."""
    rate = LearningRate(1e-3, adapts=True)
    for _ in range(6):
        rate.follow("rolled back")
    assert rate.scale == pytest.approx(_LOWEST)
    for _ in range(100):
        rate.follow("published")
    assert rate.scale == pytest.approx(_HIGHEST)


@given(moves=MOVES)
def test_it_stays_where_it_was_told_to(moves: list[str]) -> None:
    """Catches `adaptive_learning_rate=False` that adapts."""
    rate = LearningRate(1e-3, adapts=False)
    for name in moves:
        move(rate, name)
    assert (rate.value, rate.scale) == (1e-3, 1.0)
