"""The replay buffer: what it keeps, how it samples, that its state survives."""

import json
import random
import threading

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


def filled(count: int, capacity: int = 64) -> ReplayBuffer:
    """A buffer with requests from 1."""
    buffer = ReplayBuffer(capacity, seed=1)
    for number in range(1, count + 1):
        buffer.add(observation(number))
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
    """Catches a request that is not saved or comes back elsewhere, and a generator that starts anew."""
    buffers = filled(60, capacity=8), ReplayBuffer(8, seed=99)
    state = json.loads(json.dumps(buffers[0].state_dict()))
    buffers[1].load_state_dict(buffers[0].observations(), state)
    for number in range(100, 140):
        left, right = ([prompt(o) for o in buffer.sample(4)] for buffer in buffers)
        assert left == right
        for buffer in buffers:
            buffer.add(observation(number))
    left, right = ([prompt(o) for o in buffer.observations()] for buffer in buffers)
    assert left == right
    assert buffers[0].tokens == buffers[1].tokens
    assert buffers[0].state_dict() == buffers[1].state_dict()


def test_a_smaller_buffer_keeps_the_newest() -> None:
    """Catches a restored buffer above its capacity."""
    buffer = filled(30, capacity=9)
    small = ReplayBuffer(2)
    small.load_state_dict(buffer.observations(), buffer.state_dict())
    assert [prompt(o) for o in small.observations()] == [29, 30]
    assert small.tokens == 8


@pytest.mark.parametrize("damage", ["random", "no random"])
def test_a_damaged_state_changes_nothing(damage: str) -> None:
    """Catches a buffer that is emptied before its new content is known to be good."""
    buffer, other = filled(5), filled(9)
    state, observations = other.state_dict(), other.observations()
    if damage == "random":
        state["random"] = [3, [1, 2, 3], None]
    else:
        del state["random"]
    before = buffer.state_dict()
    with pytest.raises(LearningError, match="replay buffer"):
        buffer.load_state_dict(observations, state)
    assert buffer.state_dict() == before
    assert sorted(map(prompt, buffer.observations())) == [1, 2, 3, 4, 5]


def test_new_traffic_is_soon_learned_from() -> None:
    """Catches eight new requests that drown among hundreds of old ones, and old ones that are never seen again."""
    buffer = filled(256, capacity=264)
    for number in range(1000, 1008):
        buffer.add(observation(number))
    drawn = [prompt(o) for _ in range(400) for o in buffer.sample(1)]
    share = sum(number >= 1000 for number in drawn) / len(drawn)
    # Half of the draws have a mean age of 16 and so hit the newest eight with 1 - exp(-1/2), the others with 8 / 264:
    # .21 in all. Six standard errors of 400 draws are .12: two in a billion.
    assert share == pytest.approx(0.5 * 0.393 + 0.5 * 8 / 264, abs=0.12)
    assert min(drawn) < 50


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
