"""Acceptance against exact distributions, on vocabularies small enough to write them down."""

import pytest
import torch
from fakes import prompts, tiny_model, wrong_draft
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.records import Proposal
from hf_osd.serving.verification import leading, residual, verify_greedy, verify_sampling

FALSE_ALARM = 1e-6  # of each statistical test below, by construction of its bound


def distributions(rows, vocab, seed, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*rows, vocab, generator=generator)).softmax(dim=-1)


def assert_distribution(counts, expected):
    """
    Compare counts with exact probabilities.

    Each frequency may differ from its probability by t = sqrt(ln(2 m / FALSE_ALARM) / (2 n)): by Hoeffding's
    inequality and a union bound over the m outcomes, a correct sampler fails with probability at most FALSE_ALARM.
    The sampler is seeded, so in practice it fails always or never.
    """
    total = counts.sum()
    bound = (torch.log(torch.tensor(2 * counts.numel() / FALSE_ALARM)) / (2 * total)).sqrt()
    difference = (counts / total - expected).abs().max()
    assert difference <= bound, f"off by {difference:.5f}, {bound:.5f} allowed"


@pytest.mark.parametrize("k", [0, 1, 4])
def test_greedy_rejects_at_every_position(k):
    """Catches off-by-one errors in what is accepted, and a wrong correction or bonus token."""
    scores = torch.randn(1, k + 1, 7, generator=torch.Generator().manual_seed(k))
    choices = scores.argmax(-1)[0].tolist()
    for wrong_at in range(k + 1):  # k: nothing is wrong
        drafted = [(token + (index >= wrong_at)) % 7 for index, token in enumerate(choices[:k])]
        verdict = verify_greedy(scores, Proposal(torch.tensor([drafted], dtype=torch.long).reshape(1, k)))
        assert verdict.accepted.tolist() == [wrong_at]
        assert verdict.tokens[0, : wrong_at + 1].tolist() == choices[: wrong_at + 1]


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_leading_counts_up_to_the_first_refusal(rows):
    """Catches tokens accepted behind a refusal."""
    expected = [[*row, False].index(False) for row in rows]
    assert leading(torch.tensor(rows)).tolist() == expected


