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
from hf_osd.serving.verification import Draw, best_of, best_of_all, residual, verify

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


def reader(scores):
    return lambda places: scores[places.rows, [nodes[0] + 1 for nodes in places.nodes]]


def greedy(scores, proposal, **limits):
    """Both ways to choose, which have to agree."""
    limits = {"room": [scores.shape[1]] * len(scores), **limits}
    verdict = verify(proposal, best_of(reader(scores)), **limits)
    assert verify(proposal, best_of_all(scores), **limits) == verdict
    return verdict


def sampled(scores, proposal, generator=None):
    return verify(proposal, Draw(reader(scores), proposal, generator), [scores.shape[1]] * len(scores))


@pytest.mark.parametrize("k", [0, 1, 4])
def test_greedy_rejects_at_every_position(k):
    """Catches off-by-one errors in what is accepted, and a wrong correction or bonus token."""
    scores = torch.randn(1, k + 1, 7, generator=torch.Generator().manual_seed(k))
    choices = scores.argmax(-1)[0].tolist()
    for wrong_at in range(k + 1):  # k: nothing is wrong
        drafted = [(token + (index >= wrong_at)) % 7 for index, token in enumerate(choices[:k])]
        verdict = greedy(scores, Proposal(torch.tensor([drafted], dtype=torch.long).reshape(1, k)))
        assert verdict.paths == [list(range(wrong_at))]
        assert verdict.tokens == [choices[: wrong_at + 1]]


@given(st.data())
def test_greedy_takes_the_longest_right_path(data):
    """Catches nodes accepted behind a wrong one, and a path that ends before it has to, between equal siblings too."""
    nodes, vocab = data.draw(st.integers(0, 8)), 3
    parents = [data.draw(st.integers(ROOT, node - 1)) for node in range(nodes)]
    tokens, choices = ([data.draw(st.integers(0, vocab - 1)) for _ in range(count)] for count in (nodes, nodes + 1))
    texts = [(), *(tuple(tokens[node] for node in path) for path in lineage(parents))]
    choices = [choices[texts.index(text)] for text in texts]  # equal behind equal texts
    scores = torch.nn.functional.one_hot(torch.tensor([choices]), vocab).float()
    verdict = greedy(scores, Proposal(torch.tensor([tokens]).long().view(1, nodes), None, [parents]))
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
    verdict = sampled(p.log().expand(n, -1, -1), proposal, generator)
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


def test_nothing_is_chosen_beyond_the_end_of_a_row():
    """Catches a user's processor that is asked behind an eos, beyond the maximum length, or in a finished row."""
    scores, asked = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 4]] * 4), 5).float(), []
    choose = best_of(reader(scores))
    proposal = Proposal(torch.tensor([[1, 2, 3]] * 4))

    def spying(places):
        asked.append(places.rows)
        return choose(places)

    verdict = verify(proposal, spying, [0, 2, 9, 9], eos_token_ids=[3])
    assert verdict.tokens == [[], [1, 2], [1, 2, 3], [1, 2, 3]]
    assert verdict.paths == [[], [0], [0, 1], [0, 1]]
    assert asked == [[1, 2, 3], [1, 2, 3], [2, 3]]


