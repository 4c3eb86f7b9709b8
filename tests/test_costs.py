"""Measured costs of forwards: what was measured, and what is read between and beyond."""

import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.serving.costs import CostTable


def table(points, batch=1, context=100):
    costs = CostTable()
    for tokens, seconds in points:
        costs.note(batch, context, tokens, seconds)
    return costs


def test_nothing_measured():
    """Catches a figure made up for a batch size that was never served."""
    assert CostTable().curve(1, 10, 4) is None
    assert table([(1, 2.0)], batch=2).curve(1, 100, 4) is None


def test_lines_between_and_beyond():
    """Catches interpolation from the wrong neighbours, and a slope that goes on below the first point."""
    costs = table([(9, 6.0), (2, 3.0), (5, 4.5)])  # in any order
    assert costs.curve(1, 100, 12) == pytest.approx(
        [3.0, 3.0, 3.0, 3.5, 4.0, 4.5, 4.875, 5.25, 5.625, 6, 6 + 3 / 7, 6 + 6 / 7, 6 + 9 / 7]
    )
    assert table([(3, 2.0)]).curve(1, 100, 5) == [2.0] * 6
    assert table([(1, 3.0), (2, 2.0)]).curve(1, 100, 4) == [3.0, 3.0, 2.0, 2.0, 2.0]  # noise does not go on falling


def test_one_slow_round_in_a_new_context():
    """Catches a hiccup at the first round of a longer text, from which several tokens look dear for good."""
    costs = CostTable()
    for _ in range(3):
        for tokens in (1, 2, 4, 8):
            costs.note(1, 100, tokens, 1.0 + 0.01 * tokens)
    costs.note(1, 200, 1, 2.02)
    costs.note(1, 200, 3, 5.0)
    curve = costs.curve(1, 200, 8)
    assert curve[1] == 2.02
    assert curve[8] == pytest.approx(2.02 * 1.08 / 1.01)  # as in the shorter one
    for _ in range(3):
        costs.note(1, 200, 8, 3.0)
    assert costs.curve(1, 200, 8)[8] == 3.0


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 9.0)), min_size=1, max_size=12, unique_by=lambda p: p[0]))
def test_what_was_measured_is_what_is_read(points):
    """Catches a curve that smooths over its own points, or leaves the range of its neighbours between them."""
    curve = table(points).curve(1, 100, 20)
    known = dict(points)
    for tokens, seconds in known.items():
        assert curve[tokens] == pytest.approx(seconds)
    for tokens in range(min(known), max(known) + 1):
        below, above = max(t for t in known if t <= tokens), min(t for t in known if t >= tokens)
        low, high = sorted((known[below], known[above]))
        assert low - 1e-9 <= curve[tokens] <= high + 1e-9


def test_the_median_of_recent_samples():
    """Catches a hiccup that counts, a curve that is kept behind a new sample, and a table that never forgets."""
    costs = table([(1, 1.0), (1, 1.0), (1, 50.0)])
    assert costs.curve(1, 100, 1) == [1.0, 1.0]
    for _ in range(9):
        costs.note(1, 100, 1, 2.0)
    assert costs.curve(1, 100, 1) == [2.0, 2.0]


def test_contexts_by_powers_of_two():
    """Catches lengths mixed into one figure, or a figure of a far one where a near one is known."""
    costs = CostTable()
    for context, seconds in ((10, 1.0), (100, 2.0), (3000, 3.0)):
        costs.note(1, context, 1, seconds)
    costs.note(2, 1000, 1, 9.0)
    assert [costs.curve(1, context, 1)[1] for context in (1, 15, 64, 127, 300, 2000, 9999)] == [1, 1, 2, 2, 2, 3, 3]


def test_concurrent_requests():
    """Catches a curve that another thread throws away while it is read, and a table that grows under a reader."""
    costs, failures = CostTable(), []
    costs.note(0, 1, 1, 1.0)

    def serve(seed):
        try:
            for step in range(1500):
                costs.note(step % 7, 1 << (step * seed) % 50, step % 11, 1.0)
                assert costs.curve(0, 1, 3) == [1.0] * 4
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=serve, args=(seed,)) for seed in (1, 3, 7, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not failures
