"""
Learning processes that are killed with SIGKILL at random moments, and what they leave on disk.

Run as a script, this file is the parent of those processes: it imports torch once and forks, because importing takes
seconds and a fork milliseconds. Power cuts, which lose what is not synced, are for `test_storage_faults.py`.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import Warnings, numbers, observation

from hf_osd.errors import StateError
from hf_osd.storage import Snapshot, StateDirectory, files, read_state
from hf_osd.storage.shards import list_shards

KILLS, LIVES = 120, 20  # kills in all, and in one directory
BOUND = 60_000  # bytes of observations, in every second directory
FAR = 1e9


class Learner:
    """Descends a slope of 1 with momentum, so that weights and optimiser are functions of the number of steps."""

    def __init__(self) -> None:
        self.steps = self.seen = self.saved = 0
        self.weight = torch.nn.Parameter(torch.zeros(64))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.5, momentum=0.5)
        self.lock = threading.Lock()

    def step(self) -> None:
        with self.lock:
            self.weight.grad = torch.ones(64)
            self.optimizer.step()
            self.steps += 1

    def collect(self) -> Snapshot | None:
        with self.lock:
            if self.steps == self.saved:
                return None
            self.saved = self.steps
            buffer = self.optimizer.state[self.weight]["momentum_buffer"]
            return Snapshot(
                {
                    "weights": {"weight": self.weight.detach().clone()},
                    "live": {"weight": self.weight.detach().to(torch.bfloat16)},
                    "optimizer": {"0.momentum_buffer": buffer.clone()},
                },
                {"steps": self.steps, "seen": self.seen},
            )

    def restore(self, snapshot: Snapshot | None) -> None:
        if snapshot is not None:
            self.steps = self.saved = snapshot.numbers["steps"]
            self.weight.data.copy_(snapshot.tensors["weights"]["weight"])
            buffer = snapshot.tensors["optimizer"]["0.momentum_buffer"]
            self.optimizer.state[self.weight]["momentum_buffer"] = buffer.clone()


def expected_tensors(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and momentum after some steps, computed anew."""
    learner = Learner()
    for _ in range(steps):
        learner.step()
    buffer = learner.optimizer.state[learner.weight].get("momentum_buffer", torch.zeros(64))
    return learner.weight.detach(), buffer


def learn(directory: Path, report: int, seed: int, max_bytes: int) -> None:
    """Serve and learn until killed; report what `flush` has said to be on disk."""
    generator, learner = random.Random(seed), Learner()
    state = StateDirectory(directory, collect=learner.collect, flush_seconds=0.003, max_bytes=max_bytes)
    snapshot, loaded = state.load()
    learner.restore(snapshot)
    found = numbers(loaded)
    following = found[-1] + 1 if found else 0
    os.write(report, b"ready\n")
    while True:
        for _ in range(generator.randrange(1, 6)):
            state.add(observation(following))
            following += 1
        with learner.lock:
            learner.seen = following
        learner.step()
        if generator.random() < 0.5:
            steps = learner.steps
            state.flush()
            os.write(report, f"{following - 1} {steps}\n".encode())
        else:
            time.sleep(generator.random() * 0.005)


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Run something in a child; return its process and a pipe that it can write to."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            work(writer)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    os.close(writer)
    return child, reader


