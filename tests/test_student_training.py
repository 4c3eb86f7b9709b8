"""Training the copy: in cheaper ways that learn the same, in which types, and how far a step goes."""

from typing import Any

import pytest
import torch
from fakes import VOCAB, tiny_model

from hf_osd.config import OnlineConfig
from hf_osd.learning.student import Student
from hf_osd.records import Observation

pytest.importorskip("peft")


class Undisturbed:
    """A session that never interrupts."""

    def give_way(self) -> float:
        return 1.0

    def count_step(self, positions: int) -> None: ...
    def is_over(self) -> bool:
        return False


def learned(student: Student, arguments: dict[str, Any]) -> float:
    """Three steps with TRL's trainer on random requests; the mean loss."""
    from hf_osd.learning.session import UpdateCallback
    from hf_osd.learning.trainer import OnlineGKDTrainer

    config = OnlineConfig(batch_size=4, training_arguments=arguments)
    return OnlineGKDTrainer(student.model, requests, config, UpdateCallback(Undisturbed())).update(3, 1e-2)


def requests(count: int) -> list[Observation]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        ids = torch.randint(VOCAB, (12,), generator=generator)
        log_probs, top = torch.randn(6, VOCAB, generator=generator).log_softmax(-1).topk(8)
        tail = 1.0 - log_probs.exp().sum(-1)
        rows.append(Observation(ids[:6], ids[6:], top, log_probs, tail, ids[6:], torch.ones(6, dtype=torch.bool)))
    return rows


CHEAPER: dict[str, tuple[Any, dict[str, Any]]] = {
    "checkpointing": (None, {"gradient_checkpointing": True}),
    "LoRA, checkpointing": ({"r": 4}, {"gradient_checkpointing": True}),
    "linear layers, checkpointing": ({"target_modules": ["q_proj"]}, {"gradient_checkpointing": True}),
    "bf16": (None, {"bf16": True}),
    "LoRA, bf16": ({"r": 4}, {"bf16": True}),
    "LoRA, bf16, checkpointing": ({"r": 4}, {"bf16": True, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize(("config", "arguments"), CHEAPER.values(), ids=CHEAPER.keys())
def test_cheaper_training_learns_the_same(config: Any, arguments: dict[str, Any]) -> None:
    """Catches gradients that stop at a checkpoint above a frozen embedding, and bf16 that rounds what is trained."""
    draft = tiny_model("llama", dtype=torch.float32, tie_word_embeddings=True)
    plain, cheaper = Student(draft, config), Student(draft, config)
    before = {name: weight.clone() for name, weight in cheaper.state().items()}
    expected, found = learned(plain, {}), learned(cheaper, arguments)
    assert found == pytest.approx(expected, rel=0.02 if "bf16" in arguments else 1e-5)
    assert not any(torch.equal(weight, before[name]) for name, weight in cheaper.state().items())
    assert all(weight.dtype == torch.float32 for weight in cheaper.state().values())


def test_weights_of_the_draft_are_never_trained_in_bfloat16() -> None:
    """Catches whole modules trained beside an adapter in the draft's own type, in which small steps are lost."""
    draft = tiny_model("llama", dtype=torch.bfloat16)
    student = Student(draft, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]})
    assert {weight.dtype for weight in student.model.parameters()} == {torch.float32}
    assert learned(student, {}) > 0.0


def test_a_bfloat16_base_trains_a_float32_adapter() -> None:
    """Catches mixed types that do not multiply, with autocast and without."""
    draft = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    expected = learned(Student(tiny_model("llama", dtype=torch.float32, tie_word_embeddings=True), {}), {})
    for arguments in ({}, {"bf16": True}):
        assert learned(Student(draft, {}), arguments) == pytest.approx(expected, rel=0.03)


def test_a_first_step_moves_every_matrix_as_far_as_full_training_would() -> None:
    """Catches a scale that needs another learning rate by rank, or embeddings that run away from the other layers."""
    draft = tiny_model("llama", dtype=torch.float32, hidden_size=64, intermediate_size=64, tie_word_embeddings=True)
    for rank in (4, 32):
        student = Student(draft, {"r": rank})
        before = {name: weight.clone() for name, weight in student.weights().items()}
        rate = 1e-3
        with torch.no_grad():
            for name, weight in student.model.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name:  # zero at first; Adam's first step is the rate
                    weight += rate * torch.randn(weight.shape).sign()
        for name, weight in student.weights().items():
            moved = float((weight - before[name]).square().mean().sqrt())
            assert 0.5 * rate < moved < 2.0 * rate, (rank, name)
