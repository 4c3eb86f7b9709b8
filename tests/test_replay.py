"""The replay buffer: what it keeps, how it samples, that its state survives."""

import json
import random
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

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


def numbers(buffer: ReplayBuffer) -> set[int]:
    return {int(o.prompt_ids[0]) for o in buffer.sample(len(buffer))}


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
    drawn = [int(o.prompt_ids[0]) for o in buffer.sample(size)]
    assert len(drawn) == len(set(drawn)) == min(size, 6)


def test_every_request_is_sampled() -> None:
    """Catches an off-by-one that never draws the newest or the oldest."""
    buffer = ReplayBuffer(4)
    for number in range(4):
        buffer.add(observation(number))
    assert {int(buffer.sample(1)[0].prompt_ids[0]) for _ in range(200)} == {0, 1, 2, 3}


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


def test_state_survives_files(tmp_path: Path) -> None:
    """Catches a field that is not saved, a wrong order, and a generator that starts anew."""
    buffer = ReplayBuffer(4, seed=1)
    for number in range(6):
        buffer.add(observation(number, output=number + 1))
    buffer.sample(2)
    tensors, metadata = buffer.state_dict()
    save_file(tensors, tmp_path / "replay.safetensors")
    restored = ReplayBuffer(4, seed=99)
    restored.load_state_dict(load_file(tmp_path / "replay.safetensors"), json.loads(json.dumps(metadata)))
    assert restored.tokens == buffer.tokens
    for mine, other in zip(buffer.sample(4), restored.sample(4), strict=True):
        assert torch.equal(mine.output_ids, other.output_ids)
        assert torch.equal(mine.teacher_log_probs, other.teacher_log_probs)
        assert torch.equal(mine.accepted, other.accepted)
    restored.add(observation(7))
    assert 2 not in numbers(restored)


def test_a_smaller_buffer_keeps_the_newest() -> None:
    """Catches a restored buffer above its capacity."""
    buffer = ReplayBuffer(5)
    for number in range(5):
        buffer.add(observation(number))
    small = ReplayBuffer(2)
    small.load_state_dict(*buffer.state_dict())
    assert numbers(small) == {3, 4}


def test_a_damaged_state_changes_nothing() -> None:
    """Catches a buffer that is emptied before its new content is known to be good."""
    buffer = ReplayBuffer(5)
    buffer.add(observation(1))
    tensors, metadata = buffer.state_dict()
    del tensors["0.accepted"]
    with pytest.raises(LearningError, match="accepted"):
        buffer.load_state_dict(tensors, metadata)
    assert numbers(buffer) == {1}


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
