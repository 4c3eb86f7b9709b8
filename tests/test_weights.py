"""The live weights: many readers or one writer, and eval mode for as long as anybody needs it."""

import threading

import pytest
import torch
from fakes import tiny_model

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
