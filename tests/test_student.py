"""The training copy: what it publishes, what it keeps, and what it refuses."""

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes import VOCAB, add_adapter, tiny_model
from transformers import PreTrainedModel

from hf_osd.errors import ConfigError, LearningError, MissingDependencyError
from hf_osd.learning.student import Student

peft = pytest.importorskip("peft")


def shaken(student: Student, seed: int = 0) -> Student:
    """Change every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return student


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    return model.eval()(ids).logits.float()


def published(draft: PreTrainedModel, student: Student) -> PreTrainedModel:
    """A copy of the draft that serves what the student published, in float32."""
    live = copy.deepcopy(draft).float()
    parameters = dict(live.named_parameters())
    with torch.no_grad():
        for name, weight in student.weights().items():
            parameters[name].copy_(weight)
    return live


def assert_published_is_trained(draft: PreTrainedModel, config: Any) -> Student:
    before = logits(draft)
    student = Student(draft, config)
    assert torch.allclose(logits(student.model), logits(published(draft, student)), atol=1e-4)
    shaken(student)
    state = {name: weight.clone() for name, weight in student.state(base=True).items()}
    trained = logits(student.model)
    assert torch.allclose(trained, logits(published(draft, student)), atol=1e-4, rtol=1e-4)
    assert (trained - before).abs().max() > 0.01
    assert torch.equal(logits(draft), before)
    assert all(torch.equal(weight, state[name]) for name, weight in student.state(base=True).items())
    return student


LORA: dict[str, dict[str, Any]] = {
    "defaults": {},
    "linear layers": {"r": 4, "target_modules": "all-linear", "use_rslora": False},
    "weight-decomposed": {"r": 4, "target_modules": "all-linear", "use_dora": True},
    "dropout": {"r": 4, "lora_dropout": 0.5},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "qwen3", "gemma"])
@pytest.mark.parametrize("options", LORA.values(), ids=LORA.keys())
def test_merged_weights_do_what_the_adapter_does(kind: str, options: dict[str, Any]) -> None:
    """Catches a wrong scale, a transposed delta (gpt2 has Conv1D), and a merge that changes the student or draft."""
    draft = tiny_model(kind, dtype=torch.float32)
    student = assert_published_is_trained(draft, options)
    names = {name for name, _ in draft.named_parameters()}
    assert student.weights().keys() < names
    assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in student.weights().values())


OTHERS: dict[str, Callable[[], Any]] = {
    "bias of adapted layers": lambda: {"target_modules": ["c_attn"], "bias": "lora_only"},
    "all biases": lambda: {"target_modules": ["c_attn"], "bias": "all"},
    "bias in the adapter": lambda: {"target_modules": ["c_attn"], "lora_bias": True},
    "whole modules": lambda: {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe"]},
    "IA3": lambda: peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"]),
    "another adapter": lambda: {"peft_type": "RANDLORA", "target_modules": ["c_attn"], "r": 4},
    "a bank of vectors": lambda: {"peft_type": "VBLORA", "target_modules": ["c_attn"], "vector_length": 8, "topk": 2},
    "new tokens": lambda: {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": list(range(3, VOCAB))}},
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_everything_that_is_trained_is_published(config: Callable[[], Any]) -> None:
    """Catches parameters beside the low-rank matrices that are trained and then forgotten."""
    assert_published_is_trained(tiny_model("gpt2", dtype=torch.float32), config())


TIED: dict[str, dict[str, Any]] = {
    "adapter": {"r": 4},
    "adapter of both": {"r": 4, "ensure_weight_tying": True},
    "trained whole": {"r": 4, "whole": True},
    "trained whole, tied by peft": {"r": 4, "whole": True, "ensure_weight_tying": True},
}


@pytest.mark.parametrize(("kind", "linear", "name"), [("llama", "q_proj", "embed_tokens"), ("gpt2", "c_attn", "wte")])
@pytest.mark.parametrize("options", TIED.values(), ids=TIED.keys())
def test_a_shared_embedding_stays_shared(kind: str, linear: str, name: str, options: dict[str, Any]) -> None:
    """Catches an output layer that keeps the old embedding, or learns one that the live draft cannot hold."""
    options = dict(options)
    chosen = {"modules_to_save": [name]} if options.pop("whole", False) else {}
    options |= {"target_modules": [linear] if chosen else [linear, name], **chosen}
    draft = tiny_model(kind, dtype=torch.float32, tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = assert_published_is_trained(draft, options)
    embedding = draft.get_input_embeddings().weight
    assert sum(weight.shape == embedding.shape for weight in student.weights().values()) == 1
    # One parameter for both uses: its gradient is the sum of the two.
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    assert len({parameter.untyped_storage().data_ptr() for parameter in trained}) == len(trained)


def test_a_shared_embedding_learns_from_both_uses() -> None:
    """Catches an output layer whose share of the embedding's gradient is lost."""
    draft = tiny_model("llama", dtype=torch.float32, tie_word_embeddings=True)
    student = shaken(Student(draft, {"r": 4, "target_modules": ["embed_tokens"]}))
    ids = torch.tensor([[5, 6, 7, 8]])
    student.model(ids).logits.logsumexp(-1).sum().backward()
    live = published(draft, student)
    live(ids).logits.logsumexp(-1).sum().backward()
    layer = student.model.get_base_model().get_input_embeddings()
    gradient = live.get_input_embeddings().weight.grad  # (vocab, hidden), of W0 + scale * (B A)^T
    expected = layer.scaling["default"] * (layer.lora_embedding_B["default"].T @ gradient.T)
    assert torch.allclose(layer.lora_embedding_A["default"].grad, expected, atol=1e-4)


