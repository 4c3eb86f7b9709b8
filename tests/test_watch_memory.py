"""What a watch remembers: under new weights, after an alarm, of the requests that led to it, and over a restart."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from watched import PAIRS, ROUNDING, Pair, add, alarms, score, watch_of

from hf_osd.learning.watch import _ALLOWANCE, _CREDIT, _LATEST, _LOSS_LIMIT, _NEEDED, Alarm, Watch

# New weights, and alarms that are dealt with.


def test_other_weights_inherit_what_was_lost() -> None:
    """Catches weights that are published so often that none of them loses enough, and all of them lose."""
    watch = watch_of()
    assert alarms(watch, [(0.4, 0.55)]) == [None]
    watch.begin([(score(0.4), score(0.5))] * 8)
    assert alarms(watch, [(0.4, 0.55)]) == ["loss"]


def test_other_weights_begin_with_what_they_were_tested_on() -> None:
    """Catches what earlier weights did, as a promise of the new ones."""
    watch = watch_of([(0.9, 0.1)] * 32)
    alarms(watch, [(0.9, 0.1)] * 5)
    watch.begin([(score(0.4), score(0.3))] * 3)
    assert (watch.usual, watch.advantage) == pytest.approx((0.4, 0.1))
    watch.begin([])
    assert (watch.usual, watch.advantage) == (0.0, 0.0)


def test_an_alarm_that_was_dealt_with_is_over() -> None:
    """Catches weights that went live again, and give way again to what others have lost."""
    for pairs, alarm in (([(0.5, 0.65)] * 2, "loss"), ([(0.0, 0.0)] * 2, "drift")):
        watch = watch_of([(0.9, 0.6)] * 16)
        assert alarm in alarms(watch, pairs)
        watch.clear()
        assert (watch.suspects("loss"), watch.suspects("drift")) == ([], [])
        assert watch.usual > 0.7
        assert alarms(watch, [(0.89, 0.9)] * 10) == [None] * 10


def test_alarms_go_on_until_they_are_dealt_with() -> None:
    """Catches an alarm that is raised once, and lost where nobody could act on it."""
    watch = watch_of()
    assert alarms(watch, [(0.4, 0.7)] * 3) == ["loss"] * 3


def test_what_other_weights_were_tested_on_is_not_in_question() -> None:
    """Catches gains on tested requests that hide a loss, since requests before them had lost as well."""
    watch = watch_of([(0.5, 0.5)] * 8)
    assert alarms(watch, [(0.5, 0.532)] * 6) == [None] * 6
    watch.begin([(score(0.7), score(0.5))] * 24)
    assert alarms(watch, [(0.5, 0.51)]) == ["loss"]
    assert watch.has_changed


# Suspects.


def numbers(watch: Watch, alarm: Alarm) -> list[int]:
    return [int(suspect.prompt_ids[0]) for suspect in watch.suspects(alarm)]


def test_suspects_are_the_requests_that_led_to_the_alarm() -> None:
    """Catches suspects of the other sum, from before the stretch, or without the last request."""
    watch = watch_of([(0.8, 0.8)] * 16)
    for number, (live, initial) in enumerate([(0.8, 0.85), (0.8, 0.6), (0.8, 0.9), (0.1, 0.1), (0.1, 0.3)]):
        alarm = add(watch, live, initial, number=number)
    assert alarm == "loss"
    assert numbers(watch, "loss") == [2, 3, 4]
    assert numbers(watch, "drift") == [3, 4]


@given(tested=PAIRS, pairs=PAIRS)
def test_the_request_that_raises_an_alarm_is_a_suspect(tested: list[Pair], pairs: list[Pair]) -> None:
    """Catches an alarm with nothing to look at."""
    watch = watch_of(tested)
    for number, (live, initial) in enumerate(pairs):
        alarm = add(watch, live, initial, number=number)
        if alarm is not None:
            found = numbers(watch, alarm)
            assert found == list(range(number + 1))[-len(found) :]
            assert 1 <= len(found) <= 8


# Saving.


def through_json(watch: Watch) -> Watch:
    other = watch_of([(0.1, 0.9)] * 9)
    alarms(other, [(0.0, 0.9)] * 9)
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    return other


@given(tested=PAIRS, pairs=PAIRS)
def test_a_saved_watch_knows_what_it_knew(tested: list[Pair], pairs: list[Pair]) -> None:
    """Catches a restart that forgives a loss, and means of requests of before the state."""
    watch = watch_of(tested)
    alarms(watch, pairs)
    other = through_json(watch)
    assert (other.usual, other.advantage) == (watch.usual, watch.advantage)
    assert other.state_dict() == watch.state_dict()
    assert (other.suspects("loss"), other.suspects("drift")) == ([], [])


@given(loss=st.floats(0.003, 0.19), saved=st.integers(0, 70))
def test_a_restart_forgives_no_loss(loss: float, saved: int) -> None:
    """Catches a server that restarts often, and never notices that its draft loses."""
    watch = watch_of()
    first = alarms(watch, [(0.2, 0.2 + loss)] * saved)
    if "loss" in first:
        return
    again = alarms(through_json(watch), [(0.2, 0.2 + loss)] * 100)
    requests = saved + again.index("loss") + 1
    assert (requests - 1) * loss <= _LOSS_LIMIT + ROUNDING
    assert requests * loss > _LOSS_LIMIT - ROUNDING


def test_a_saved_watch_forgets_the_oldest_as_before() -> None:
    """Catches a window that grows without bound once it was saved."""
    other = through_json(watch_of([(0.1, 0.1)] * 4))
    alarms(other, [(0.5, 0.5)] * (_LATEST + 8))
    assert other.usual == pytest.approx(0.5)
    assert len(other.state_dict()["since"]) == _LATEST
    assert len(watch_of([(0.5, 0.5)] * 50).state_dict()["tested"]) == _LATEST


def test_a_restart_delays_no_change() -> None:
    """Catches requests in question that count as what was usual, once they were saved."""
    watch = watch_of([(0.9, 0.9)] * 8)
    assert alarms(watch, [(0.35, 0.35)]) == [None]
    assert alarms(through_json(watch), [(0.35, 0.35)]) == ["drift"]


@given(PAIRS)
def test_the_credit_is_what_may_still_be_lost(pairs: list[tuple[float, float]]) -> None:
    """Catches losses that are forgotten with an alarm, and gains that are saved up without bound."""
    watch, credit = watch_of([]), _CREDIT
    for live, initial in pairs:
        if alarms(watch, [(live, initial)]) != [None]:
            watch.clear()
            watch.begin([])
        credit = min(_CREDIT, credit + _ALLOWANCE + live - initial)
    assert watch.may_risk == through_json(watch).may_risk
    assume(abs(credit - _NEEDED) > 1e-6)
    assert watch.may_risk == (credit >= _NEEDED)
