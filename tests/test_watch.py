"""Alarms: which losses are harm and which are chance, what is a change of the traffic, and what bounds them."""

import json
import math
from collections.abc import Iterable, Sequence
from functools import cache

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_osd.learning.judge import Score
from hf_osd.learning.watch import (
    _ALLOWANCE,
    _CREDIT,
    _DROP_LIMIT,
    _LATEST,
    _LOSS_LIMIT,
    _NEEDED,
    _SLACK,
    Alarm,
    Watch,
)
from hf_osd.records import Observation

RATE = st.floats(0.0, 1.0)
PAIRS = st.lists(st.tuples(RATE, RATE), max_size=40)
REQUESTS = st.lists(st.tuples(RATE, RATE, st.integers(1, 200)), min_size=1, max_size=60)
ROUNDING = 1e-9

Pair = tuple[float, float]  # acceptance of the live and of the initial weights


@cache
def observation(number: int = 0) -> Observation:
    """A request of its own, with a number in it."""
    ids = torch.full((1,), number)
    mass = torch.zeros(1)
    return Observation(ids, ids, ids[:, None], mass[:, None], mass, ids, ids.bool())


def score(acceptance: float, positions: int = 10) -> Score:
    """A score whose accepted tokens say the opposite, so that nobody looks at them."""
    return Score(acceptance, 5.0 * (1.0 - acceptance), positions)


def watch_of(tested: Iterable[Pair] = ()) -> Watch:
    watch = Watch()
    watch.begin([(score(live), score(initial)) for live, initial in tested])
    return watch


def add(watch: Watch, live: float, initial: float, positions: int = 10, number: int = 0) -> Alarm | None:
    return watch.add(observation(number), score(live, positions), score(initial, positions))


def alarms(watch: Watch, pairs: Iterable[Pair]) -> list[Alarm | None]:
    return [add(watch, live, initial) for live, initial in pairs]


def latest_stretch(losses: Sequence[float]) -> float:
    """The most that is lost over requests one after the other, up to the last one."""
    return max(math.fsum(losses[start:]) for start in range(len(losses) + 1))


def largest_stretch(losses: Sequence[float]) -> float:
    """The most that is lost over requests one after the other."""
    return max(latest_stretch(losses[:until]) for until in range(len(losses) + 1))


# Losses.


@given(loss=st.floats(0.003, 0.5), live=st.floats(0.0, 0.5), before=st.integers(0, 40))
def test_a_uniform_loss_is_noticed_within_the_limit_and_a_request(loss: float, live: float, before: int) -> None:
    """Catches weights that lose a little on every request for ever, and an alarm before anything is lost."""
    watch = watch_of([(live, live + loss)] * before)
    found = alarms(watch, [(live, live + loss)] * 100)
    requests = found.index("loss") + 1
    assert (requests - 1) * loss <= _LOSS_LIMIT + ROUNDING
    assert requests * loss > _LOSS_LIMIT - ROUNDING
    assert watch.advantage == pytest.approx(-loss)


@given(tested=PAIRS, pairs=PAIRS)
def test_no_stretch_loses_more_than_twice_the_limit_without_an_alarm(tested: list[Pair], pairs: list[Pair]) -> None:
    """Catches harm that is taken for chance because of a good past, whatever comes."""
    watch = watch_of(tested)
    losses: list[float] = []
    for live, initial in pairs:
        losses.append(initial - live)
        alarm = add(watch, live, initial)
        assert alarm == "loss" or latest_stretch(losses) <= 2.0 * _LOSS_LIMIT + ROUNDING
        if alarm == "loss":
            assert latest_stretch(losses) > _LOSS_LIMIT - ROUNDING
            watch.clear()
            losses.clear()


