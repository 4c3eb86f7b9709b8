"""Who does the work of a learner: the request inline, or a thread; when it starts, who waits, and how it ends."""

import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import Live, learner_of, request

from hf_osd.errors import ClosedError, LearningError
from hf_osd.learning.learner import Learner
from hf_osd.learning.scoring import Scorer
from hf_osd.learning.worker import TrainingStream
from hf_osd.records import Observation


def learners() -> set[threading.Thread]:
    """The threads of all learners; some may be of tests that have failed or dropped theirs without closing it."""
    return {thread for thread in threading.enumerate() if thread.name == "hf_osd-learner"}


def run_script(folder: Path, lines: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run lines in a process of their own, with all that this file imports and defines."""
    script = folder / "script.py"
    paths = [str(Path(__file__).parents[level]) for level in (0, 1)]
    script.write_text(f"import sys; sys.path[:0] = {paths}\nfrom test_online import *\n{lines}")
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 100, "check": False}
    return subprocess.run([sys.executable, script], env={**os.environ, **environment}, **options)


def test_a_thread_in_the_background_alone() -> None:
    """Catches a thread for assistants that never serve or learn inline, and one that is started twice."""
    before, live = learners(), Live()
    for background in (False, True):
        learner = learner_of(live, background=background)
        assert not learners() - before
        for number in range(2):
            learner.observe(request(live.draft, number))
            assert len(learners() - before) == background
        learner.close()


def test_an_interrupt_ends_the_program_that_it_was_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Ctrl-C that is swallowed because it came while a request was learned from, and a lock that stays."""
    live = Live()
    learner = learner_of(live, update_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_take_over", raises_once(KeyboardInterrupt(), Learner._take_over))
        with pytest.raises(KeyboardInterrupt):
            learner.observe(request(live.draft, 0))
    within(60.0, lambda: learner.observe(request(live.draft, 1)))
    assert (learner.counters.failures, learner.counters.updates) == (1, 1)
    learner.close()


def test_online_does_not_wait_and_intervals_coalesce() -> None:
    """Catches a request that waits for the training, and updates that queue up without bound."""
    live = Live()
    live.go_on.clear()
    learner = learner_of(live, update_every=1, background=True)
    learner.observe(request(live.draft, 0))
    assert live.entered.wait(60.0)
    began = time.perf_counter()
    for number in range(10):
        learner.observe(request(live.draft, number))
    assert learner.counters.updates == 0
    assert time.perf_counter() - began < 5.0
    live.go_on.set()
    deadline = time.perf_counter() + 60.0
    while learner.counters.updates < 2 and time.perf_counter() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert learner.counters.updates == 2
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
    assert learner.counters.updates == len(live.published) == 2
    learner.close()
    with pytest.raises(ClosedError):
        learner.update()


def test_an_update_counts_requests_that_are_being_judged() -> None:
    """Catches an `update` that says there is nothing to learn from while the first request is on its way there."""
    live = Live()
    learner = learner_of(live, background=True, update_every=100)
    entered, go_on = threading.Event(), threading.Event()
    add = learner.learner.replay.add

    def slow(observation: Observation) -> None:
        entered.set()
        assert go_on.wait(60.0)
        add(observation)

    learner.learner.replay.add = slow  # type: ignore[method-assign]
    learner.observe(request(live.draft, 0))
    assert entered.wait(60.0)
    threading.Timer(0.2, go_on.set).start()
    learner.update()
    assert learner.counters.updates == 1
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
    assert learner.counters.updates == 1


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
    done = run_script(
        tmp_path,
        "live = Live()\n"
        "waits = learner_of(live, update_every=1)\n"
        "waits.observe(request(live.draft, 0))\n"
        "works = learner_of(live, update_every=1, steps_per_update=10**6, background=True)\n"
        "works.observe(request(live.draft, 0))\n"
        "time.sleep(0.5)\n"
        "print(waits.counters.updates, works.counters.updates)\n",
    )
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
    assert 4 <= learner.counters.updates == len(live.published) <= 12
    learner.close()


def within(seconds: float, function: Any) -> None:
    """Fail where somebody waits for ever."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "somebody waits for ever"


def raises_once(error: BaseException, then: Any) -> Any:
    left = [error]

    def function(*args: Any, **kwargs: Any) -> Any:
        if left:
            raise left.pop()
        return then(*args, **kwargs)

    return function


ENDS = [
    (Scorer, "scores", SystemExit(3)),
    (Learner, "train", SystemExit(3)),
    (Learner, "_take_over", SystemExit(3)),
    (Learner, "_take_over", GeneratorExit()),
]


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
@pytest.mark.parametrize(("kind", "name", "error"), ENDS, ids=repr)
def test_an_error_that_is_no_exception(
    kind: type,
    name: str,
    error: BaseException,
    background: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Catches a thread that dies of `sys.exit` in silence, and all those who wait for it from then on."""
    live = Live()
    learner = learner_of(live, update_every=1, background=background, duty_cycle=1.0, steps_per_update=1)
    monkeypatch.setattr(kind, name, raises_once(error, getattr(kind, name)))
    with caplog.at_level(logging.WARNING, logger="hf_osd.learning"):
        within(60.0, lambda: learner.observe(request(live.draft, 0)))
        deadline = time.perf_counter() + 60.0
        while not learner.counters.failures and time.perf_counter() < deadline:
            time.sleep(0.01)
        assert learner.counters.failures == 1
        within(60.0, lambda: learner.observe(request(live.draft, 1)))
        within(60.0, learner.update)
    assert caplog.text.count("An update of the draft failed") == 1
    within(60.0, lambda: learner.save(tmp_path))
    within(60.0, learner.close)
    assert (learner.counters.failures, learner.counters.updates > 0) == (1, True)


def test_update_says_what_ended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an `update()` that comes back as if all were well, or ends the program that asked for it."""
    live = Live()
    learner = learner_of(live, update_every=100)
    learner.observe(request(live.draft, 0))
    monkeypatch.setattr(Learner, "_take_over", raises_once(SystemExit(3), Learner._take_over))
    with pytest.raises(LearningError, match=r"SystemExit\(3\)"):
        learner.update()
    learner.update()
    assert (learner.counters.failures, learner.counters.updates) == (1, 1)
    learner.close()


def test_a_device_that_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches requests that wait for ever, and a thread that spins, where nothing can be computed any more."""
    calls = []

    @contextmanager
    def broken(stream: TrainingStream) -> Any:
        calls.append(1)
        raise RuntimeError("an illegal memory access was encountered")
        yield

    monkeypatch.setattr(TrainingStream, "training", broken)
    live = Live()
    learner = learner_of(live, update_every=1)
    within(20.0, lambda: learner.observe(request(live.draft, 0)))
    within(20.0, lambda: learner.observe(request(live.draft, 1)))
    time.sleep(0.2)
    assert len(calls) == learner.counters.failures == 2
    with pytest.raises(LearningError):
        learner.update()
    within(20.0, learner.close)


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a request that fails because learning gets no thread, as at interpreter exit, or waits for it."""
    live = Live()
    learner = learner_of(live, update_every=1, background=True)
    observation = request(live.draft, 0)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="hf_osd.learning"):
        patch.setattr(threading.Thread, "start", raises_once(RuntimeError("can't start new thread"), None))
        learner.observe(observation)
    assert "Learning has ended" in caplog.text
    within(20.0, lambda: learner.observe(observation))
    within(20.0, learner.close)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_was_forked_off_learns_on(tmp_path: Path) -> None:
    """Catches a worker process in which the first request waits for a thread that only its parent has."""
    done = run_script(
        tmp_path,
        "live = Live()\n"
        "learner = learner_of(live, update_every=1, steps_per_update=1)\n"
        "learner.observe(request(live.draft, 0))\n"
        "if os.fork() == 0:\n"
        "    learner.observe(request(live.draft, 1))\n"
        "    os._exit(learner.counters.updates)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]), learner.counters.updates)\n",
        OMP_NUM_THREADS="1",
    )
    assert (done.returncode, done.stdout) == (0, "2 1\n"), done.stderr


def test_a_script_exits_while_updates_end_in_the_wrong_way(tmp_path: Path) -> None:
    """Catches a thread that goes on when the interpreter wants to leave, since nothing ends it any more."""
    done = run_script(
        tmp_path,
        "logging.disable(logging.CRITICAL)\n"
        "def leave(*_): sys.exit(3)\n"
        "Learner._take_over = leave\n"
        "live = Live()\n"
        "learner = learner_of(live, update_every=1, background=True, steps_per_update=1)\n"
        "for number in range(3): learner.observe(request(live.draft, number))\n"
        "time.sleep(0.5)\n"
        "print('end')\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