class EveryOutcome:
    """
    Stands in for chance: run after run, each row goes through all that can happen to it, with its probability.

    The chance that a drawn token is accepted is where its acceptance turns over, as the draw rises from 0 to 1.

    Args:
        batch (`int`): Rows.
    """

    def __init__(self, batch):
        self.scripts = [[] for _ in range(batch)]  # of each row, [choice, probabilities] by choice
        self.undecided = []  # rows that still need a token at this level
        self.original = verification.Draw.__call__, verification.Draw._couple

    def install(self, monkeypatch):
        """Take over until the test is done."""
        monkeypatch.setattr(verification.Draw, "__call__", lambda *given: self.call(*given))
        monkeypatch.setattr(verification.Draw, "_couple", lambda *given: self.couple(*given))
        monkeypatch.setattr(verification, "sample", lambda weights, generator: self.sample(weights))
        self.patch = lambda u: monkeypatch.setattr(verification.torch, "rand", lambda *_, **__: u)

    def runs(self, run):
        """Call `run` until no row has anything new; yield what it returns, with the probability of each row's part."""
        done = [False] * len(self.scripts)
        while not all(done):
            self.places = [0] * len(self.scripts)
            found = run()
            weights = [0.0 if over else self.weight(script) for over, script in zip(done, self.scripts, strict=True)]
            yield found, weights
            done = [over or self.ends(script) for over, script in zip(done, self.scripts, strict=True)]

    @staticmethod
    def weight(script):
        return float(torch.tensor([chances[choice] for choice, chances in script], dtype=torch.float64).prod())

    @staticmethod
    def ends(script):
        """Move a script on to its next outcome; return whether there was none."""
        while script:
            choice, chances = script[-1]
            following = [i for i in range(choice + 1, len(chances)) if chances[i] > 1e-9]
            if following:
                script[-1][0] = following[0]
                return False
            script.pop()
        return True

    def choose(self, row, chances):
        script, place = self.scripts[row], self.places[row]
        self.places[row] += 1
        if place == len(script):
            script.append([next(i for i, chance in enumerate(chances) if chance > 1e-9), chances])
        return script[place][0]

    def call(self, draw, places):
        self.undecided = list(places.rows)
        self.rows = list(places.rows)
        return self.original[0](draw, places)

    def couple(self, draw, p, places, tokens, q):
        low, high = torch.zeros(len(places)).double(), torch.ones(len(places)).double()

        def accepted(u, p):
            self.patch(u)
            found = self.original[1](draw, p, places, tokens, q)
            return torch.tensor([place in found for place in places]), found

        for _ in range(40):
            middle = (low + high) / 2
            right, _ = accepted(middle, p.clone())
            low, high = torch.where(right, middle, low), torch.where(right, high, middle)
        chances = high.where(high > 1e-9, 0.0)
        refuses = [
            self.choose(self.rows[place], [float(chance), 1 - float(chance)])
            for place, chance in zip(places, chances, strict=True)
        ]
        _, found = accepted(torch.tensor(refuses).double(), p)
        self.undecided = [row for place, row in enumerate(self.rows) if place not in found]
        return found

    def sample(self, weights):
        chances = (weights / weights.sum(-1, keepdim=True)).tolist()
        return torch.tensor([self.choose(row, chance) for row, chance in zip(self.undecided, chances, strict=True)])


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
@settings(max_examples=40, deadline=None)
def test_trees_keep_the_targets_distribution_exactly(shape, seed, equal):
    """
    Catches any error in what is accepted: a residual left to another row, or a walk that goes on behind another token.

    All that can be drawn and all that can happen, with its probability, summed up: behind each text, the next token
    has the target's distribution, to rounding. The tokens that are not drawn may depend on those that are.
    """
    (parents, drawn), vocab = shape, 4
    n, generator = len(parents), torch.Generator().manual_seed(seed)
    draws = torch.tensor(list(itertools.product(range(vocab), repeat=drawn))).long().view(vocab**drawn, drawn)
    others = torch.randint(1 if equal else vocab, (len(draws), n - drawn), generator=generator)
    tokens = torch.cat([draws, others], dim=1)
    q = some_distributions(drawn, vocab, seed + 1)
    texts = [[(), *(tuple(row[node] for node in path) for path in lineage(parents))] for row in tokens.tolist()]
    found = sorted({text for row in texts for text in row})
    p = dict(zip(found, some_distributions(len(found), vocab, seed), strict=True))
    scores = torch.stack([torch.stack([p[text] for text in row]) for row in texts]).log()
    proposal = Proposal(tokens, q.expand(len(tokens), -1, -1) if drawn else None, [parents] * len(tokens))
    chances = q[torch.arange(drawn), draws].prod(1).tolist()
    following = {text: torch.zeros(vocab).double() for text in p}  # the mass of each token behind each text
    with pytest.MonkeyPatch.context() as monkeypatch:
        every = EveryOutcome(len(tokens))
        every.install(monkeypatch)
        for verdict, weights in every.runs(lambda: sampled(scores, proposal)):
            for row, weight, chance in zip(verdict.tokens, weights, chances, strict=True):
                for place, token in enumerate(row if weight else ()):
                    following[tuple(row[:place])][token] += weight * chance
    assert float(following[()].sum()) == pytest.approx(1.0)
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
    verdict = sampled(scores, Proposal(tokens, q.expand(n, -1, -1) if drawn else None, [parents] * n), generator)
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
        verdict = sampled(p.log().expand(n, -1, -1), Proposal(drafted, q.expand(n, 1, -1)), generator)
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
