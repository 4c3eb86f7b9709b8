"""The sparse divergences, against slow references written from the definitions, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_osd.learning.losses import (
    generalized_jsd,
    overlap,
    sparse_loss,
    student_outcomes,
    teacher_outcomes,
    token_loss,
)

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
LOSSES = ("jsd", "tv", "lk", "lk_hybrid")


def teacher_of(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sparse teacher of dense logits, with its tail summed exactly."""
    log_probs, ids = logits.log_softmax(-1).sort(descending=True)
    return ids[:, :k], log_probs[:, :k], log_probs[:, k:].exp().sum(-1)


def merged(logits: torch.Tensor, ids: torch.Tensor) -> list[list[float]]:
    """Probabilities over the teacher's tokens and the rest, with Python loops."""
    rows = []
    for row, kept in zip(logits.tolist(), ids.tolist(), strict=True):
        total = math.fsum(math.exp(x) for x in row)
        rest = math.fsum(math.exp(x) for i, x in enumerate(row) if i not in kept) / total
        rows.append([math.exp(row[i]) / total if i < len(row) else 0.0 for i in kept] + [rest])
    return rows


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0.0)


def reference(p: list[float], q: list[float], beta: float) -> float:
    if beta in (0.0, 1.0):
        return kl(p, q) if beta == 0.0 else kl(q, p)
    mixture = [beta * a + (1.0 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, mixture) + (1.0 - beta) * kl(q, mixture)


def pair(seed: int, n: int = 5, vocab: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, n, vocab, generator=generator, dtype=torch.float64) * 2.0
    return student, teacher


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 4, 16])
def test_divergence_equals_its_definition(beta: float, k: int) -> None:
    """Catches a swapped direction of the KL, a beta on the wrong side, and a tail that is left out."""
    student, teacher = pair(k)
    ids, log_probs, tail = teacher_of(teacher, k)
    got = sparse_loss(student, ids, log_probs, tail, beta=beta)
    p, q = merged(teacher, ids), merged(student, ids)
    want = [reference(a, b, beta) for a, b in zip(p, q, strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")  # TRL's, that it is experimental
@pytest.mark.parametrize("beta", BETAS)
def test_whole_vocabulary_equals_trl(beta: float) -> None:
    """Catches a beta convention other than TRL's, and mass invented for an empty tail."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = pair(0)
    ids, log_probs, tail = teacher_of(teacher, 17)
    dense = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="none").sum(-1)[0]
    torch.testing.assert_close(sparse_loss(student, ids, log_probs, tail, beta=beta), dense, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 16), beta=st.sampled_from(BETAS), scale=st.floats(0.01, 8.0))
@settings(max_examples=60, deadline=None)
def test_divergence_is_a_lower_bound(seed: int, k: int, beta: float, scale: float) -> None:
    """Catches anything that breaks the data-processing inequality: merging outcomes never raises a divergence."""
    student, teacher = (logits * scale for logits in pair(seed))
    sparse = sparse_loss(student, *teacher_of(teacher, k), beta=beta)
    dense = generalized_jsd(teacher.log_softmax(-1), student.log_softmax(-1), beta)
    assert (sparse >= -1e-9).all()
    # Tails are floored at 1e-8, which can only matter that much.
    assert (sparse <= dense + 1e-6).all()


@given(seed=st.integers(0, 10_000), k=st.integers(1, 17))
@settings(max_examples=40, deadline=None)
def test_overlap_is_the_shared_mass(seed: int, k: int) -> None:
    """Catches an overlap of logits or of unnormalised outcomes; equal distributions share everything."""
    student, teacher = pair(seed)
    sparse = teacher_of(teacher, k)
    shared = overlap(student, *sparse)
    want = [sum(map(min, a, b)) for a, b in zip(merged(teacher, sparse[0]), merged(student, sparse[0]), strict=True)]
    torch.testing.assert_close(shared, torch.tensor(want, dtype=torch.float64), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(overlap(teacher, *sparse), torch.ones(5, dtype=torch.float64))
    assert (shared >= torch.minimum(student.softmax(-1), teacher.softmax(-1)).sum(-1) - 1e-7).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [2, 6])
def test_gradients(beta: float, k: int) -> None:
    """Catches a detached term, in the tail above all; k = 6 is the whole vocabulary."""
    student, teacher = pair(3, n=2, vocab=6)
    sparse = teacher_of(teacher, k)
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda logits: sparse_loss(logits, *sparse, beta=beta), (student,))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("case", ["student tail 0", "student tail 1", "teacher tail 0", "teacher tail 1", "covered"])
def test_extremes_stay_finite(beta: float, case: str) -> None:
    """Catches log(0), 0 * inf and log1mexp at its poles, in float32 where they happen."""
    student, teacher = torch.zeros(2, 1, 8)
    k = 8 if case == "covered" else 2
    ids = torch.arange(k)[None]
    peak = {"student tail 0": (student, 0), "student tail 1": (student, 7)}
    peak |= {"teacher tail 0": (teacher, 0), "teacher tail 1": (teacher, 7), "covered": (student, 7)}
    logits, position = peak[case]
    logits[:, position] = 200.0
    log_probs = teacher.log_softmax(-1)
    tail = log_probs[:, k:].exp().sum(-1)
    student.requires_grad_(True)
    loss = sparse_loss(student, ids, log_probs[:, :k], tail, beta=beta).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_tokens_that_the_student_does_not_have() -> None:
    """Catches an index error, or lost mass, where the target's vocabulary is larger than the draft's."""
    student, teacher = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    ids, log_probs, tail = teacher_of(teacher, 7)
    got = sparse_loss(student, ids, log_probs, tail)
    for row in range(3):
        known = [i for i in ids[row].tolist() if i < 6]
        p = [teacher[row].softmax(-1)[i].item() for i in known]
        q = [student[row].softmax(-1)[i].item() for i in known]
        p_rest, q_rest = 1.0 - sum(p), 1.0 - sum(q)
        if len(known) == 6:
            assert got[row] > kl(p, q)
        else:
            assert got[row].item() == pytest.approx(kl([*p, p_rest], [*q, q_rest]), abs=1e-9)


def test_student_outcomes_are_a_distribution() -> None:
    """Catches a tail that is not what the tokens leave."""
    student, _ = pair(9)
    outcomes = student_outcomes(student, torch.tensor([[1, 3, 5]] * 5))
    torch.testing.assert_close(outcomes.exp().sum(-1), torch.ones(5, dtype=torch.float64))


def test_beta_outside_its_range_is_refused() -> None:
    """Catches a divergence that turns negative in silence."""
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got 1.5"):
        generalized_jsd(torch.zeros(1, 2), torch.zeros(1, 2), 1.5)


def definition(p: list[float], q: list[float], loss: str) -> float:
    """The loss of one position from its definition, with the total variation distance by absolute differences."""
    distance = 0.5 * math.fsum(abs(a - b) for a, b in zip(p, q, strict=True))
    if loss == "jsd":
        return kl(p, q)
    if loss == "tv":
        return distance
    if loss == "lk":
        return -math.log(1.0 - distance)
    weight = math.exp(-3.0 * (1.0 - distance))
    return weight * kl(p, q) + (1.0 - weight) * distance


def loss_of(student: torch.Tensor, sparse: tuple[torch.Tensor, torch.Tensor, torch.Tensor], loss: str) -> torch.Tensor:
    teacher = teacher_outcomes(*sparse, student.shape[-1])
    return token_loss(teacher, student_outcomes(student, sparse[0]), loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("k", [1, 4, 17])
def test_every_loss_equals_its_definition(loss: str, k: int) -> None:
    """Catches a factor of two, a weight that falls the wrong way, and a tail that is left out of the shared mass."""
    student, teacher = pair(k + 20)
    sparse = teacher_of(teacher, k)
    rows = zip(merged(teacher, sparse[0]), merged(student, sparse[0]), strict=True)
    want = torch.tensor([definition(p, q, loss) for p, q in rows], dtype=torch.float64)
    torch.testing.assert_close(loss_of(student, sparse, loss), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("k", [2, 6])
def test_a_student_like_its_teacher_pays_nothing(loss: str, k: int) -> None:
    """Catches a loss whose optimum is not the teacher, and one that pays for being right."""
    teacher = pair(5, vocab=6)[1].clone().requires_grad_(True)
    sparse = teacher_of(teacher.detach(), k)
    paid = loss_of(teacher, sparse, loss)
    torch.testing.assert_close(paid, torch.zeros_like(paid), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("loss", ["tv", "lk"])
@pytest.mark.parametrize("k", [2, 6])
def test_gradients_of_the_shared_mass(loss: str, k: int) -> None:
    """Catches a detached term; away from the ties of the minimum, where there is no gradient."""
    student, teacher = pair(3, n=2, vocab=6)
    sparse = teacher_of(teacher, k)
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda logits: loss_of(logits, sparse, loss), (student,))


def test_the_weight_of_the_hybrid_is_held_constant() -> None:
    """Catches a weight that is learned: the student could then pay less by staying where the loss is the cheap one."""
    student, teacher = pair(4, n=3)
    sparse = teacher_of(teacher, 5)
    student.requires_grad_(True)
    gradients = {
        loss: torch.autograd.grad(loss_of(student, sparse, loss).sum(), student)[0]
        for loss in ("jsd", "tv", "lk_hybrid")
    }
    weight = torch.exp(-3.0 * overlap(student.detach(), *sparse))[:, None]
    want = weight * gradients["jsd"] + (1.0 - weight) * gradients["tv"]
    torch.testing.assert_close(gradients["lk_hybrid"], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["lk", "lk_hybrid"])
def test_a_student_that_shares_nothing_is_still_taught(loss: str) -> None:
    """Catches log(0), and the gradient of `tv`, which is gone where the student is certain of another token."""
    student, teacher = torch.zeros(2, 1, 8)
    student[0, 7] = teacher[0, 0] = 40.0
    student.requires_grad_(True)
    sparse = teacher_of(teacher, 8)
    (vanished,) = torch.autograd.grad(loss_of(student, sparse, "tv").sum(), student)
    paid = loss_of(student, sparse, loss).sum()
    (gradient,) = torch.autograd.grad(paid, student)
    assert vanished.abs().max() < 1e-5
    assert math.isfinite(paid.item())
    assert gradient.isfinite().all()
    assert gradient[0, 0] < -0.1
    assert gradient[0, 7] > 0.1


def test_speculative_sampling_accepts_the_shared_mass() -> None:
    """Catches an overlap that is not what serving measures: a token of q passes with probability min(1, p / q)."""
    student, teacher = pair(11, n=1, vocab=9)
    p, q = teacher.softmax(-1)[0], student.softmax(-1)[0]
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(q, count, replacement=True, generator=generator)
    coins = torch.rand(count, generator=generator, dtype=torch.float64)
    rate = float((coins < p[tokens] / q[tokens]).double().mean())
    expected = overlap(student, *teacher_of(teacher, 9)).item()
    # Five standard errors: one false alarm in over a million seeds, and this one is fixed.
    assert abs(rate - expected) < 5.0 * math.sqrt(expected * (1.0 - expected) / count)
    assert 0.1 < expected < 0.9


def test_an_unknown_loss_is_refused() -> None:
    """Catches a misspelled loss that trains with another one."""
    with pytest.raises(ValueError, match=r"loss must be .*, got 'kl'"):
        token_loss(torch.zeros(1, 2), torch.zeros(1, 2), "kl")