@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 6), sharpness=st.floats(0.0, 6.0))
@settings(max_examples=60, deadline=None)
def test_one_token_has_the_targets_distribution_exactly(seed, vocab, sharpness):
    """Catches any error in acceptance or residual: min(p, q) + P(refused) * residual must be p, to rounding."""
    p, q = (row / row.sum() for row in distributions((2,), vocab, seed, sharpness).double()[:, None])
    accept = torch.minimum(p, q)  # P(drafted x and accepted)
    weights = residual(torch.stack([p, p], dim=1), q[None], torch.zeros(1, dtype=torch.long))
    refused = 1.0 - accept.sum()
    torch.testing.assert_close(accept + refused * weights / weights.sum(), p, atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", ["random", "disjoint", "equal", "point"])
def test_sampling_every_position(case):
    """
    Catches a biased acceptance, a residual at the wrong position, and a bonus token from the wrong distribution.

    For k = 3 the draft's tokens are sampled from q, so each committed token must have the target's distribution at
    its position, whichever of them are refused; the next position is reached only behind acceptances, independently.
    """
    n, k, vocab = 200_000, 3, 5
    p, q = distributions((k + 1,), vocab, 1), distributions((k,), vocab, 2)
    if case == "disjoint":
        p[:, :2], q[:, 2:] = 0, 0
    if case == "equal":
        q = p[:k].clone()
    if case == "point":
        q = torch.nn.functional.one_hot(torch.tensor([0, 3, 1]), vocab).float()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    generator = torch.Generator().manual_seed(7)
    drafted = torch.stack([torch.multinomial(row, n, replacement=True, generator=generator) for row in q], dim=1)
    proposal = Proposal(drafted, q.expand(n, -1, -1))
    verdict = verify_sampling(p.log().expand(n, -1, -1), proposal, generator)
    for position in range(k + 1):
        reached = verdict.accepted >= position
        if reached.sum() > 1000:
            assert_distribution(verdict.tokens[reached, position].bincount(minlength=vocab).float(), p[position])
        else:
            assert case in ("disjoint", "point")
    if case == "equal":
        assert (verdict.accepted == k).all()
    if case == "disjoint":
        assert (verdict.accepted == 0).all()


def test_rows_of_a_batch_are_independent():
    """Catches one row's acceptance or randomness used for another: joint frequencies must factorise."""
    n, vocab = 120_000, 3
    p, q = distributions((2,), vocab, 3), distributions((1,), vocab, 4)
    generator = torch.Generator().manual_seed(9)
    tokens = []
    for _ in range(2):
        drafted = torch.multinomial(q.expand(n, -1), 1, generator=generator)
        verdict = verify_sampling(p.log().expand(n, -1, -1), Proposal(drafted, q.expand(n, 1, -1)), generator)
        tokens.append(verdict.tokens[:, 0])
    joint = (tokens[0] * vocab + tokens[1]).bincount(minlength=vocab * vocab).float()
    assert_distribution(joint, torch.outer(p[0], p[0]).flatten())


@pytest.mark.parametrize("how", ["random", "noisy", "adversarial"])
@pytest.mark.parametrize("batch", ["rows", "padded"])
def test_sampled_sequences_have_the_targets_distribution(how, batch):
    """
    Catches errors of the whole engine when sampling: sequences of 3 tokens against all 6^3 exact probabilities.

    Temperature and top-k are on, so that processors count too; draft length 2 makes refusals, corrections and bonus
    tokens fall on every position.
    """
    vocab, rows, rounds = 6, 500, 12
    target = tiny_model("llama", vocab_size=vocab, initializer_range=0.15, pad_token_id=None)
    draft = wrong_draft(target, how)
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = exact_distribution(target, inputs["input_ids"], 3, temperature=1.3, top_k=4)
    inputs = {name: value.repeat(rows, 1) for name, value in inputs.items()}
    if batch == "padded":  # half of the rows: one more column of padding, so that lengths are ragged from the start
        inputs = {name: torch.nn.functional.pad(value, (1, 0)) for name, value in inputs.items()}
        inputs["input_ids"][::2, 0], inputs["attention_mask"][::2, 0] = 2, 1
    threshold = 0.25 if how == "noisy" else 0.0  # proposals that stop early must not bias the output either
    config = OnlineConfig(
        learn=False, draft_length=2, draft_length_schedule="constant", confidence_threshold=threshold
    )
    assistant = OnlineAssistant(draft, target, config)
    torch.manual_seed(11)
    counts = torch.zeros(vocab**3)
    for _ in range(rounds):
        output = hf_osd.generate(
            target, **inputs, online_assistant=assistant, do_sample=True, temperature=1.3, top_k=4, max_new_tokens=3
        )[:, -3:]
        output = output[1::2] if batch == "padded" else output
        counts += (output @ torch.tensor([vocab * vocab, vocab, 1])).bincount(minlength=vocab**3).float()
    assert 0 < assistant.stats().acceptance_rate < 1
    assert_distribution(counts, expected)


@torch.no_grad()
def exact_distribution(target, prompt, length, temperature, top_k):
    """The probability of every continuation, from plain forwards of all prefixes."""
    vocab = target.config.vocab_size
    probabilities = torch.ones(1, dtype=torch.float64)
    prefixes = prompt
    for _ in range(length):
        logits = target(prefixes).logits[:, -1] / temperature
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        probabilities = (probabilities[:, None] * logits.softmax(-1)).flatten()
        following = torch.arange(vocab).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(vocab, 0), following], dim=1)
    return probabilities.float()


def test_sampling_with_processors_and_no_proposal():
    """Catches a sampling path that breaks without a proposal (k = 0) or with contextual processors."""
    target = tiny_model("gpt2")
    for draft_length in (0, 4):
        config = OnlineConfig(learn=False, draft_length=draft_length, draft_length_schedule="constant")
        assistant = OnlineAssistant(wrong_draft(target, "noisy"), target, config)
        output = hf_osd.generate(
            target,
            **prompts(3),
            online_assistant=assistant,
            do_sample=True,
            top_p=0.9,
            min_p=0.02,
            repetition_penalty=1.2,
            no_repeat_ngram_size=1,
            max_new_tokens=15,
        )
        for row in output[:, 9:].tolist():
            assert len(set(row)) == len(row)  # what no_repeat_ngram_size=1 forbids must never be sampled
