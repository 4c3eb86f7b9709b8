"""How fast to learn: what gains and leaders do to the learning rate and to the share of time."""

from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.candidates import HALF, WHOLE
from hf_osd.learning.pace import HIGHEST, LEAST_EAGERNESS, LOWEST, TRIAL, Pace

GAINS = st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=40)


@given(GAINS)
def test_all_is_spent_after_a_record_and_less_after_anything_else(gains: list[float]) -> None:
    """Catches a share that falls while acceptance rises, one that stays where it does not, and one that ends at 0."""
    pace = Pace(1e-4, adapts_rate=True)
    for _ in range(TRIAL):
        pace.spend_by(gains[0])
    record = max(gains[0], 0.0)
    for gain in gains:
        before = pace.eagerness
        pace.spend_by(gain)
        assert pace.eagerness == 1.0 if gain > record else LEAST_EAGERNESS <= pace.eagerness <= before
        record = max(gain, record)


def test_a_trial_of_new_traffic_ends_where_nothing_is_gained() -> None:
    """Catches learning that gives up before it had a chance, and one that goes on spending where nothing is gained."""
    pace = Pace(1e-4, adapts_rate=True)
    for _ in range(TRIAL):
        pace.spend_by(0.0)
        assert pace.eagerness == 1.0
    for _ in range(6):
        pace.spend_by(0.0)
    assert pace.eagerness == LEAST_EAGERNESS
    pace.begin_anew()
    pace.spend_by(0.0)
    assert pace.eagerness == 1.0


def test_chance_in_the_trial_is_no_record() -> None:
    """Catches a gain over a few requests that later ones, which are means over more, cannot reach any more."""
    pace = Pace(1e-4, adapts_rate=True)
    for gain in (0.3, *[0.0] * (TRIAL - 1), 0.01):
        pace.spend_by(gain)
    assert pace.eagerness == 1.0


@given(st.lists(st.sampled_from([HALF, WHOLE, "static", "harm"]), max_size=60))
def test_the_learning_rate_stays_within_bounds(events: list[str]) -> None:
    """Catches a rate that runs away, or that falls so low that nothing is learned any more."""
    pace, fixed = Pace(1e-4, adapts_rate=True), Pace(1e-4, adapts_rate=False)
    for event in events:
        for one in (pace, fixed):
            one.slow_down() if event == "harm" else one.follow(event)
        assert LOWEST * 1e-4 <= pace.learning_rate <= HIGHEST * 1e-4
    assert fixed.learning_rate == 1e-4


@given(GAINS)
def test_a_saved_pace_goes_on_as_the_other_does(gains: list[float]) -> None:
    """Catches a record or a share that a restart forgets."""
    pace, again = Pace(1e-4, adapts_rate=True), Pace(1e-4, adapts_rate=True)
    for gain in gains:
        pace.spend_by(gain)
    again.load_state_dict(pace.state_dict())
    for one in (pace, again):
        one.spend_by(0.5)
    assert again.state_dict() == pace.state_dict()
