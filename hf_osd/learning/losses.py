"""
Divergences between a student's logits and a sparse teacher, as pure tensor functions.

A sparse teacher knows its `k` most likely tokens and the mass of all others. Teacher and student are compared as
distributions over `k + 1` outcomes: those tokens, and one bucket, the tail. Merging outcomes never raises a
divergence, so every value here is a lower bound of its dense counterpart, equal where `k` is the whole vocabulary.
"""

import math

import torch

_SMALLEST_TAIL = 1e-8  # probability: a float32 tail, one minus a sum, is nothing but rounding below this
_LOG_ZERO = -100.0  # stands for log 0, and stays finite in products and gradients; its exponential is 0 in float32


def student_outcomes(logits: torch.Tensor, teacher_ids: torch.Tensor) -> torch.Tensor:
    """
    Return log-probabilities of a student over the outcomes of a sparse teacher.

    The tail is summed over the complement of the teacher's tokens rather than taken as one minus their sum, so it is
    exact, with finite gradients, down to any mass.

    Args:
        logits (`torch.FloatTensor` of shape `(n, vocab)`): Logits of the student.
        teacher_ids (`torch.LongTensor` of shape `(n, k)`): Tokens of the teacher; ids that the student does not have
            get no probability.

    Returns:
        `torch.FloatTensor` of shape `(n, k + 1)`: Log-probabilities of the `k` tokens, then of the tail. Outcomes
        without mass have about -100 instead of minus infinity.
    """
    vocab_size = logits.shape[-1]
    unknown = teacher_ids >= vocab_size
    # Unlike -inf, a logit far below the best one has a gradient, zero, where nothing is left for the tail.
    floor = logits.detach().amax(-1, keepdim=True) + _LOG_ZERO
    inside = torch.zeros(*logits.shape[:-1], vocab_size + 1, dtype=torch.bool, device=logits.device)
    inside = inside.scatter(-1, teacher_ids.clamp(max=vocab_size), True)[..., :vocab_size]
    tail = torch.where(inside, floor, logits).logsumexp(-1, keepdim=True)
    top = torch.where(unknown, floor, logits.gather(-1, teacher_ids.clamp(max=vocab_size - 1)))
    return torch.cat((top, tail), dim=-1).log_softmax(-1)


