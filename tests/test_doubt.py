"""What the requests after an alarm say of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.archive import Checkpoint
from hf_osd.learning.doubt import _AHEAD, _BEHIND, _ENOUGH, _MOST, Doubt, Drop, Suspension, Verdict
from hf_osd.learning.judge import Score
from hf_osd.records import Observation

RATE = st.floats(0.0, 1.0)
LENGTH = st.floats(0.1, 4.0)


def observation(number: int) -> Observation:
    ids, mass = torch.full((1,), number), torch.zeros(1)
    return Observation(ids, ids, ids[:, None], mass[:, None], mass, ids, ids.bool())


def suspension() -> Suspension:
    return Suspension(Checkpoint({}, {}), [observation(0)], usual=0.5, is_change=True)


def add(doubt: Doubt, live: float, suspended: float = 0.0, length: float = 1.0) -> Verdict | None:
    scores = (Score(live, 0.0, 10), Score(suspended, 0.0, 10))
    return doubt.add(observation(len(doubt.requests)), *scores, length)


@given(st.lists(st.tuples(RATE, RATE, LENGTH), min_size=_MOST, max_size=_MOST))
def test_weights_come_back_where_they_are_ahead(requests: list[tuple[float, float, float]]) -> None:
    """Catches a lead that counts the wrong way or not by length, and a doubt that never ends."""
    doubt, lead = suspension(), 0.0
    for live, suspended, length in requests:
        lead += length * (suspended - live)
        verdict = add(doubt, live, suspended, length)
        if verdict is not None:
            break
        assert -_BEHIND < lead < _AHEAD
    assert verdict == ("chance" if lead >= _AHEAD else "so")
    assert verdict == "chance" or lead <= -_BEHIND or len(doubt.requests) == 1 + _MOST


def test_weights_that_are_as_good_do_not_come_back() -> None:
    """Catches a swap for nothing, and learning that waits for ever."""
    doubt = suspension()
    assert [add(doubt, 0.5, 0.5) for _ in range(_MOST)] == [None] * (_MOST - 1) + ["so"]


BEFORE = (0.5, 0.6, 0.4, 0.55, 0.45, 0.65, 0.35, 0.5)


@pytest.mark.parametrize(
    ("since", "verdict"), [((0.1,) * 4, "so"), ((0.1, 0.2, 0.1, 0.2), "so"), ((0.5,) * 4, "chance")]
)
def test_a_drop_is_believed_where_it_lasts(since: tuple[float, ...], verdict: Verdict) -> None:
    """Catches a few bad requests that make learning turn away from all that came before."""
    doubt = Drop([observation(0)], 0.5, BEFORE)
    assert len(since) == _ENOUGH
    assert [add(doubt, rate) for rate in since] == [None] * (_ENOUGH - 1) + [verdict]


def test_a_drop_is_measured_by_how_much_requests_differ() -> None:
    """Catches a drop that is believed although requests were as bad before, every other time."""
    before = (0.9, 0.1) * 8
    doubt = Drop([observation(0)], 0.5, before)
    assert [add(doubt, rate) for rate in (0.1, 0.1, 0.9, 0.1)][-1] == "chance"


def test_requests_of_a_doubt_are_kept() -> None:
    """Catches requests that go missing from what the traffic is believed to be now."""
    for doubt in (suspension(), Drop([observation(0)], 0.5, BEFORE)):
        for _ in range(3):
            add(doubt, 0.5)
        assert [int(one.prompt_ids[0]) for one in doubt.requests] == [0, 1, 2, 3]