@given(tested=PAIRS, pairs=PAIRS)
def test_a_loss_while_behind_is_no_chance(tested: list[Pair], pairs: list[Pair]) -> None:
    """Catches twice the limit for weights that are no better than the initial ones."""
    watch = watch_of(tested)
    losses: list[float] = []
    for live, initial in pairs:
        losses.append(initial - live)
        alarm = add(watch, live, initial)
        assert alarm == "loss" or watch.advantage > 0.0 or latest_stretch(losses) <= _LOSS_LIMIT + ROUNDING
        if alarm == "loss":
            watch.clear()
            losses.clear()


def mixed(gain: float, loss: float, stretch: int = 5) -> list[Pair]:
    """Traffic of two kinds, in turns: the live weights win on one and lose on the other."""
    return [(0.5, 0.5 - gain)] * stretch + [(0.5, 0.5 + loss)] * stretch


def test_chance_losses_of_mixed_traffic_are_no_harm() -> None:
    """Catches good weights that give way at every stretch of the traffic that they are worse at."""
    winning, losing = mixed(gain=0.1, loss=0.06), mixed(gain=0.04, loss=0.06)
    assert largest_stretch([initial - live for live, initial in winning]) > _LOSS_LIMIT
    assert set(alarms(watch_of(winning), winning * 20)) == {None}
    assert "loss" in alarms(watch_of(losing), losing * 2)


def test_an_unusual_loss_is_no_chance() -> None:
    """Catches a change of the traffic that is put up with because of what was won before it."""
    steady, varied = [(0.7, 0.5)] * 24, [(1.0, 0.4), (0.2, 0.4)] * 12
    unusual, usual = watch_of(steady), watch_of(varied)
    assert unusual.advantage == pytest.approx(usual.advantage)
    assert alarms(unusual, [(0.5, 0.65)] * 2) == [None, "loss"]
    assert unusual.advantage > 0.0
    assert unusual.has_changed
    assert alarms(usual, [(0.5, 0.65)] * 2) == [None, None]
    assert not usual.has_changed


def test_weights_that_always_win_raise_no_alarm() -> None:
    """Catches a wrong sign: gains that add up to an alarm."""
    assert set(alarms(watch_of(), [(0.6, 0.3)] * 100)) == {None}


def test_few_requests_say_nothing_of_a_change() -> None:
    """Catches a loss that is called a change of the traffic where nothing is known of the traffic before."""
    for before, changed in ((7, False), (8, True)):
        watch = watch_of([(0.8, 0.5)] * before)
        alarms(watch, [(0.5, 0.65)] * 2)
        assert watch.has_changed is changed


def test_each_request_counts_by_its_length() -> None:
    """Catches an alarm for three wrong tokens, and none for a long answer that was lost."""
    tested = [(score(0.6, 100), score(0.5, 100))] * 16
    for positions, alarm in ((1, None), (100, "loss")):
        watch = Watch()
        watch.begin(tested)
        assert add(watch, 0.0, 0.9, positions) == alarm


def test_an_unusual_length_is_one_request() -> None:
    """Catches lengths in tokens: then the limit is reached at once, and depends on how long answers are."""
    for positions in (1, 10, 1000):
        watch = Watch()
        found = [add(watch, 0.4, 0.45, positions) for _ in range(5)]
        assert found == [None] * 4 + ["loss"]


# Changes of the traffic.


@given(before=st.integers(0, 7), low=st.floats(0.0, 0.3), requests=st.integers(1, 40))
def test_a_drop_needs_requests_to_compare_with(before: int, low: float, requests: int) -> None:
    """Catches a draft that is new to the traffic, and counts as a change of it."""
    assert set(alarms(watch_of([(0.9, 0.9)] * before), [(low, low)] * requests)) == {None}


@given(before=st.integers(8, 40), low=st.floats(0.0, 0.3))
def test_an_unusual_drop_is_a_change(before: int, low: float) -> None:
    """Catches a change that is noticed too late, or not at all."""
    found = alarms(watch_of([(0.9, 0.9)] * before), [(low, low)] * 3)
    assert "drift" in found
    assert found.index("drift") <= 1