def test_the_output_layer_alone_of_a_shared_pair_is_refused() -> None:
    """Catches an adapter that trains and can never go live."""
    draft = tiny_model("llama", dtype=torch.float32, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="lm_head"):
        Student(draft, {"target_modules": ["lm_head"]})


def test_an_output_layer_of_its_own_can_be_adapted() -> None:
    """Catches a refusal, or a tie, where there is nothing to share."""
    draft = tiny_model("llama", dtype=torch.float32, tie_word_embeddings=False)
    student = assert_published_is_trained(draft, {"target_modules": ["embed_tokens", "lm_head"]})
    assert set(student.weights()) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_adapter_is_float32_whatever_the_draft_is(dtype: torch.dtype) -> None:
    """Catches an adapter in which small steps are lost, and a published delta rounded before it is added."""
    draft = tiny_model("llama", dtype=dtype, tie_word_embeddings=True)
    student = shaken(Student(draft, {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}))
    base = {weight.dtype for weight in student.model.parameters() if not weight.requires_grad}
    assert base == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}
    assert {weight.dtype for weight in student.model.parameters() if weight.requires_grad} == {torch.float32}
    layer = student.model.get_base_model().model.layers[0].self_attn.q_proj
    expected = layer.weight.float() + layer.get_delta_weight("default")
    assert torch.allclose(student.weights()["model.layers.0.self_attn.q_proj.weight"], expected, atol=1e-6)


def test_without_an_adapter_everything_is_trained_in_float32() -> None:
    """Catches a student that shares memory with the draft, or leaves out what is frozen for serving only."""
    draft = tiny_model("llama", dtype=torch.bfloat16).requires_grad_(False)
    student = shaken(Student(draft))
    assert student.weights().keys() == dict(draft.named_parameters()).keys() == student.state().keys()
    assert torch.allclose(logits(student.model), logits(published(draft, student)))
    assert not any(torch.equal(weight, student.weights()[name]) for name, weight in draft.named_parameters())


