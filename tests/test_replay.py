"""The replay buffer: what it keeps, how it samples, that its state survives."""

import json
import random
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_osd.errors import ConfigError, LearningError
from hf_osd.learning.replay import ReplayBuffer
from hf_osd.records import Observation


def observation(number: int, output: int = 3) -> Observation:
    return Observation(
        prompt_ids=torch.tensor([number]),
        output_ids=torch.arange(output),
        teacher_ids=torch.zeros(output, 2, dtype=torch.long),
        teacher_log_probs=torch.full((output, 2), -1.0),
        teacher_tail=torch.full((output,), 0.2),
        draft_ids=torch.full((output,), -1),
        accepted=torch.zeros(output, dtype=torch.bool),
    )


def prompt(observation: Observation) -> int:
    return int(observation.prompt_ids[0])


def numbers(buffer: ReplayBuffer) -> set[int]:
    """All that can be learned from."""
    return {prompt(o) for o in buffer.sample(len(buffer))}


def filled(count: int, capacity: int = 64, keep: int | None = None) -> ReplayBuffer:
    """A buffer that holds out, with requests from 1; `keep` turns the page after them."""
    buffer = ReplayBuffer(capacity, seed=1, holds_out=True)
    for number in range(1, count + 1):
        buffer.add(observation(number))
    if keep is not None:
        buffer.turn_page(keep)
    return buffer


@given(capacity=st.integers(1, 9), added=st.integers(0, 25))
@settings(deadline=None)
def test_oldest_leaves_first(capacity: int, added: int) -> None:
    """Catches an unbounded buffer, and one that drops the newest."""
    buffer = ReplayBuffer(capacity)
    for number in range(added):
        buffer.add(observation(number))
    assert numbers(buffer) == set(range(max(0, added - capacity), added))
    assert buffer.tokens == 4 * len(buffer)


def test_tokens_are_bounded() -> None:
    """Catches a few long requests filling the memory, and a bound that would empty the buffer."""
    buffer = ReplayBuffer(10, max_tokens=12)
    for number in range(5):
        buffer.add(observation(number))
    assert numbers(buffer) == {2, 3, 4}
    buffer.add(observation(9, output=50))
    assert numbers(buffer) == {9}
    assert buffer.tokens == 51


@given(size=st.integers(0, 12))
@settings(deadline=None)
def test_samples_are_different_requests(size: int) -> None:
    """Catches sampling with replacement, and an error where fewer requests are there than asked for."""
    buffer = ReplayBuffer(8)
    for number in range(6):
        buffer.add(observation(number))
    drawn = [prompt(o) for o in buffer.sample(size)]
    assert len(drawn) == len(set(drawn)) == min(size, 6)


def test_every_request_is_sampled() -> None:
    """Catches an off-by-one that never draws the newest or the oldest."""
    buffer = ReplayBuffer(4)
    for number in range(4):
        buffer.add(observation(number))
    assert {prompt(buffer.sample(1)[0]) for _ in range(200)} == {0, 1, 2, 3}


def test_same_seed_same_samples_and_global_state_untouched() -> None:
    """Catches a use of the global generator, which serving and users sample from."""
    drawn = []
    state = random.getstate()
    for _ in range(2):
        buffer = ReplayBuffer(16, seed=3)
        for number in range(16):
            buffer.add(observation(number))
        drawn.append([int(o.prompt_ids[0]) for _ in range(5) for o in buffer.sample(4)])
    assert drawn[0] == drawn[1]
    assert random.getstate() == state


def test_state_survives_json() -> None:
    """Catches a part that is not saved or comes back elsewhere, counts and a generator that start anew."""
    buffers = filled(60, capacity=8, keep=3), ReplayBuffer(8, seed=99, holds_out=True)
    state = json.loads(json.dumps(buffers[0].state_dict()))
    buffers[1].load_state_dict(buffers[0].observations(), state)
    for number in range(100, 140):
        left, right = ([prompt(o) for o in buffer.sample(4)] for buffer in buffers)
        assert left == right
        for buffer in buffers:
            buffer.add(observation(number))
            if number % 10 == 0:
                buffer.turn_page(2)
    left, right = ([prompt(o) for o in buffer.observations()] for buffer in buffers)
    assert left == right
    assert buffers[0].tokens == buffers[1].tokens
    assert buffers[0].state_dict() == buffers[1].state_dict()


def test_a_smaller_buffer_keeps_the_newest() -> None:
    """Catches a restored buffer above its capacity, in either of its parts."""
    buffer = filled(30, capacity=9, keep=7)
    small = ReplayBuffer(2, holds_out=True)
    small.load_state_dict(buffer.observations(), buffer.state_dict())
    assert len(small) <= 4
    assert {29, 30} - set(map(prompt, small.held)) <= numbers(small)
    assert small.tokens == 4 * len(small.observations())


@pytest.mark.parametrize("damage", ["parts", "random", "added", "observations"])
def test_a_damaged_state_changes_nothing(damage: str) -> None:
    """Catches a buffer that is emptied before its new content is known to be good."""
    buffer, other = filled(5), filled(9)
    state, observations = other.state_dict(), other.observations()
    if damage == "observations":
        observations.pop()
    elif damage == "random":
        state["random"] = [3, [1, 2, 3], None]
    else:
        del state[damage]
    before = buffer.state_dict()
    with pytest.raises(LearningError, match="replay buffer"):
        buffer.load_state_dict(observations, state)
    assert buffer.state_dict() == before
    assert sorted(map(prompt, buffer.observations())) == [1, 2, 3, 4, 5]


