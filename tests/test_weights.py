"""The live weights: many readers or one writer, and eval mode for as long as anybody needs it."""

import threading
import time

import pytest
import torch
from fakes import tiny_model

from hf_osd.errors import LearningError
from hf_osd.serving import weights as module
from hf_osd.serving.weights import LiveWeights, eval_mode


def test_readers_never_see_half_an_update():
    """Catches a swap in the middle of a proposal: every reader must find all parameters from one update."""
    model = tiny_model("llama")
    weights = LiveWeights(model)
    stop, torn, reads = threading.Event(), [], []

    def publish(value):
        weights.publish({name: torch.full_like(p, value) for name, p in model.named_parameters()})

    def read():
        while not stop.is_set():
            with weights:
                found = {float(p.detach().flatten()[-1]) for p in model.parameters()}
            reads.append(1)
            if len(found) > 1:
                torn.append(found)

    publish(0.0)
    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for value in range(1, 60):
        publish(float(value))
    stop.set()
    for reader in readers:
        reader.join(timeout=30)
    assert not torn
    assert reads
    assert {float(p.detach().flatten()[0]) for p in model.parameters()} == {59.0}


def test_publish_is_in_place_and_casts():
    """Catches replaced parameters (captured graphs would keep the old ones) and a dtype taken from the trainer."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    LiveWeights(model).publish({name: torch.ones_like(p, dtype=torch.float32) for name, p in model.named_parameters()})
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(p.dtype == torch.bfloat16 and (p == 1).all() for p in model.parameters())


def test_an_unknown_parameter_changes_nothing():
    """Catches an update that is applied up to the point where it fails."""
    model = tiny_model("llama")
    before = [p.clone() for p in model.parameters()]
    values = {name: torch.ones_like(p) for name, p in model.named_parameters()} | {"nonsense": torch.ones(1)}
    with pytest.raises(KeyError, match="nonsense"):
        LiveWeights(model).publish(values)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_interrupted_publish_lets_readers_in():
    """Catches a server that hangs for ever because someone pressed Ctrl-C while an update waited for a reader."""
    model = tiny_model("llama")
    weights = LiveWeights(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    weights._condition.wait_for = interrupt
    with pytest.raises(KeyboardInterrupt):
        weights.publish(dict(model.named_parameters()))
    entered = threading.Thread(target=lambda: weights.__enter__(), daemon=True)
    entered.start()
    entered.join(timeout=10)
    assert not entered.is_alive()


def ones(model):
    return {name: torch.ones_like(p) for name, p in model.named_parameters()}


def in_a_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def waiting_update(weights, model):
    """An update that waits for a reader already."""
    update = in_a_thread(lambda: weights.publish(ones(model)))
    deadline = time.perf_counter() + 10.0
    while not weights._writers_first:
        assert time.perf_counter() < deadline
        time.sleep(0.001)
    return update


def test_a_reader_reads_again_while_an_update_waits(monkeypatch):
    """Catches a deadlock of one thread: its second reader waits for the update, which waits for its first."""
    monkeypatch.setattr(module, "_TURNS", (60.0,))
    model = tiny_model("llama")
    weights = LiveWeights(model)
    done = threading.Event()

    def read():
        with weights:
            update = waiting_update(weights, model)
            with weights, weights:
                pass
            assert update.is_alive()  # one reader is left
        update.join(10)
        assert not update.is_alive()
        done.set()

    in_a_thread(read)
    assert done.wait(20)
    assert all(bool((p == 1).all()) for p in model.parameters())


def test_a_reader_that_another_reader_waits_for_gets_in():
    """Catches a deadlock of two threads: user code inside of a reader waits for a thread that reads."""
    model = tiny_model("llama")
    weights = LiveWeights(model)

    def read():
        with weights:
            pass

    with weights:
        update = waiting_update(weights, model)
        other = in_a_thread(read)
        other.join(0.2)
        assert other.is_alive()  # an update goes first, for a while
        other.join(10)
        assert not other.is_alive()
        assert update.is_alive()
    update.join(10)
    assert not update.is_alive()
    assert all(bool((p == 1).all()) for p in model.parameters())


def test_an_update_goes_first_under_busy_traffic():
    """Catches an update that waits for a moment without any reader, which never comes on a busy server."""
    model = tiny_model("llama")
    weights = LiveWeights(model)
    stop = threading.Event()

    def read():
        while not stop.is_set():
            with weights:
                time.sleep(0.02)

    readers = []
    for _ in range(4):  # out of step, so that there is always one
        readers.append(in_a_thread(read))
        time.sleep(0.005)
    began = time.perf_counter()
    for _ in range(5):
        weights.publish(ones(model))
    took = time.perf_counter() - began
    stop.set()
    for reader in readers:
        reader.join(10)
    assert took < 2.0


def test_an_update_gives_up_in_the_end(monkeypatch):
    """Catches a learner that waits for ever for a reader that never leaves, and readers that are locked out by it."""
    monkeypatch.setattr(module, "_TURNS", (0.05, 0.1))
    model = tiny_model("llama")
    before = [p.clone() for p in model.parameters()]
    weights = LiveWeights(model)
    errors = []

    def publish():
        try:
            weights.publish(ones(model))
        except LearningError as error:
            errors.append(error)

    with weights:
        in_a_thread(publish).join(10)
    assert "wait for another request" in str(errors)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with weights:
        pass
    weights.publish(ones(model))
    assert all(bool((p == 1).all()) for p in model.parameters())


def test_a_thread_does_not_wait_for_itself():
    """Catches an update from inside of a proposal that keeps everybody waiting before it fails."""
    model = tiny_model("llama")
    weights = LiveWeights(model)
    began = time.perf_counter()
    with weights, pytest.raises(LearningError):
        weights.publish(ones(model))
    assert time.perf_counter() - began < 0.5


def test_eval_mode_is_given_back_by_the_last():
    """Catches a concurrent call that is put back into train mode while it still decodes."""
    model = tiny_model("llama")
    model.train()
    with eval_mode(model):
        with eval_mode(model):
            assert not model.training
        assert not model.training
    assert model.training
    model.eval()
    with eval_mode(model):
        pass
    assert not model.training
