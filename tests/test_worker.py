"""The thread that learns: how many cores it takes."""

import threading

import pytest
import torch

from hf_osd.learning import worker


def in_a_thread(work):
    """What `work` returns in a new thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize(("cores", "own"), [(1, 1), (2, 1), (3, 2), (64, 2)])
def test_training_takes_the_cores_that_serving_leaves(cores, own, monkeypatch):
    """Catches teams of threads that outnumber the cores, and a limit that leaks into the threads that serve."""
    before = torch.get_num_threads()
    monkeypatch.setattr(worker, "_cores", lambda: cores)
    try:
        torch.set_num_threads(2)

        def train():
            worker.leave_cores_to_serving()
            return torch.get_num_threads()

        assert in_a_thread(train) == own
        assert torch.get_num_threads() == 2
        assert in_a_thread(torch.get_num_threads) == 2
    finally:
        torch.set_num_threads(before)


def test_cores_are_counted():
    """Catches a count that is not a number of cores."""
    assert worker._cores() >= 1
