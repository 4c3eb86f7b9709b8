"""Acceptance against exact distributions, on vocabularies small enough to write them down."""

import itertools

import pytest
import torch
from fakes import prompts, tiny_model, wrong_draft
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.records import Proposal
from hf_osd.serving import verification
from hf_osd.serving.tree import ROOT, chain, depths, lineage
from hf_osd.serving.verification import residual, verify_greedy, verify_sampling

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
        assert verdict.paths == [list(range(wrong_at))]
        assert verdict.tokens == [choices[: wrong_at + 1]]


@given(st.data())
def test_greedy_takes_the_longest_right_path(data):
    """Catches nodes accepted behind a wrong one, and a path that ends before it has to, between equal siblings too."""
    nodes, vocab = data.draw(st.integers(0, 8)), 3
    parents = [data.draw(st.integers(ROOT, node - 1)) for node in range(nodes)]
    tokens, choices = ([data.draw(st.integers(0, vocab - 1)) for _ in range(count)] for count in (nodes, nodes + 1))
    scores = torch.nn.functional.one_hot(torch.tensor([choices]), vocab).float()
    verdict = verify_greedy(scores, Proposal(torch.tensor([tokens]).long().view(1, nodes), None, [parents]))
    right = [[]]  # every path of which each token is the target's choice
    for path in right:
        end = path[-1] if path else ROOT
        following = [node for node in range(nodes) if parents[node] == end and tokens[node] == choices[end + 1]]
        right += [[*path, node] for node in following]
    (path,) = verdict.paths
    assert path in right
    assert len(path) == max(map(len, right))
    assert verdict.tokens == [[*(tokens[node] for node in path), choices[(path[-1] if path else ROOT) + 1]]]


@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 6), sharpness=st.floats(0.0, 6.0))
@settings(max_examples=60, deadline=None)
def test_one_token_has_the_targets_distribution_exactly(seed, vocab, sharpness):
    """Catches any error in acceptance or residual: min(p, q) + P(refused) * residual must be p, to rounding."""
    p, q = (row / row.sum() for row in distributions((2, 1), vocab, seed, sharpness).double())
    accept = torch.minimum(p, q)  # P(drafted x and accepted)
    weights = residual(p, q)
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
        reached = torch.tensor([row[position] for row in verdict.tokens if len(row) > position])
        if len(reached) > 1000:
            assert_distribution(reached.bincount(minlength=vocab).float(), p[position])
        else:
            assert case in ("disjoint", "point")
    if case == "equal":
        assert all(len(path) == k for path in verdict.paths)
    if case == "disjoint":
        assert not any(verdict.paths)


class EveryOutcome:
    """
    Stands in for chance: every row has an outcome of its own for each node, and the probability that it comes to that.

    The chance that a node is accepted is where its acceptance turns over, as the draw rises from 0 to 1.

    Args:
        outcomes (`torch.BoolTensor` of shape `(batch, n)`): Whether a row's node is accepted.
    """

    def __init__(self, outcomes):
        self.outcomes = outcomes
        self.chances = torch.full(outcomes.shape, 0.5, dtype=torch.float64)  # of nodes never tried: either outcome
        self.left = None

    def install(self, monkeypatch):
        """Take over until the test is done."""
        one_try = verification._Walk._try

        def tried(walk, child, tries):
            left, low, high = walk.left, torch.zeros(len(child)).double(), torch.ones(len(child)).double()

            def drawn(u):
                walk.left = left
                monkeypatch.setattr(verification.torch, "rand", lambda *_, **__: u)
                return one_try(walk, child, tries)

            for _ in range(40):
                middle = (low + high) / 2
                accepted = drawn(middle)
                low, high = torch.where(accepted, middle, low), torch.where(accepted, high, middle)
            wanted, rows = self.outcomes.gather(1, child[:, None])[:, 0], torch.arange(len(child))
            chance = torch.where(wanted, high, 1 - high)
            self.chances[rows[tries], child[tries]] = chance[tries]
            return drawn(torch.where(wanted, 0.0, 1.0).double())

        def sampled(weights, generator):
            self.left = weights
            return weights.argmax(-1)

        monkeypatch.setattr(verification._Walk, "_try", tried)
        monkeypatch.setattr(verification, "sample", sampled)


@st.composite
def shapes(draw):
    """Parents of up to six nodes of which the first, up to two, are a chain, and how many these are."""
    drawn = draw(st.integers(0, 2))
    parents = chain(drawn)
    for node in range(drawn, draw(st.integers(max(drawn, 1), 6))):
        parents.append(draw(st.integers(ROOT, node - 1)))
    return parents, drawn


