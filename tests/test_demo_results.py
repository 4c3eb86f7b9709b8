"""What the demo says of a run: stretches of it, and which differences are ours."""

import pytest

from hf_osd.demo.display import percent, sparkline
from hf_osd.demo.results import CONTENDERS, ONLINE, STATIC, STOCK, mismatches, moving, quarter
from hf_osd.evaluation.contenders import Sample
from hf_osd.evaluation.exactness import Difference
from hf_osd.evaluation.race import Race, Round


def one(index: int) -> Round:
    return dict.fromkeys(CONTENDERS, Sample(tokens=10, seconds=0.5, accepted=index))


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 161])
def test_quarters_are_disjoint_parts_of_the_run(size: int) -> None:
    """Would catch a last quarter that starts too early, or is empty in a short run."""
    rounds = [one(index) for index in range(size)]
    quarters = [quarter(rounds, which) for which in (1, 2, 3, 4)]
    assert all(quarters)
    assert quarters[3][-1] is rounds[-1]
    if size >= 4:
        assert [each for part in quarters for each in part] == rounds


def test_moving_averages_look_back_and_never_ahead() -> None:
    """Would catch curves that show learning before it happened."""
    curve = moving([one(index) for index in range(5)], STATIC, window=2)
    assert [each.accepted for each in curve] == [0, 1, 3, 5, 7]


def test_only_our_own_differences_that_are_no_ties_are_mismatches() -> None:
    """Would catch a failing exit code for transformers' own mistake, or a passing one for a bug of ours."""
    kinds = [(STOCK, 0.5), (ONLINE, 1e-6), (ONLINE, 0.5), (STATIC, 0.5), (STATIC, None)]
    race = Race(differences=[Difference(0, 3, gap, 1e-6, contender=name) for name, gap in kinds])
    assert mismatches(race) == 3
    assert race.near_ties == race.differences[1:2]


@pytest.mark.parametrize("length", [0, 1, 59, 60, 61, 1000])
def test_sparklines_fit_their_width_and_end_with_the_newest_value(length: int) -> None:
    """Would catch a chart that wraps, or that hides the present behind the past."""
    line = sparkline([0.0] * (length - 1) + [1.0] * (length > 0), width=60)
    assert len(line) == min(length, 60)
    assert line.endswith("█" if length else "")
    assert percent(0.571) == ".57"
    assert percent(1.0) == "1.00"
    assert percent(None) == "-"
