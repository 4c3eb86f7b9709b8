"""The thread of a learner: when it starts, who waits for it, and how it ends."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from served import Live, learner_of, request

from hf_osd.errors import ClosedError, LearningError
from hf_osd.records import Observation


def learners() -> set[threading.Thread]:
    """The threads of all learners; some may be of tests that have failed or dropped theirs without closing it."""
    return {thread for thread in threading.enumerate() if thread.name == "hf_osd-learner"}


def test_no_thread_before_the_first_request() -> None:
    """Catches a thread for assistants that never serve, and one that is started twice."""
    before, live = learners(), Live()
    learner = learner_of(live)
    assert not learners() - before
    for number in range(2):
        learner.observe(request(live.draft, number))
        assert len(learners() - before) == 1
    learner.close()


def test_background_does_not_wait_and_intervals_coalesce() -> None:
    """Catches a request that waits for the training, and updates that queue up without bound."""
    live = Live()
    live.go_on.clear()
    learner = learner_of(live, update_every=1, background=True)
    learner.observe(request(live.draft, 0))
    assert live.entered.wait(60.0)
    began = time.perf_counter()
    for number in range(10):
        learner.observe(request(live.draft, number))
    assert learner.updates == 0
    assert time.perf_counter() - began < 5.0
    live.go_on.set()
    deadline = time.perf_counter() + 60.0
    while learner.updates < 2 and time.perf_counter() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert learner.updates == 2
    learner.close()


def test_update_now() -> None:
    """Catches an update() that returns before the weights are published, or waits for N requests."""
    live = Live()
    learner = learner_of(live, update_every=100, background=True)
    with pytest.raises(LearningError, match="at least one recorded request"):
        learner.update()
    learner.observe(request(live.draft, 0))
    learner.update()
    learner.update()
    assert learner.updates == len(live.published) == 2
    learner.close()
    with pytest.raises(ClosedError):
        learner.update()


def test_an_update_counts_requests_that_are_being_judged() -> None:
    """Catches an `update` that says there is nothing to learn from while the first request is on its way there."""
    live = Live()
    learner = learner_of(live, background=True, update_every=100)
    entered, go_on = threading.Event(), threading.Event()
    add = learner._loop.replay.add

    def slow(observation: Observation) -> None:
        entered.set()
        assert go_on.wait(60.0)
        add(observation)

    learner._loop.replay.add = slow  # type: ignore[method-assign]
    learner.observe(request(live.draft, 0))
    assert entered.wait(60.0)
    threading.Timer(0.2, go_on.set).start()
    learner.update()
    assert learner.updates == 1
    learner.close()


def test_close_is_prompt_idempotent_and_leaves_nothing_running() -> None:
    """Catches a close that waits for the next request, and a request that fails because of a close."""
    before, live = learners(), Live()
    learner = learner_of(live, update_every=1)
    learner.observe(request(live.draft, 0))
    began = time.perf_counter()
    learner.close()
    learner.close()
    assert time.perf_counter() - began < 3.0
    assert not learners() - before
    learner.observe(request(live.draft, 1))
    assert learner.updates == 1


def test_a_dropped_learner_is_collected() -> None:
    """Catches a thread that keeps drafts and their memory alive for ever."""
    before, live = learners(), Live()
    learner = learner_of(live, update_every=1)
    learner.observe(request(live.draft, 0))
    gone = weakref.ref(live)
    live.learner = learner  # type: ignore[attr-defined] # as in the assistant: a cycle
    del live, learner
    gc.collect()
    assert gone() is None
    assert not learners() - before


def test_a_script_that_never_closes_exits(tmp_path: Path) -> None:
    """Catches a thread that hangs or crashes a dying interpreter: one that waits, and one in mid-update."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parents[level]) for level in (0, 1)]}\n"
        "from test_background import *\n"
        "live = Live()\n"
        "waits = learner_of(live, update_every=1)\n"
        "waits.observe(request(live.draft, 0))\n"
        "works = learner_of(live, update_every=1, steps_per_update=10**6, background=True)\n"
        "works.observe(request(live.draft, 0))\n"
        "time.sleep(0.5)\n"
        "print(waits.updates, works.updates)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 0\n", "")


def test_concurrent_requests() -> None:
    """Catches deadlocks and lost intervals between threads that observe, save and ask for updates."""
    live = Live()
    learner = learner_of(live, update_every=2)
    observations = [request(live.draft, number) for number in range(6)]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for observation in observations:
                learner.observe(observation)
            learner.update()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120.0)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors
    assert 4 <= learner.updates == len(live.published) <= 12
    learner.close()
