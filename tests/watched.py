"""A watch, requests of any acceptance for it, and the alarms that they raise."""

from collections.abc import Iterable
from functools import cache

import torch
from hypothesis import strategies as st

from hf_osd.learning.judge import Score
from hf_osd.learning.watch import Alarm, Watch
from hf_osd.records import Observation

RATE = st.floats(0.0, 1.0)
PAIRS = st.lists(st.tuples(RATE, RATE), max_size=40)
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
