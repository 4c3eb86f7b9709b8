"""Positions that are told to a position embedding: in this pass, in this thread and on this model alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fakes import tiny_model
from seq2seq import encoder_decoder

from hf_osd.serving.positions import position_tap


@torch.no_grad()
def logits(model, texts):
    """Those of the last tokens of texts, `(batch, time)`."""
    source = torch.arange(5, 9)[None].expand(len(texts), -1)
    return model(input_ids=source, decoder_input_ids=texts).logits


def test_rows_have_positions_of_their_own():
    """Catches positions of one row that are used for all, and an output of another shape."""
    bart, text = encoder_decoder("bart"), torch.tensor([[1, 7, 9, 4]])
    tap = position_tap(bart)
    one = logits(bart, text)
    with tap.telling(torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])):
        first, second = logits(bart, text.expand(2, -1))
    torch.testing.assert_close(first, one[0])
    assert not torch.allclose(second, one[0], atol=1e-3)
    assert torch.equal(logits(bart, text), one)


def test_other_threads_and_copies_are_told_nothing():
    """Catches positions of a request that reach another one, or the copy of a draft that is trained meanwhile."""
    bart, text = encoder_decoder("bart"), torch.tensor([[1, 7, 9, 4]])
    one, tap = logits(bart, text), position_tap(bart)
    with tap.telling(torch.tensor([[5, 6, 7, 8]])), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, bart, text).result(), one)
        assert torch.equal(logits(copy.deepcopy(bart), text), one)
        assert not torch.equal(logits(bart, text), one)


def test_there_is_one_tap_for_a_model():
    """Catches hooks that pile up from request to request."""
    bart = encoder_decoder("bart")
    assert position_tap(bart) is position_tap(bart)
    assert sum(len(module._forward_hooks) for module in bart.modules()) == 1


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_models_without_such_an_embedding_or_need(kind):
    """Catches hooks on an embedding of another kind, and on that of a model which takes positions by itself."""
    model = encoder_decoder(kind)
    assert position_tap(model) is None
    assert position_tap(tiny_model("llama")) is None
    assert not any(module._forward_hooks for module in model.modules())
