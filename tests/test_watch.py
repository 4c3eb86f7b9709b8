"""Alarms: which losses are harm and which are chance, what is a change of the traffic, and what bounds them."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watched import PAIRS, RATE, ROUNDING, Pair, add, alarms, score, watch_of

from hf_osd.learning.watch import _DROP_LIMIT, _LATEST, _LOSS_LIMIT, _SLACK, Watch

REQUESTS = st.lists(st.tuples(RATE, RATE, st.integers(1, 200)), min_size=1, max_size=60)


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