def teacher_outcomes(
    teacher_ids: torch.Tensor, teacher_log_probs: torch.Tensor, teacher_tail: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """
    Return log-probabilities of a sparse teacher over its outcomes, for a student of `vocab_size` tokens.

    Args:
        teacher_ids (`torch.LongTensor` of shape `(n, k)`): Tokens of the teacher.
        teacher_log_probs (`torch.FloatTensor` of shape `(n, k)`): Their log-probabilities.
        teacher_tail (`torch.FloatTensor` of shape `(n,)`): Probability of all other tokens together.
        vocab_size (`int`): Tokens the student knows; the mass of others moves to the tail.

    Returns:
        `torch.FloatTensor` of shape `(n, k + 1)`: Log-probabilities of the `k` tokens, then of the tail.
    """
    unknown = teacher_ids >= vocab_size
    tail = teacher_tail + (teacher_log_probs.exp() * unknown).sum(-1)
    log_tail = tail.clamp(min=_SMALLEST_TAIL).log()
    if teacher_ids.shape[-1] >= vocab_size:  # the tail is empty: the smallest one would be invented mass
        log_tail = log_tail.masked_fill(tail <= _SMALLEST_TAIL, _LOG_ZERO)
    log_probs = teacher_log_probs.masked_fill(unknown, _LOG_ZERO).clamp(min=_LOG_ZERO)
    return torch.cat((log_probs, log_tail.unsqueeze(-1)), dim=-1)


def generalized_jsd(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """
    Generalised Jensen-Shannon divergence of two distributions, eq. 1 of https://arxiv.org/abs/2306.13649.

    `beta * KL(teacher || m) + (1 - beta) * KL(student || m)` with `m = beta * teacher + (1 - beta) * student`. As in
    TRL, 0 and 1 stand for the plain KL divergences, not for the limits of this expression, which are zero.

    Args:
        teacher (`torch.FloatTensor` of shape `(n, outcomes)`): Log-probabilities of the teacher.
        student (`torch.FloatTensor` of shape `(n, outcomes)`): Log-probabilities of the student.
        beta (`float`): In [0, 1]. 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher).

    Returns:
        `torch.FloatTensor` of shape `(n,)`: Divergences in nats.

    Raises:
        ValueError: `beta` is outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1], got {beta!r}")
    if beta == 0.0:
        return _kl(teacher, student)
    if beta == 1.0:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def token_loss(teacher: torch.Tensor, student: torch.Tensor, loss: str, beta: float = 0.0) -> torch.Tensor:
    """
    Return the loss of a student against its teacher at each position.

    With the acceptance rate `a`, the mass that both share: `"tv"` is `1 - a`; `"lk"` is `-log a`, which has a gradient
    even where next to nothing is shared; `"lk_hybrid"` is `w * KL(teacher || student) + (1 - w) * (1 - a)` with
    `w = exp(-3 a)`, held constant (https://arxiv.org/abs/2602.23881).

    Args:
        teacher (`torch.FloatTensor` of shape `(n, outcomes)`): Log-probabilities of the teacher.
        student (`torch.FloatTensor` of shape `(n, outcomes)`): Log-probabilities of the student.
        loss (`str`): `"jsd"`, `"tv"`, `"lk"` or `"lk_hybrid"`.
        beta (`float`, defaults to 0.0): Of `"jsd"`; see [`generalized_jsd`].

    Returns:
        `torch.FloatTensor` of shape `(n,)`: Losses, in nats where they are divergences.

    Raises:
        ValueError: `beta` is outside [0, 1], or there is no such loss.
    """
    if loss == "jsd":
        return generalized_jsd(teacher, student, beta)
    shared = torch.minimum(teacher, student).exp().sum(-1)
    if loss == "tv":
        return 1.0 - shared
    if loss == "lk":
        return -torch.minimum(teacher, student).logsumexp(-1)
    if loss == "lk_hybrid":
        weight = torch.exp(-3.0 * shared.detach())
        return weight * _kl(teacher, student) + (1.0 - weight) * (1.0 - shared)
    raise ValueError(f"loss must be 'jsd', 'tv', 'lk' or 'lk_hybrid', got {loss!r}")


def sparse_loss(
    student_logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    teacher_tail: torch.Tensor,
    loss: str = "jsd",
    beta: float = 0.0,
) -> torch.Tensor:
    """
    Return the loss of a student against a sparse teacher at each position; see [`token_loss`].

    Args:
        student_logits (`torch.FloatTensor` of shape `(n, vocab)`): Logits of the student.
        teacher_ids, teacher_log_probs, teacher_tail: The teacher; see [`teacher_outcomes`].
        loss (`str`, defaults to `"jsd"`): See [`token_loss`].
        beta (`float`, defaults to 0.0): Of `"jsd"`: 0 is the forward KL, 1 the reverse KL.

    Returns:
        `torch.FloatTensor` of shape `(n,)`: Losses; divergences are never more than those of the full distributions.

    Raises:
        ValueError: `beta` is outside [0, 1], or there is no such loss.
    """
    teacher = teacher_outcomes(teacher_ids, teacher_log_probs, teacher_tail, student_logits.shape[-1])
    return token_loss(teacher, student_outcomes(student_logits, teacher_ids), loss, beta)


def overlap(
    student_logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    teacher_tail: torch.Tensor,
) -> torch.Tensor:
    """
    Return the mass that a sparse teacher and a student share: the sum over outcomes of min(p, q).

    It is the probability that a token sampled from the student passes speculative sampling
    (https://arxiv.org/abs/2211.17192, corollary 3.6), or an upper bound of it where the tail matters. Tokens that the
    student does not have are never sampled: the teacher's mass on them is not shared.

    Args:
        student_logits (`torch.FloatTensor` of shape `(n, vocab)`): Logits of the student.
        teacher_ids, teacher_log_probs, teacher_tail: The teacher; see [`teacher_outcomes`].

    Returns:
        `torch.FloatTensor` of shape `(n,)`: Shared mass, in [0, 1].
    """
    vocab_size = student_logits.shape[-1]
    can_be_sampled = teacher_log_probs.masked_fill(teacher_ids >= vocab_size, _LOG_ZERO)
    teacher = teacher_outcomes(teacher_ids, can_be_sampled, teacher_tail, vocab_size)
    return torch.minimum(teacher, student_outcomes(student_logits, teacher_ids)).exp().sum(-1)
