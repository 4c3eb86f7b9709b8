"""Weights that draft and target share: found in whatever way they are shared, and left alone by the training copy."""

import copy
from typing import Any

import pytest
import torch
from borrowed import EMBEDDING, OUTPUT, SHARES, Share, copies, pair, same
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from traffic import llama

from hf_osd.drafts.sharing import shared_with
from hf_osd.errors import ConfigError
from hf_osd.learning.student import Student


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES.keys())
def test_sharing_is_found_by_memory(share: Share) -> None:
    """Catches a comparison of objects, of storages that begin together, or of parameters alone."""
    draft, target = pair(share)
    assert shared_with(draft, target) == {EMBEDDING, OUTPUT}


def test_nothing_is_shared_by_equal_values() -> None:
    """Catches a comparison of values, and of addresses that a tensor without memory does not have."""
    target = llama(seed=1)
    draft = copy.deepcopy(target)
    assert shared_with(draft, target) == frozenset()
    assert shared_with(draft.to("meta"), target.to("meta")) == frozenset()


def test_all_is_shared_by_a_draft_of_the_targets_first_layers() -> None:
    """Catches layers that are missed because their modules are the same objects."""
    target = llama(seed=1, layers=2)
    draft = llama()
    draft.model = copy.copy(target.model)
    draft.model._modules = {**target.model._modules, "layers": target.model.layers[:1]}
    draft.lm_head = target.lm_head
    assert shared_with(draft, target) == dict(draft.named_parameters()).keys()


def test_an_output_layer_that_left_the_embedding_it_was_tied_to() -> None:
    """Catches names of tied weights that do not fit what is tied."""
    target, draft = llama(seed=1), llama(tie_word_embeddings=True)
    assert OUTPUT not in dict(draft.named_parameters())
    draft.set_output_embeddings(target.get_output_embeddings())
    assert shared_with(draft, target) == {OUTPUT}
    draft.set_output_embeddings(draft.get_input_embeddings())
    target.set_output_embeddings(draft.get_input_embeddings())
    assert shared_with(draft, target) == {EMBEDDING}


def test_tensors_inside_of_tensors() -> None:
    """Catches quantised and sharded weights, whose memory is that of the tensors they are made of."""
    from torch.testing._internal.two_tensor import TwoTensor

    inside = torch.ones(4)
    wrapped = TwoTensor(torch.ones(4), inside)
    for one, other in ((wrapped, inside), (inside, wrapped)):
        draft, target = nn.Module(), nn.Module()
        draft.weight, target.weight = (nn.Parameter(tensor, requires_grad=False) for tensor in (one, other))
        assert shared_with(draft, target) == {"weight"}


PLACES = st.tuples(st.integers(0, 30), st.integers(0, 11), st.integers(1, 3))  # begin, length, step


@given(st.lists(PLACES, min_size=1, max_size=6), PLACES)
@example([(0, 6, 3), (1, 1, 1)], (10, 1, 1))  # the one that reaches so far is not the last to begin
def test_overlaps_are_those_of_the_elements(taken: list[tuple[int, int, int]], own: tuple[int, int, int]) -> None:
    """Catches a search among the target's tensors that misses one, or takes neighbours for shared."""
    flat = torch.zeros(64)
    draft, target = nn.Module(), nn.Module()

    def slice_of(begin: int, length: int, step: int) -> nn.Parameter:
        return nn.Parameter(flat[begin : begin + length * step : step])

    def covered(begin: int, length: int, step: int) -> set[int]:
        last = begin + (length - 1) * step
        return set(range(begin, last + 1)) if length else set()

    draft.weight = slice_of(*own)
    for number, place in enumerate(taken):
        target.register_parameter(f"weight{number}", slice_of(*place))
    expected = any(covered(*own) & covered(*place) for place in taken)
    assert shared_with(draft, target) == ({"weight"} if expected else set())


