"""The selector, over arbitrary scores: what it can lose against the static draft, and how soon it follows a change."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_osd.learning.selector import ENTRY, HIGHEST_ENTRY, LEAD, MEMORY, STATIC, STATIC_MEMORY, Selector

RATE = st.floats(0.0, 1.0)
STREAM = st.lists(st.tuples(RATE, RATE, RATE), max_size=120)
NAMES = (STATIC, "half", "whole")
ROUNDING = 1e-9
# What a stay of learned weights can lose: for each of the two candidates, what the static draft can be behind, the
# lead, and the request that shows it.
LOSS = 2 * (STATIC_MEMORY + LEAD + 1.0)


def selector_of(*names: str) -> Selector:
    selector = Selector()
    for name in names or NAMES[1:]:
        selector.enter(name, like=STATIC)
    return selector


def run(selector: Selector, stream: list[tuple[float, ...]]) -> list[tuple[str, float]]:
    """Who led on each request, and what that gained over the static draft."""
    led = []
    for rates in stream:
        scores = dict(zip(NAMES, rates, strict=True))
        led.append((selector.leader, scores[selector.leader] - scores[STATIC]))
        selector.add(scores)
    return led


def stays(led: list[tuple[str, float]]) -> list[float]:
    """What each stay of learned weights, between two of the static draft, gained in all."""
    found: list[float] = []
    for place, (name, gain) in enumerate(led):
        if name != STATIC:
            if not place or led[place - 1][0] == STATIC:
                found.append(0.0)
            found[-1] += gain
    return found


@given(stream=STREAM)
@settings(deadline=None)
def test_a_stay_loses_little(stream: list[tuple[float, float, float]]) -> None:
    """Catches learned weights that are kept however much they lose: from any peak, the bound of `LOSS`."""
    for at in range(len(stream)):
        led = run(selector_of(), stream)
        lowest, total = 0.0, 0.0
        for name, gain in led[at:]:
            if name == STATIC:
                break
            total += gain
            lowest = min(lowest, total)
        assert lowest >= -LOSS - ROUNDING


@given(stream=STREAM)
@settings(deadline=None)
def test_losses_do_not_add_up(stream: list[tuple[float, float, float]]) -> None:
    """
    Catches an adversary that lets learned weights lead before each stay and lose in it, for ever.

    Each stay loses `LOSS` at most, and a stay that lost doubles what it takes to begin the next
    one, up to a bound: so there are as many of them as the doubled entries fit into what the candidates led by.
    """
    led = run(selector_of(), stream)
    lost = [gain for gain in stays(led) if gain < 0.0]
    needed = sum(min(ENTRY * 2**number, HIGHEST_ENTRY) for number in range(len(lost) - 1))
    assert all(gain >= -LOSS - ROUNDING for gain in lost)
    if all(gain < 0.0 for gain in stays(led)):
        assert needed <= 2 * sum(max(max(rates[1:]) - rates[0], 0.0) for rates in stream) + ROUNDING


@given(before=STREAM, ahead=st.floats(0.05, 1.0), name=st.sampled_from(NAMES[1:]))
@settings(deadline=None)
def test_it_follows_a_change(before: list[tuple[float, float, float]], ahead: float, name: str) -> None:
    """Catches a past that weighs on for ever: who is better from now on leads within a bounded number of requests."""
    selector = selector_of()
    run(selector, before)
    scores = {other: ahead if other == name else 0.0 for other in NAMES}
    within = math.ceil((MEMORY + 2 * HIGHEST_ENTRY) / ahead) + 2
    for _ in range(within):
        selector.add(scores)
    assert selector.leader == name


@given(before=STREAM, ahead=st.floats(0.05, 1.0))
@settings(deadline=None)
def test_the_static_draft_comes_back_sooner(before: list[tuple[float, float, float]], ahead: float) -> None:
    """Catches a safe expert that waits as long as the others."""
    selector = selector_of()
    run(selector, before)
    for _ in range(math.ceil((STATIC_MEMORY + LEAD) / ahead) + 2):
        selector.add({STATIC: ahead, "half": 0.0, "whole": 0.0})
    assert selector.leader == STATIC


def test_new_weights_lead_within_a_few_requests() -> None:
    """Catches learned weights that are better from the start, and go live after dozens of requests."""
    selector = selector_of()
    led = run(selector, [(0.3, 0.32, 0.38)] * 5)
    assert [name for name, _ in led] == [STATIC] * 3 + ["whole"] * 2


def test_a_stay_that_gained_lowers_the_entry() -> None:
    """Catches weights that are kept out for ever by losses that gains have long made up for."""
    selector = selector_of("whole")

    def add(static: float, whole: float, count: int) -> None:
        for _ in range(count):
            selector.add({STATIC: static, "whole": whole})

    add(0.0, 0.3, 1)
    assert selector.leader == "whole"
    add(0.5, 0.0, 1)
    assert selector.leader == STATIC  # the stay lost
    add(0.0, 0.3, 1)
    assert selector.leader == STATIC
    add(0.0, 0.3, 2)
    assert selector.leader == "whole"
    add(0.0, 0.3, 5)
    add(0.5, 0.0, 1)
    assert selector.leader == STATIC  # the stay gained
    add(0.0, 0.3, 3)
    assert selector.leader == "whole"


def test_candidates_come_and_go() -> None:
    """Catches a newcomer that has to make up for a past it had no part in, and one that stays after it has left."""
    selector = selector_of("whole")
    for _ in range(9):
        selector.add({STATIC: 0.1, "whole": 0.9})
    selector.enter("frozen-1", like="whole")
    assert selector.sums["frozen-1"] == selector.sums["whole"] == 0.0
    selector.leave("frozen-1")
    assert selector.add({STATIC: 0.1, "whole": 0.9}) == "whole"


@given(before=STREAM, after=STREAM)
@settings(deadline=None)
def test_a_restart_changes_nothing(before: list[tuple[float, ...]], after: list[tuple[float, ...]]) -> None:
    """Catches a sum, or what a stay has gained, that is not saved."""
    selector, restored = selector_of(), Selector()
    run(selector, before)
    restored.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    assert run(selector, after) == run(restored, after)
    assert selector.sums == pytest.approx(restored.sums)