def test_a_change_takes_two_requests_of_half_the_acceptance() -> None:
    """Catches one bad request that is taken for new traffic, and a long one that counts no more than a short one."""
    tested = [(score(0.9, 100), score(0.9, 100))] * 32
    for positions, expected in ((100, [None, "drift"]), (10, [None] * 5)):
        watch = Watch()
        watch.begin(tested)
        assert [add(watch, 0.35, 0.35, positions) for _ in expected] == expected


def test_a_drop_is_measured_against_what_came_before() -> None:
    """Catches a request that lowers what is usual before it is compared with it."""
    assert alarms(watch_of([(0.9, 0.9)] * 8), [(0.25, 0.25)]) == ["drift"]


def test_a_drop_of_mixed_traffic_is_none() -> None:
    """Catches traffic of two kinds that is taken for new traffic at each turn."""
    traffic = [(0.9, 0.9), (0.2, 0.2)] * 16
    assert set(alarms(watch_of(traffic), [(0.2, 0.2)] * 3 + traffic * 2)) == {None}


@given(drops=st.lists(st.floats(0.0, _SLACK - 0.001), min_size=1, max_size=60))
def test_small_drops_are_no_sign_of_a_change(drops: list[float]) -> None:
    """Catches the noise of traffic that adds up."""
    watch = watch_of([(0.8, 0.8)] * 32)
    for drop in drops:
        usual = watch.usual
        assert add(watch, usual - drop, usual - drop) is None


@given(tested=st.lists(RATE, min_size=1, max_size=40), rates=st.lists(RATE, max_size=40))
def test_no_change_before_the_limit(tested: list[float], rates: list[float]) -> None:
    """Catches a change after a drop that is unusual, and still small; and drops measured against themselves."""
    watch = watch_of([(rate, rate) for rate in tested])
    drops: list[float] = []
    for rate in rates:
        drops.append(watch.usual - rate - _SLACK)
        if add(watch, rate, rate) == "drift":
            assert latest_stretch(drops) > _DROP_LIMIT - ROUNDING
            watch.clear()
            drops.clear()


def test_a_loss_goes_before_a_change() -> None:
    """Catches harm that is left live because it is a change of the traffic as well."""
    watch = watch_of([(0.9, 0.5)] * 16)
    assert alarms(watch, [(0.0, 0.9)]) == ["loss"]


# What is usual.


@given(tested=REQUESTS, added=REQUESTS)
def test_what_is_usual_is_the_mean_over_tokens_of_the_latest(
    tested: list[tuple[float, float, int]], added: list[tuple[float, float, int]]
) -> None:
    """Catches a mean over requests, the oldest for the latest, and the initial weights for the live ones."""
    watch = Watch()
    watch.begin([(score(live, positions), score(initial, positions)) for live, initial, positions in tested])
    for live, initial, positions in added:
        add(watch, live, initial, positions)
    latest = [*tested, *added][-_LATEST:]
    tokens = sum(positions for *_, positions in latest)
    usual = sum(live * positions for live, _, positions in latest) / tokens
    before = sum(initial * positions for _, initial, positions in latest) / tokens
    assert watch.usual == pytest.approx(usual, abs=1e-9)
    assert watch.advantage == pytest.approx(usual - before, abs=1e-9)


def test_without_requests_nothing_is_known() -> None:
    """Catches a division by zero before the first request, and for one without output."""
    watch = Watch()
    assert (watch.usual, watch.advantage, watch.has_changed) == (0.0, 0.0, False)
    assert add(watch, 0.0, 0.0, positions=0) is None
    assert (watch.usual, watch.advantage, watch.has_changed) == (0.0, 0.0, False)


def test_a_first_request_is_no_drop() -> None:
    """Catches a first request that is compared with nothing, or with itself before it is known."""
    watch = Watch()
    assert alarms(watch, [(0.0, 0.0)] * 8 + [(0.9, 0.9)] * 40) == [None] * 48


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
