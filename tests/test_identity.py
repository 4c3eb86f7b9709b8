"""Samples of weights: the same for one draft in any dtype, others for other drafts."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic import llama

from hf_osd.storage.identity import INITIAL, LIVE, difference, identity_groups, sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sampled(*weights: torch.Tensor) -> dict[str, torch.Tensor]:
    return sample((f"w{number}", weight) for number, weight in enumerate(weights))


@given(
    st.lists(st.floats(-60_000.0, 60_000.0, width=32), min_size=1, max_size=40),
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from(DTYPES), max_size=2),
    st.lists(st.sampled_from(DTYPES), max_size=2),
)
@settings(deadline=None)
def test_a_dtype_makes_no_other_draft(
    values: list[float], stored: torch.dtype, one: list[torch.dtype], other: list[torch.dtype]
) -> None:
    """Catches a draft that is refused because it was loaded, or saved in between, in another dtype."""
    weights = []
    for path in (one, other):
        weight = torch.tensor(values).to(stored)
        for dtype in path:
            weight = weight.to(dtype)
        weights.append(weight)
    if torch.isinf(torch.stack([weight.float() for weight in weights])).any():
        return  # beyond float16
    assert difference(sampled(weights[0]), sampled(weights[1])) is None


@given(st.floats(2.0**-10, 1000.0, width=32), st.floats(0.02, 10.0), st.sampled_from([-1, 1]), st.sampled_from(DTYPES))
@settings(deadline=None)
def test_two_percent_make_another_draft(value: float, change: float, sign: int, dtype: torch.dtype) -> None:
    """Catches a tolerance that takes training, or another draft, for rounding."""
    weights = torch.linspace(-1.0, 1.0, 99)
    one, other = weights.clone(), weights.clone()
    one[50], other[50] = value, value * (1.0 + sign * change)
    assert difference(sampled(one), sampled(other.to(dtype))) == "w0 (99,)"


def test_a_step_of_training_makes_another_draft() -> None:
    """Catches a learned draft that is taken for the one it began as: one step of Adam at a small rate is enough."""
    draft = llama()
    before = sample(draft.named_parameters())
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-5)
    draft(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    assert difference(before, sample(draft.named_parameters())) is not None


@pytest.mark.parametrize("name", [name for name, _ in llama().named_parameters()])
def test_every_parameter_counts(name: str) -> None:
    """Catches a fingerprint of some parameters: drafts may share all others, such as embeddings."""
    draft, other = llama(), llama()
    with torch.no_grad():
        dict(other.named_parameters())[name].mul_(1.1)
    found = difference(sample(draft.named_parameters()), sample(other.named_parameters()))
    assert found is not None
    assert found.startswith(f"{name} (")


@pytest.mark.parametrize("shape", [(1024, 512), (1000, 768), (151_936, 8), (8, 4096), (333, 257)])
def test_values_come_from_everywhere(shape: tuple[int, int]) -> None:
    """Catches a stride that meets the same rows or columns again, of a matrix too large to be taken whole."""
    rows, columns = (torch.arange(size).float() / size for size in shape)
    for weight in (rows[:, None].expand(shape), columns.expand(shape)):
        (values,) = sampled(weight).values()
        assert len(values) == 256
        assert torch.histc(values, bins=8, min=0.0, max=1.0).min() > 16  # of 32
        assert len(values.unique()) >= min(len(weight.unique()), 256) / 2


def test_names_and_shapes_count() -> None:
    """Catches drafts of another form whose values agree, such as a draft with a layer more."""
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    one = sampled(weight, weight)
    assert difference(one, sampled(weight, weight.reshape(8, 4))) == "w1 (4, 8)"
    assert difference(one, sampled(weight)) == difference(sampled(weight), one) == "w1 (4, 8)"
    assert difference(one, sample([("w0", weight), ("v", weight)])) is not None
    deeper = sample(llama(layers=2).named_parameters())
    assert set(sample(llama().named_parameters())) < set(deeper)


def test_samples_are_small_copies() -> None:
    """Catches samples that change with the draft, that are as large as it is, or that differ between two calls."""
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    (values,), (again,) = sampled(weight).values(), sampled(weight).values()
    assert torch.equal(values, again)
    assert values.untyped_storage().nbytes() == 4 * 256
    weight.zero_()
    assert torch.equal(values, again)
    for size in (0, 1, 255, 256, 257, 511, 512, 513, 100_003):
        values = sampled(torch.arange(float(size)))[f"w0 ({size},)"]
        assert len(values) == len(values.unique()) == min(size, 256)
    assert sampled(torch.tensor(3.0))["w0 ()"].tolist() == [3.0]


def test_tied_and_frozen_parameters() -> None:
    """Catches parameters that two modules share, or that are frozen, which make another draft after loading."""
    draft = llama(tie_word_embeddings=True)
    loaded = copy.deepcopy(draft).requires_grad_(False)
    assert difference(sample(draft.named_parameters()), sample(loaded.named_parameters())) is None
    untied = llama(tie_word_embeddings=False)
    untied.load_state_dict(draft.state_dict())
    assert difference(sample(draft.named_parameters()), sample(untied.named_parameters())) == "lm_head.weight (64, 32)"


def test_what_is_live() -> None:
    """Catches weights that never change, beside an adapter, which go missing from what is live."""
    weights = {"w": torch.zeros(3), "frozen": torch.ones(2)}
    found = identity_groups(sample(weights.items()), {"w": torch.full((3,), 5.0)})
    assert difference(found[INITIAL], sample(weights.items())) is None
    assert difference(found[LIVE], sample((weights | {"w": torch.full((3,), 5.0)}).items())) is None


def test_offloaded_weights() -> None:
    """Catches an error over weights that are elsewhere, and a draft of another form that passes for want of them."""
    weight = torch.ones(3, 2)
    offloaded = sampled(weight.to("meta"), weight)
    assert difference(offloaded, sampled(weight, weight)) is None
    assert difference(offloaded, sampled(weight, 2 * weight)) == "w1 (3, 2)"
    assert difference(offloaded, sampled(torch.ones(2, 3), weight)) is not None