def kill(child: int, reader: int) -> str:
    """Kill a child; return what it had written since."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child ended by itself: {status}"
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read().decode()


def wait_for_lines(reader: int, count: int) -> str:
    """Wait until a child has written so many lines; return what it has written."""
    text = ""
    while text.count("\n") < count:
        assert select.select([reader], [], [], 60)[0], "the child does not get on"
        read = os.read(reader, 4096)
        assert read, "the child ended by itself"
        text += read.decode()
    return text


def kill_at_random(directory: Path, seed: int) -> dict[str, int]:
    """Kill learning processes, and check after each of them what is left."""
    generator, warnings = random.Random(seed), Warnings()
    counts = {"kills": 0, "in a write": 0, "in a merge": 0, "snapshots": 0, "steps": 0, "observations": 0}
    acknowledged, steps = -1, 0
    for life in range(KILLS):
        bounded = life // LIVES % 2 == 1
        path = directory / f"state-{life // LIVES}"
        if life % LIVES == 0:
            acknowledged, steps = -1, 0
        bound = BOUND if bounded else 2**28
        child, reader = forked(lambda report, path=path, life=life, bound=bound: learn(path, report, life, bound))
        text = wait_for_lines(reader, min(life % 5, 2))  # from its start, from "ready", or from a first flush
        time.sleep(generator.uniform(0.0, 0.08))
        lines = (text + kill(child, reader)).removeprefix("ready\n").splitlines()
        if lines:
            acknowledged, steps = (int(number) for number in lines[-1].split())
        counts["kills"] += 1
        counts["in a write"] += bool(list(path.rglob(f"{files.TEMPORARY}*")))
        shards = list_shards(path / "replay")
        counts["in a merge"] += any(a.covers(b) for a in shards for b in shards if a is not b)
        acknowledged, steps = check(path, acknowledged, steps, bounded, counts)
    assert warnings.messages == [], warnings.messages
    return counts


def check(path: Path, acknowledged: int, steps: int, bounded: bool, counts: dict[str, int]) -> tuple[int, int]:
    """Check what a killed process left; return the last observation and the steps, which must not be lost later."""
    snapshot, loaded = read_state(path)
    found = numbers(loaded)  # each exactly as it was made
    last = found[-1] if found else -1
    assert found == list(range(found[0] if bounded and found else 0, last + 1)), "lost, doubled or out of order"
    assert last >= acknowledged, f"lost {acknowledged - last} acknowledged observations"
    assert not bounded or sum(shard.path.stat().st_size for shard in list_shards(path / "replay")) < 1.5 * BOUND
    assert steps == 0 or snapshot is not None, "lost an acknowledged snapshot"
    counts["observations"] = max(counts["observations"], last + 1)
    if snapshot is None:
        return last, 0
    check_snapshot(snapshot, steps, last)
    counts["snapshots"] += 1
    counts["steps"] = max(counts["steps"], snapshot.numbers["steps"])
    return last, snapshot.numbers["steps"]


def check_snapshot(snapshot: Snapshot, steps: int, last: int) -> None:
    """Whole, of one moment, not older than acknowledged, and not ahead of the observations."""
    assert snapshot.numbers["steps"] >= steps, "an older snapshot than the one acknowledged"
    assert last >= snapshot.numbers["seen"] - 1, "the snapshot has seen what is not there"
    weight, buffer = expected_tensors(snapshot.numbers["steps"])
    assert torch.equal(snapshot.tensors["weights"]["weight"], weight)
    assert torch.equal(snapshot.tensors["live"]["weight"], weight.to(torch.bfloat16))
    assert torch.equal(snapshot.tensors["optimizer"]["0.momentum_buffer"], buffer)


def nothing() -> None:
    return None


def locks(path: Path) -> dict[str, str]:
    """What a second process is told while the first one lives, and after it was killed but its own child lives on."""

    def hold(report: int) -> None:
        state = StateDirectory(path, collect=nothing, flush_seconds=FAR)
        state.add(observation(0))
        state.flush()
        grandchild = os.fork()
        if grandchild == 0:
            state.add(observation(1))
            state.close()  # nothing of this may reach the disk
            os.write(report, f"{os.getpid()}\n".encode())
            signal.pause()
        signal.pause()

    child, reader = forked(hold)
    assert select.select([reader], [], [], 60)[0]
    grandchild = int(os.read(reader, 100))
    answers = {"holder": str(child), "alive": opened(path)}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    answers["killed"] = opened(path)
    os.kill(grandchild, signal.SIGKILL)
    answers["observations"] = str(numbers(read_state(path)[1]))
    return answers


def opened(path: Path) -> str:
    try:
        StateDirectory(path, collect=nothing, flush_seconds=FAR).close()
    except StateError as error:
        return str(error)
    return "opened"


def warm_up(path: Path) -> None:
    """Do everything once: torch and Arrow import more of themselves at the first use, which children then have."""
    learner = Learner()
    with StateDirectory(path, collect=learner.collect, flush_seconds=FAR) as state:
        for number in range(20):
            learner.step()
            state.add(observation(number))
            state.flush()
        state.load()


def main(directory: Path, seed: int) -> None:
    """Kill, lock, and end without `close`; print what came out."""
    torch.set_num_threads(1)
    warm_up(directory / "warm")
    report = {"kills": kill_at_random(directory, seed), "locks": locks(directory / "locks")}
    print(json.dumps(report))  # noqa: T201
    learner = Learner()
    learner.step()
    state = StateDirectory(directory / "exit", collect=learner.collect, flush_seconds=FAR)
    state.add(observation(0))
    sys.modules["__main__"].kept = (state, learner)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def report(directory: Path) -> dict[str, Any]:
    """What the script says."""
    if sys.platform == "win32":
        pytest.skip("no fork and no SIGKILL")
    command = [sys.executable, __file__, str(directory), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_killed_at_random_moments(report: dict[str, Any]) -> None:
    """
    Catches half-written files that are loaded, acknowledged observations or snapshots that are lost, and rows that
    are doubled or out of order, over 120 kills in six directories that go on from what the last process left.
    """
    counts = report["kills"]
    assert counts["kills"] >= 100
    assert counts["in a write"] > 10  # otherwise nothing was put to the test
    assert counts["snapshots"] > 80
    assert counts["observations"] > 30


def test_the_lock_is_that_of_a_process(report: dict[str, Any]) -> None:
    """Catches two processes that write, a lock that outlives a killed process, and a forked child that writes."""
    locks = report["locks"]
    assert f"in use by process {locks['holder']}" in locks["alive"]
    assert locks["killed"] == "opened"
    assert locks["observations"] == "[0]"


def test_the_end_of_the_interpreter_saves(report: dict[str, Any], directory: Path) -> None:
    """Catches what is lost because nobody called `close`."""
    snapshot, loaded = read_state(directory / "exit")
    assert numbers(loaded) == [0]
    assert snapshot is not None
    assert snapshot.numbers["steps"] == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