def test_parameters_frozen_on_purpose_stay_frozen() -> None:
    """Catches a student that trains what the user excluded."""
    draft = tiny_model("llama", dtype=torch.float32)
    draft.get_input_embeddings().requires_grad_(False)
    published_names = Student(draft).weights().keys()
    assert published_names == dict(draft.named_parameters()).keys() - {"model.embed_tokens.weight"}


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "loaded for inference"])
@pytest.mark.parametrize("injected", [True, False], ids=["injected", "wrapped"])
def test_an_adapter_that_the_draft_carries_is_what_is_trained(trainable: bool, injected: bool) -> None:
    """Catches training, and publishing, the base weights of a draft that has an adapter of its own."""
    draft = tiny_model("llama", dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    if injected:
        add_adapter(draft, config)
    else:
        draft = peft.get_peft_model(draft, config)
    if not trainable:
        draft.requires_grad_(False)
    student = shaken(Student(draft))
    assert student.weights()
    assert all("lora_" in name for name in student.weights())
    assert student.weights().keys() <= dict(draft.named_parameters()).keys()
    assert torch.allclose(logits(student.model), logits(published(draft, student)))
    with pytest.raises(ConfigError, match="adapter already"):
        Student(draft, config)


def test_a_state_brings_an_earlier_student_back_in_place() -> None:
    """Catches a state that misses a parameter, and one that an optimiser loses hold of."""
    student = Student(tiny_model("llama", dtype=torch.float32), {"r": 4, "use_dora": True})
    good = {name: weight.clone() for name, weight in shaken(student).state().items()}
    live = student.weights()
    optimizer = torch.optim.SGD([p for p in student.model.parameters() if p.requires_grad], lr=0.1)
    shaken(student, seed=2)
    assert any(not torch.equal(weight, live[name]) for name, weight in student.weights().items())
    student.load_state(good)
    assert all(torch.equal(weight, live[name]) for name, weight in student.weights().items())
    student.model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    optimizer.step()
    assert any(not torch.equal(weight, live[name]) for name, weight in student.weights().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learning_goes_on_from_a_draft_that_was_published_to(dtype: torch.dtype) -> None:
    """Catches a restart that adds the adapter to weights which have it merged in already."""
    draft = tiny_model("llama", dtype=dtype)
    config = {"r": 4, "target_modules": "all-linear"}
    first = shaken(Student(draft, config))
    live = copy.deepcopy(draft)
    with torch.no_grad():
        for name, weight in first.weights().items():
            live.get_parameter(name).copy_(weight)
    second = Student(live, config, seed=5)
    second.load_state(first.state(base=True))
    weights = first.weights()
    assert all(torch.equal(weight, weights[name]) for name, weight in second.weights().items())
    assert torch.equal(logits(first.model), logits(second.model))


def test_the_state_of_an_adapter_is_the_adapter() -> None:
    """Catches snapshots that copy the frozen draft, which is what an adapter is to avoid."""
    student = Student(tiny_model("llama", dtype=torch.float32), {"r": 4})
    assert student.state()
    assert all("lora_" in name for name in student.state())
    assert student.state().keys() < student.state(base=True).keys()
    full = Student(tiny_model("llama", dtype=torch.float32))
    assert full.state().keys() == full.state(base=True).keys()


def test_a_state_of_something_else_changes_nothing() -> None:
    """Catches half a state taken before the mismatch is noticed, and an error that does not name it."""
    draft = tiny_model("llama", dtype=torch.float32)
    student = shaken(Student(draft, {"r": 4, "target_modules": ["q_proj"]}))
    before = student.weights()
    state = {name: weight + 1.0 for name, weight in student.state().items()}
    name = list(state)[-1]
    for wrong, message in (
        ({**state, name: torch.zeros(2)}, name),
        ({**state, "elsewhere": torch.zeros(2)}, "elsewhere"),
        ({other: weight for other, weight in state.items() if other != name}, name),
        (shaken(Student(draft, {"r": 8, "target_modules": ["q_proj"]})).state(), "q_proj"),
        (student.weights(), "q_proj"),
    ):
        with pytest.raises(LearningError, match=message.replace(".", r"\.")):
            student.load_state(wrong)
    assert all(torch.equal(weight, before[name]) for name, weight in student.weights().items())


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown module": ({"target_modules": ["nowhere"]}, "nowhere"),
    "unknown field": ({"rank": 4}, "rank"),
    "unknown type": ({"peft_type": "LOWRA"}, "LOWRA"),
    "bad rank": ({"r": 0}, "`r` should be"),
    "not a config": (4, "int"),
    "prompt": ({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}, "PROMPT_TUNING"),
    "prefix": ({"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}, "PREFIX_TUNING"),
    "added layers": (
        {
            "peft_type": "ADAPTION_PROMPT",
            "task_type": "CAUSAL_LM",
            "adapter_len": 2,
            "adapter_layers": 1,
            "target_modules": "self_attn",
        },
        "ADAPTION_PROMPT",
    ),
    "by input": ({"target_modules": ["q_proj"], "alora_invocation_tokens": [5]}, "LORA"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_by_name(config: Any, message: str) -> None:
    """Catches an adapter that trains for hours and cannot go live, and peft's errors escaping as they are."""
    with pytest.raises(ConfigError, match=message):
        Student(tiny_model("llama", dtype=torch.float32), config)


def test_missing_peft_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bare ImportError, and a draft without an adapter that needs peft."""
    real = importlib.__import__

    def without_peft(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    draft = tiny_model("llama", dtype=torch.float32)
    monkeypatch.setattr("builtins.__import__", without_peft)
    Student(draft).weights()
    with pytest.raises(MissingDependencyError, match=r"hf-osd\[peft\]"):
        Student(draft, {"r": 4})


def test_the_seed_decides_the_adapter_and_the_global_state_is_untouched() -> None:
    """Catches runs that cannot be repeated, and one that changes what serving samples."""
    draft = tiny_model("llama", dtype=torch.float32)
    config = peft.LoraConfig(r=4)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = (Student(draft, config, seed).state() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())
    assert config.target_modules is None  # the user's own object


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("neox", False)])
def test_a_bare_mapping_adapts_every_matrix_once(kind: str, tied: bool) -> None:
    """Catches defaults that leave a matrix out, or adapt a shared one twice."""
    draft = tiny_model(kind, dtype=torch.float32, tie_word_embeddings=tied)
    matrices = {name for name, weight in draft.named_parameters() if weight.dim() == 2 and "wpe" not in name}
    student = Student(draft, {})
    assert matrices <= student.weights().keys()
    assert len(student.state()) == 2 * len(matrices)


def test_attention_without_a_backward_pass() -> None:
    """Catches a draft that serves with flex attention on a CPU, where every update would fail."""
    draft = tiny_model("llama", dtype=torch.float32)
    draft.set_attn_implementation("flex_attention")
    assert Student(draft).model.config._attn_implementation == "sdpa"
    assert draft.config._attn_implementation == "flex_attention"