def some_distributions(count, vocab, seed):
    """Distributions from flat to nearly certain; some forbid tokens, some allow a single one."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.tensor([0.5, 2.0, 6.0])[torch.randint(3, (count, 1), generator=generator)]
    logits = sharpness * torch.randn(count, vocab, generator=generator)
    forbidden = torch.rand(count, vocab, generator=generator) < 0.25
    forbidden.scatter_(1, torch.randint(vocab, (count, 1), generator=generator), False)
    return logits.double().masked_fill(forbidden, -torch.inf).softmax(-1)


@given(shape=shapes(), seed=st.integers(0, 10_000), equal=st.booleans())
@settings(max_examples=60, deadline=None)
def test_trees_keep_the_targets_distribution_exactly(shape, seed, equal):
    """
    Catches any error in recursive rejection: a residual that is not carried on to the next child, or to the wrong one.

    All that can be drawn and all that can happen, with its probability, summed up: behind each text, the next token
    has the target's distribution, to rounding. The tokens that are not drawn may depend on those that are.
    """
    (parents, drawn), vocab = shape, 4
    n, generator = len(parents), torch.Generator().manual_seed(seed)
    draws = list(itertools.product(range(vocab), repeat=drawn))
    outcomes = torch.tensor(list(itertools.product([False, True], repeat=n)))
    others = torch.randint(1 if equal else vocab, (len(draws), n - drawn), generator=generator)
    tokens = torch.cat([torch.tensor(draws).long().view(len(draws), drawn), others], dim=1)
    tokens = tokens.repeat_interleave(len(outcomes), 0)
    q = some_distributions(drawn, vocab, seed + 1)
    texts = [[(), *(tuple(row[node] for node in path) for path in lineage(parents))] for row in tokens.tolist()]
    found = sorted({text for row in texts for text in row})
    p = dict(zip(found, some_distributions(len(found), vocab, seed), strict=True))
    scores = torch.stack([torch.stack([p[text] for text in row]) for row in texts]).log()
    proposal = Proposal(tokens, q.expand(len(tokens), -1, -1) if drawn else None, [parents] * len(tokens))
    with pytest.MonkeyPatch.context() as monkeypatch:
        every = EveryOutcome(outcomes.repeat(len(draws), 1))
        every.install(monkeypatch)
        verdict = verify_sampling(scores, proposal)
    weights = every.chances.prod(1) * q[torch.arange(drawn), tokens[:, :drawn]].prod(1)
    assert float(weights.sum()) == pytest.approx(1.0)
    following = {text: torch.zeros(vocab).double() for text in p}  # the mass of each token behind each text
    for row, weight, left in zip(verdict.tokens, weights, every.left, strict=True):
        for place, token in enumerate(row[:-1]):
            following[tuple(row[:place])][token] += weight
        following[tuple(row[:-1])] += weight * left
    for text, mass in following.items():
        torch.testing.assert_close(mass, mass.sum() * p[text], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("parents", "drawn"),
    [([ROOT] * 3, 0), ([ROOT, 0, ROOT, ROOT, 0, 1], 2), ([ROOT, 0, 1, 1, 0, 0, ROOT, 6, 7], 3), ([ROOT] * 4, 1)],
)
def test_sampled_trees_at_every_depth(parents, drawn):
    """Catches a draw that is compared the wrong way round, or used twice: by chance itself, not its stand-in."""
    n, vocab, generator = 100_000, 4, torch.Generator().manual_seed(7)
    p, q = some_distributions(4, vocab, 5).float(), some_distributions(drawn, vocab, 6).float()
    tokens = torch.randint(vocab, (1, len(parents)), generator=generator).repeat(n, 1)
    for node, row in enumerate(q):
        tokens[:, node] = torch.multinomial(row, n, replacement=True, generator=generator)
    scores = p[[0, *depths(parents)]].log().expand(n, -1, -1)
    verdict = verify_sampling(
        scores, Proposal(tokens, q.expand(n, -1, -1) if drawn else None, [parents] * n), generator
    )
    for depth in range(max(depths(parents)) + 1):
        reached = torch.tensor([row[depth] for row in verdict.tokens if len(row) > depth])
        assert len(reached) > 1000
        assert_distribution(reached.bincount(minlength=vocab).float(), p[depth])


def test_rows_of_a_batch_are_independent():
    """Catches one row's acceptance or randomness used for another: joint frequencies must factorise."""
    n, vocab = 120_000, 3
    p, q = distributions((2,), vocab, 3), distributions((1,), vocab, 4)
    generator = torch.Generator().manual_seed(9)
    tokens = []
    for _ in range(2):
        drafted = torch.multinomial(q.expand(n, -1), 1, generator=generator)
        verdict = verify_sampling(p.log().expand(n, -1, -1), Proposal(drafted, q.expand(n, 1, -1)), generator)
        tokens.append(torch.tensor([row[0] for row in verdict.tokens]))
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