@pytest.mark.parametrize(
    ("dtype", "tied"),
    [(torch.float64, False), *((dtype, tied) for dtype in (torch.float32, torch.bfloat16) for tied in (False, True))],
    ids=str,
)
def test_the_training_copy_takes_no_memory_for_what_is_shared(dtype: torch.dtype, tied: bool) -> None:
    """Catches a copy of the target's largest tensors, one that computes something else, and mixed types."""
    draft, target = pair(dtype=dtype)
    if tied:
        draft.lm_head = nn.Linear(32, 64, bias=False)
        draft.lm_head.weight = draft.get_input_embeddings().weight
    frozen = shared_with(draft, target)
    student = Student(draft, frozen=frozen)
    parameters = dict(student.model.named_parameters())
    in_place = dtype != torch.float64
    for name in frozen:
        assert not parameters[name].requires_grad
        assert (parameters[name].data_ptr() == draft.get_parameter(name).data_ptr()) == in_place
        assert name not in student.weights()
    assert all(weight.dtype == torch.float32 for name, weight in parameters.items() if name not in frozen)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = student.model(ids).logits
    assert logits.dtype == torch.float32
    with torch.no_grad():
        expected = draft(ids).logits.float()
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 0.02)
    logits.logsumexp(-1).sum().backward()
    assert all(weight.grad is not None for name, weight in parameters.items() if name not in frozen)
    assert all(weight.grad is None for weight in target.parameters())


def test_flags_of_the_targets_own_parameters_stay() -> None:
    """Catches a target that is frozen, or thawed, because its parameters are the draft's too."""
    for flag in (True, False):
        draft, target = pair()
        target.requires_grad_(flag)
        Student(draft, frozen=shared_with(draft, target))
        Student(draft, {"r": 4}, frozen=shared_with(draft, target))
        assert {weight.requires_grad for weight in target.parameters()} == {flag}


def test_a_draft_frozen_for_serving_learns_what_is_its_own() -> None:
    """Catches a shared parameter that still takes gradients for the target, and so hides that nothing else does."""
    draft, target = pair()
    draft.requires_grad_(False)
    target.requires_grad_(True)
    frozen = shared_with(draft, target)
    assert Student(draft, frozen=frozen).weights().keys() == dict(draft.named_parameters()).keys() - frozen


EXCLUDED: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "by name": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "by pattern": {"target_modules": r".*(q_proj|embed_tokens|lm_head)"},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "a list of its own": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "a pattern of its own": {"target_modules": "all-linear", "exclude_modules": r".*\.(k_proj|up_proj)"},
    "vectors": {"peft_type": "IA3", "target_modules": ["q_proj", "lm_head"], "feedforward_modules": []},
}


@pytest.mark.parametrize("options", EXCLUDED.values(), ids=EXCLUDED.keys())
def test_adapters_leave_shared_modules_alone(options: dict[str, Any]) -> None:
    """Catches an adapter that would be merged into the target, and exclusions of the user's that are forgotten."""
    draft, target = pair()
    student = Student(draft, options, frozen=shared_with(draft, target))
    names = student.weights().keys()
    assert names
    assert not names & {EMBEDDING, OUTPUT}
    assert any("q_proj" in name for name in names)
    if "exclude_modules" in options:
        assert not any("k_proj" in name or "up_proj" in name for name in names)
        assert any("v_proj" in name for name in names)


REFUSED: dict[str, dict[str, Any]] = {
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}},
    "nothing else": {"target_modules": ["lm_head"]},
    "a kind without exclusions": {"peft_type": "RANDLORA", "target_modules": ["q_proj", "lm_head"], "r": 4},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED.keys())
def test_an_adapter_of_shared_modules_is_refused(options: dict[str, Any]) -> None:
    """Catches one that trains for hours and can never go live, or does, in the target."""
    draft, target = pair()
    before = copies(target)
    with pytest.raises(ConfigError, match="peft_config"):
        Student(draft, options, frozen=shared_with(draft, target))
    assert same(target, before)
