"""Observations and snapshots for the tests of the storage, each a function of its number, and directories of them."""

import logging
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import torch

from hf_osd.records import Observation
from hf_osd.storage import Snapshot, StateDirectory
from hf_osd.storage.shards import list_shards

OPTIONAL = ("states", "source_ids")  # states stay in memory
FIELDS = tuple(field.name for field in fields(Observation) if field.name not in OPTIONAL)
NEVER = 3600.0  # seconds until a flush that no test waits for


def observation(number: int) -> Observation:
    """A few positions of random content; the prompt begins with the number."""
    generator = torch.Generator().manual_seed(number)
    output, k = 1 + number % 4, 1 + number % 3
    log_probs = torch.randn(output, k, generator=generator).log_softmax(-1)
    return Observation(
        prompt_ids=torch.cat([torch.tensor([number]), torch.randint(50_000, (number % 5,), generator=generator)]),
        output_ids=torch.randint(50_000, (output,), generator=generator),
        teacher_ids=torch.randint(50_000, (output, k), generator=generator),
        teacher_log_probs=log_probs,
        teacher_tail=torch.rand(output, generator=generator),
        draft_ids=torch.randint(-1, 50_000, (output,), generator=generator),
        accepted=torch.rand(output, generator=generator) < 0.5,
    )


def same(left: Observation, right: Observation) -> bool:
    """Whether two observations agree bit for bit, in values and types."""
    pairs = [(getattr(left, name), getattr(right, name)) for name in FIELDS]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def numbers(observations: Iterable[Observation]) -> list[int]:
    """Numbers of observations, each of which must be exactly as it was made."""
    found = list(observations)
    for one in found:
        assert same(one, observation(int(one.prompt_ids[0])))
    return [int(one.prompt_ids[0]) for one in found]


def snapshot(count: int) -> Snapshot:
    """A learner after `count` steps: each tensor and the number say so."""
    weights = {"w": torch.full((3, 2), float(count)), "tied.bf16": torch.full((4,), count % 128, dtype=torch.bfloat16)}
    optimizer = {"0.step": torch.tensor(float(count)), "0.exp_avg": torch.full((3, 2), -float(count))}
    return Snapshot({"weights": weights, "optimizer": optimizer}, {"count": count, "last_loss": None})


def count_of(found: Snapshot | None) -> int:
    """Steps of a snapshot, which must be whole and consistent; 0 without one."""
    if found is None:
        return 0
    count = found.numbers["count"]
    expected = snapshot(count)
    assert found.numbers == expected.numbers
    assert found.tensors.keys() == expected.tensors.keys()
    for group, tensors in expected.tensors.items():
        assert found.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[group][name], tensor)
    return int(count)


class Learner:
    """Counts steps; its snapshots are new after each of them."""

    def __init__(self) -> None:
        self.count = self.saved = 0

    def collect(self) -> Snapshot | None:
        if self.count == self.saved:
            return None
        self.saved = self.count
        return snapshot(self.count)


def nothing() -> None:
    return None


def replay_of(path: Path) -> list[Path]:
    return [shard.path for shard in list_shards(path / "replay")]


def age(path: Path) -> Path:
    """Make a directory in which the next flush does everything: 15 small shards and 2 snapshots."""
    learner = Learner()
    with StateDirectory(path, collect=learner.collect, flush_seconds=NEVER) as state:
        for number in range(15):
            state.add(observation(number))
            learner.count = number // 8 + 1
            state.flush()
    assert len(list_shards(path / "replay")) == 15
    return path


def copier(source: Path, target: Path) -> Callable[[], Path]:
    """Makes a new copy of a directory at each call."""

    def copy() -> Path:
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(source, target))

    return copy


def flips(size: int, sample: int, seed: int = 0) -> Iterable[Callable[[bytes], bytes]]:
    """Ways to flip one bit of a file of some size: in its first and last bytes, and at random."""
    generator = random.Random(seed)
    places = {0, 7, 8 * size - 1, *(generator.randrange(8 * size) for _ in range(sample))}
    for place in sorted(places):
        yield lambda data, place=place: bytes(
            byte ^ (1 << place % 8) if index == place // 8 else byte for index, byte in enumerate(data)
        )


def cuts(size: int, sample: int, seed: int = 0) -> Iterable[Callable[[bytes], bytes]]:
    """Ways to cut a file: to nothing, by one byte, and at random."""
    generator = random.Random(seed)
    for length in sorted({0, 1, size // 2, size - 1, *(generator.randrange(size) for _ in range(sample))}):
        yield lambda data, length=length: data[:length]


class Warnings(logging.Handler):
    """Collects what the storage warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("hf_osd.storage").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
