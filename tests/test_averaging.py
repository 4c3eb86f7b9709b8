"""The average of weights that a distillation is judged by."""

import pytest
import torch
from torch import nn

from hf_osd.design.averaging import Average


def walk(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, generator=generator) for _ in range(steps)]


def test_average_is_what_its_definition_says():
    """Catches a decay on the wrong side, and a start that counts as much as what was learned."""
    weight, values = nn.Parameter(torch.zeros(3, 2)), walk(1200)
    average, expected = Average([weight]), torch.zeros(3, 2)
    for step, value in enumerate(values, start=1):
        weight.data.copy_(value)
        average.update()
        decay = min(0.99, step / (step + 10))
        expected = decay * expected + (1 - decay) * value
    with average.in_place():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), values[-1])


def test_weights_come_back_after_an_error():
    """Catches a training that goes on from the average after a judgement that failed."""
    weight = nn.Parameter(torch.zeros(2))
    average = Average([weight])
    weight.data.fill_(1.0)

    def fail():
        with average.in_place():
            assert not weight.any()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert weight.detach().tolist() == [1.0, 1.0]


def test_saved_average_goes_on(tmp_path):
    """Catches an average that begins anew where a run is resumed."""
    weight = nn.Parameter(torch.zeros(3, 2))
    average = Average([weight])
    for value in walk(5):
        weight.data.copy_(value)
        average.update()
    average.save(tmp_path)
    resumed = Average([weight])
    resumed.load(tmp_path)
    for one in (average, resumed):
        one.update()
    with average.in_place():
        expected = weight.detach().clone()
    with resumed.in_place():
        assert torch.equal(weight.detach(), expected)