def test_one_request_of_four_is_held_out_first() -> None:
    """Catches a test that the draft has learned from, one that grows for ever, and requests that are never learned."""
    buffer = ReplayBuffer(256, holds_out=True)
    for number in range(1, 101):
        buffer.add(observation(number))
        held = [prompt(o) for o in buffer.held]
        assert len(held) <= 16
        assert held == sorted(held)
        # One of each four, and so of each whole block that is not too old.
        assert {(one - 1) // 4 for one in held} >= set(range(max(0, number // 4 - 15), number // 4))
        # Whatever is held is not learned from, and everything else is.
        assert numbers(buffer) == set(range(1, number + 1)) - set(held)
    assert len(held) == 16
    assert len({one % 4 for one in held}) > 1  # traffic that comes in turns is tested whole


def test_without_holding_out_everything_is_learned() -> None:
    """Catches a quarter of the traffic that is thrown away where there is no gate to test anything."""
    buffer = ReplayBuffer(256)
    for number in range(1, 41):
        buffer.add(observation(number))
    assert buffer.held == []
    assert numbers(buffer) == set(range(1, 41))


def test_a_page_is_turned() -> None:
    """Catches a test from before the traffic changed, requests that are lost, and new ones that count as old."""
    buffer = filled(40, capacity=256)
    held = {prompt(o) for o in buffer.held}
    latest = [n for n in range(1, 41) if n not in held]
    buffer.turn_page(3)
    assert buffer.held == []
    assert numbers(buffer) == set(range(1, 41))
    past, kept, _ = buffer.state_dict()["parts"]
    assert (past, kept) == (37, 3)
    assert [prompt(o) for o in buffer.observations()[past:]] == latest[-3:]
    buffer.turn_page(0)
    assert buffer.state_dict()["parts"] == [40, 0, 0]


@pytest.mark.parametrize("latest", [2, 40])
def test_a_share_of_each_sample_is_of_the_past(latest: int) -> None:
    """Catches a past that is forgotten, one that drowns what the traffic is now, and samples that are too small."""
    buffer = filled(80, capacity=256, keep=0)
    for number in range(latest):
        buffer.add(observation(1000 + number))
    drawn = [[prompt(o) for o in buffer.sample(8)] for _ in range(400)]
    assert all(len(sample) == len(set(sample)) == 8 for sample in drawn)
    past = sum(number < 1000 for sample in drawn for number in sample) / 3200
    if latest == 2:
        assert past >= 0.75  # all that there is of the latest, filled up
        assert all(any(number >= 1000 for number in sample) for sample in drawn)
    else:
        # 3200 tosses of a coin: six standard errors, two in a billion.
        assert past == pytest.approx(0.2, abs=6 * (0.2 * 0.8 / 3200) ** 0.5)


def test_each_request_has_the_same_chance_to_be_remembered() -> None:
    """Catches a reservoir that prefers old or new requests, by a chi-squared test over the place in the stream."""
    capacity, stream, runs = 8, 64, 500
    counts = Counter[int]()
    for seed in range(runs):
        buffer = ReplayBuffer(capacity, seed=seed)
        for number in range(stream):
            buffer.add(observation(number))
            if number % 4 == 3:  # before any leaves as the oldest of the latest
                buffer.turn_page(0)
        assert len(buffer) == capacity
        counts.update(numbers(buffer))
    expected = runs * capacity / stream
    statistic = sum((counts[number] - expected) ** 2 / expected for number in range(stream))
    # Chosen without replacement, so it is at most chi-squared with 63 degrees of freedom, which is above 125 with a
    # probability of 5e-6; the seeds are fixed.
    assert statistic < 125


def test_tokens_of_all_parts_are_bounded() -> None:
    """Catches held-out or past requests that do not count, and a bound that costs what was recorded last first."""
    buffer = ReplayBuffer(256, max_tokens=100, holds_out=True)
    for number in range(1, 61):
        buffer.add(observation(number, output=1 + number % 5))
        if number % 20 == 0:
            buffer.turn_page(4)
        everything = buffer.observations()
        assert buffer.tokens == sum(o.prompt_ids.numel() + o.output_ids.numel() for o in everything) <= 100
        assert number % 20 == 0 or number in map(prompt, everything)
    buffer.add(observation(99, output=500))
    assert numbers(buffer) == {99}
    assert len(buffer.held) <= 1


def test_threads() -> None:
    """Catches a deque that changes while it is sampled."""
    buffer = ReplayBuffer(8)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for number in range(300):
                buffer.add(observation(number))
                buffer.sample(4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(buffer) == 8


@pytest.mark.parametrize(("capacity", "max_tokens"), [(0, None), (4, 0)])
def test_bad_bounds_are_refused(capacity: int, max_tokens: int | None) -> None:
    """Catches a buffer that can hold nothing."""
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        ReplayBuffer(capacity, max_tokens=max_tokens)
