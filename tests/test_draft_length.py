"""How much is proposed, and by whom: against brute force, and over thousands of simulated rounds."""

import random
from itertools import accumulate

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_osd.records import Proposal
from hf_osd.serving.draft_length import Guess, MeasuredLength, Plan, Round, bucket
from hf_osd.serving.experience import CONFIDENCES, Experience, Stance, confidence_bin, evidence_bin, stance
from hf_osd.serving.lookup import Evidence
from hf_osd.serving.measured import MeasuredSpeculator
from hf_osd.serving.sequences import Sequences
from hf_osd.serving.steps import Counts, Step

ROOM = 8
NODES = 16
NO_DRAFT = Plan(0, NODES)


def experience(plain=1.0, extra=0.05, step=0.1, acceptance=0.6, batch=1):
    """What a machine would have taught: a round of `plain` seconds and `extra` for each token proposed."""
    known = Experience()
    for tokens in range(1, 18):
        known.target_costs.note(batch, 100, tokens, plain + extra * (tokens - 1))
    known.draft_costs.note(batch, 100, 1, step)
    known.acceptance.value = known.rescue.value = acceptance
    return known


def a_round(batch=1, lag=1, draft_room=ROOM):
    """A round in the middle of an answer."""
    return Round(range(batch), 100, lag, draft_room, 16, NODES, remaining=1000, generated=10)


def guess(*chances):
    """A chain that the lookup proposes, of tokens with these chances."""
    return [Guess(place, reach, place == 0) for place, reach in enumerate(accumulate(chances, lambda a, b: a * b))]


def expected_tokens(acceptance, k):
    """Each token counts if all before it were accepted, and one comes from the target."""
    return 1.0 + sum(acceptance**i for i in range(1, k + 1))


@given(acceptance=st.floats(0.0, 0.98), step=st.floats(0.01, 1.5), extra=st.floats(0.0, 0.5), batch=st.integers(1, 4))
def test_whether_and_how_much_to_draft(acceptance, step, extra, batch):
    """Catches any other length than the one with the most tokens a second, and drafting that is slower than none."""
    known = experience(1.0, extra, step, acceptance, batch)
    share = known.gain_share(batch).value  # one row keeps all it gains, several have to wait for one another
    gains = [share * (expected_tokens(acceptance, k) - 1) for k in range(ROOM + 1)]
    worth = max(gains[k] - 1.04 * k * (step + extra) for k in range(1, ROOM + 1))  # the margin that it has to earn
    rates = [(1 + gains[k]) / (1 + k * (step + extra)) for k in range(1, ROOM + 1)]
    best = max(range(1, ROOM + 1), key=lambda k: rates[k - 1])
    assume(abs(worth) > 1e-9)
    assume(all(abs(rates[best - 1] - rate) > 1e-9 for k, rate in enumerate(rates, 1) if k != best))
    lengths = MeasuredLength(known, batch)
    assert lengths.plan(a_round(batch), {}) == (Plan(ROOM, NODES) if worth > 0 else NO_DRAFT)
    assert lengths.best_fixed(a_round(batch), ROOM) == best


def test_no_draft_that_does_not_pay():
    """Catches a draft as slow as the target, or one that guesses at random, that is still asked."""
    assert MeasuredLength(experience(step=1.0, acceptance=0.9), 1).plan(a_round(), {}) == NO_DRAFT
    assert MeasuredLength(experience(step=0.02, acceptance=0.01), 1).plan(a_round(), {}) == NO_DRAFT
    assert MeasuredLength(experience(step=0.02, acceptance=0.9), 1).plan(a_round(draft_room=0), {}) == NO_DRAFT


def test_a_plain_round_comes_first():
    """Catches a choice without any measurement at this batch size to compare with."""
    known = experience(batch=2)
    assert MeasuredLength(known, 1).plan(a_round(), {0: guess(0.9, 0.9)}) == Plan()


def test_an_unmeasured_draft_is_tried_with_care():
    """Catches a draft that is never tried, or at once in full, before its cost is known."""
    known = experience(acceptance=0.9)
    known.draft_costs = Experience().draft_costs
    assert MeasuredLength(known, 1).plan(a_round(), {}) == Plan(2, NODES)


@given(chances=st.lists(st.floats(0.0, 0.99), min_size=1, max_size=16), extra=st.floats(0.01, 0.6))
def test_the_lookup_against_brute_force(chances, extra):
    """Catches a guess that is cut where it still pays, or sent where it does not."""
    known = experience(1.0, extra, step=5.0)
    lengths, found, gains = MeasuredLength(known, 1), guess(*chances), [0.0]
    for one in found:
        gains.append(gains[-1] + one.reach - extra)
    assume(len({round(gain, 9) for gain in gains}) == len(gains))
    plan = lengths.plan(a_round(), {0: found})
    assert plan == NO_DRAFT
    assert plan.guessed == gains.index(max(gains))


def test_the_draft_rescues_guesses():
    """Catches a draft that is asked beside a guess that hardly ever fails, or not asked beside one that often does."""
    good, sure, unsure = experience(step=0.2, acceptance=0.85), guess(*[0.9] * 12), guess(0.2, *[0.8] * 11)
    assert not MeasuredLength(good, 1).plan(a_round(), {0: sure}).draft
    assert MeasuredLength(good, 1).plan(a_round(), {0: unsure}).draft
    several = [
        *[Guess(token, 0.24, is_first=True) for token in (20, 21, 22)],
        *unsure,
    ]  # none is sure, but one is right
    assert not MeasuredLength(good, 1).plan(a_round(), {0: several}).draft
    hopeless = [*unsure, *[Guess(20 + token, 0.03, is_first=True) for token in range(25)]]  # these are not submitted
    assert MeasuredLength(good, 1).plan(a_round(), {0: hopeless}).draft
    both = {0: sure}  # of four rows, only one has a guess
    assert MeasuredLength(experience(step=0.1, acceptance=0.85, batch=4), 4).plan(a_round(4), both).draft
    good.rescue.value = 0.1  # where the lookup has no guess, this draft has none either
    assert not MeasuredLength(good, 1).plan(a_round(), {0: guess(0.2)}).draft


def test_catching_up_counts():
    """Catches a draft that has to read a long text for the last few tokens of an answer."""
    known = experience(step=0.1, acceptance=0.8)
    known.draft_costs.note(1, 100, 64, 30.0)
    assert MeasuredLength(known, 1).plan(a_round(lag=1), {}).draft
    assert MeasuredLength(known, 1).plan(a_round(lag=60), {}) == NO_DRAFT


def test_what_a_request_shows_of_itself():
    """Catches a request whose own record is ignored."""
    lengths = MeasuredLength(experience(step=0.2, extra=0.1, acceptance=0.6), 1)
    assert lengths.plan(a_round(), {}).draft
    for _ in range(60):
        lengths.draft_factors[0].note(0.6, False)
    assert lengths.plan(a_round(), {}) == NO_DRAFT


@given(st.lists(st.floats(0.0, 1.0), max_size=8), st.integers(0, 9))
def test_best_cut_against_brute_force(chances, least):
    """Catches tokens held back that pay or were drawn, and tokens sent that do not pay."""
    lengths = MeasuredLength(experience(extra=0.2, acceptance=0.01), 1)
    lengths.plan(a_round(), {})
    reach = sorted(chances, reverse=True)
    worth = [sum(reach[:m]) - 0.2 * m for m in range(len(reach) + 1)]
    cut = lengths.best_cut(reach, least)
    if least >= len(reach):
        assert cut == least
    else:
        assert worth[cut] == pytest.approx(max(worth[least:]))
        assert cut >= least


@given(st.lists(st.floats(0.5, 3.0), min_size=NODES + 1, max_size=NODES + 1), st.integers(0, NODES))
def test_filling_up_against_brute_force(costs, nodes):
    """Catches a pass that costs more than one of a few tokens more, and nodes added where nothing is proposed."""
    known = Experience()
    for tokens, seconds in enumerate(costs):
        for _ in range(2):
            known.target_costs.note(1, 100, 1 + tokens, seconds)
    lengths = MeasuredLength(known, 1)
    lengths.plan(a_round(), {})
    filled = lengths.filled(nodes, NODES)
    assert costs[filled] == min(costs[nodes:]) if nodes else filled == 0


@pytest.mark.parametrize(
    ("dear_from", "tried", "then"), [(99, [2, 4, 6, 8, 12, 16], 4), (6, [2, 4, 6], 4), (2, [2], 1)]
)
def test_what_a_few_sizes_cost_is_found_out(dear_from, tried, then):
    """Catches a machine of which nobody learns that five tokens cost less than two, and one that is tried for ever."""
    known, found = Experience(), []
    cost = {0: 1.0, 1: 1.5, 2: 1.6, 4: 1.3, 6: 1.4, 8: 1.4, 12: 1.6, 16: 1.8}
    for size in (0, 0, 1, 1):
        known.target_costs.note(1, 100, 1 + size, cost[size])
    for _ in range(20):
        lengths = MeasuredLength(known, 1)
        lengths.plan(a_round(), {})
        found.append(lengths.filled(1, NODES))
        known.target_costs.note(1, 100, 1 + found[-1], cost[found[-1]] + 2.0 * (found[-1] >= dear_from))
    assert found == [size for size in tried for _ in range(2)] + [then] * (20 - 2 * len(tried))


def test_bins():
    """Catches probabilities on the wrong side of an edge, or outside all bins."""
    assert [confidence_bin(p) for p in (0.0, 0.049, 0.05, 0.5, 0.989, 0.99, 1.0)] == [0, 0, 1, 6, 11, 12, 12]
    assert len(CONFIDENCES) == confidence_bin(1.0)
    evidences = [Evidence(1, share) for share in (0.01, 0.06, 0.2, 0.3, 0.4, 0.6, 0.9, 0.99)]
    evidences += [Evidence(match, 1.0) for match in (1, 2, 3, 4, 5, 7, 16)]
    experience = Experience()
    for each, kinds, calibration in (
        (confidence_bin, [0.0, *CONFIDENCES], experience.confidence),
        (evidence_bin, evidences, experience.evidence),
    ):
        bins = [each(kind, seen) for seen in Stance for kind in kinds]
        assert bins == list(range(len(bins)))
        assert all(0.0 < calibration.rate(bin_) < 1.0 for bin_ in bins)
        with pytest.raises(IndexError):
            calibration.rate(len(bins))
    assert evidence_bin(Evidence(1, 0.5)) == evidence_bin(Evidence(9, 0.4))  # the match counts where all agree


def test_stances():
    """Catches a token that the other one does not propose, and counts as agreed on."""
    stances = [stance(token, choices) for token, choices in ((3, []), (3, [3, 4]), (4, [3, 4]), (5, [3, 4]))]
    assert stances == [Stance.SILENT, Stance.AGREES, Stance.ALLOWS, Stance.DIFFERS]


def test_buckets():
    """Catches numbers of tokens that are rounded to one that is smaller, or needlessly large."""
    assert [bucket(tokens) for tokens in (1, 8, 9, 16, 17)] == [1, 8, 16, 16, 32]


class Draft:
    """Drafts the right token with some chance, is as sure of it as it should be, and costs what it is told to."""

    samples, num_assistant_tokens = False, ROOM

    def __init__(self, chance, batch, truth):
        self.chance, self.truth, self.random = chance, truth, random.Random(1)
        self.device = torch.device("cpu")
        self.counts, self.cached, self.drafted, self.fed = [Counts() for _ in range(batch)], [0] * batch, 0, 0

    def room(self, ends):
        return ROOM

    def lag(self, ends):
        return max(end - done for end, done in zip(ends, self.cached, strict=True))

    def skip(self):
        self.drafted = 0
        return Proposal(torch.empty(len(self.cached), 0, dtype=torch.long))

    def propose(self, ids, ends, k, goes_on=None, others=0):
        assert not others, "nothing branches here"
        columns, self.fed, self.ends = [], self.lag(ends), list(ends)
        for step in range(k):
            sure = [min(max(self.random.gauss(self.chance, 0.1), 0.0), 1.0) for _ in ends]
            right = [self.random.random() < p for p in sure]
            columns.append([self.truth(end + step) if ok else -1 for end, ok in zip(ends, right, strict=True)])
            tokens, nobody = torch.tensor(columns[-1]), torch.empty(len(ends), 0, dtype=torch.long)
            if goes_on is not None and not goes_on(Step(tokens, None, nobody, torch.tensor(sure)[:, None])):
                break
        self.tokens = [list(row) for row in zip(*columns, strict=True)]
        self.drafted, self.others = len(columns), torch.empty(len(ends), len(columns), 0)
        return Proposal(torch.tensor(self.tokens))

    def note(self, logits, tokens, taken):
        right = [0] * len(taken)
        if self.drafted:
            right = [leading(ours, theirs) for ours, theirs in zip(self.tokens, tokens, strict=True)]
            self.cached = [end + count for end, count in zip(self.ends, right, strict=True)]
        return right


def leading(ours, theirs):
    pairs = list(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


class Clockless:
    """A stopwatch that nobody looks at."""

    def lap(self, stage):
        pass


def simulate(known, chance, new_tokens, batch=1, step=0.2, extra=0.05, read=0.005, prompt=20):
    """
    Serve one request where plain rounds take a second; its seconds beyond the prompt's, and its rounds.

    The text never repeats itself. The draft takes `step` for a token, and `read` more for each that it lags behind.
    """

    def truth(column):
        return column  # no pair of tokens comes twice

    draft = Draft(chance, batch, truth)
    sequences = Sequences(torch.arange(prompt).repeat(batch, 1), [0] * batch, prompt + new_tokens, 16, 0)
    speculator = MeasuredSpeculator(draft, known, sequences, lookup=False)
    seconds, rounds = 0.0, []
    while not sequences.finished:
        ends, first = list(sequences.ends), sequences.ends[0] == prompt
        proposed = speculator.propose(sequences, max(sequences.budget - 1, 0), Clockless()).tokens.tolist()
        k = len(proposed[0])
        drafting = step * draft.drafted + read * max(draft.fed - 1, 0) if draft.drafted else 0.0
        verifying = 1.0 + extra * k
        right = [leading(row, [truth(end + i) for i in range(k)]) for row, end in zip(proposed, ends, strict=True)]
        tokens = [[truth(end + i) for i in range(count + 1)] for end, count in zip(ends, right, strict=True)]
        taken = sequences.commit(tokens)
        speculator.note(None, tokens, taken)
        speculator.settle({"draft": drafting, "verify": verifying + read * prompt * first})
        seconds += drafting + verifying
        rounds.append((draft.drafted, max(taken)))
    speculator.finish(sequences.lengths)
    return seconds, rounds


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("chance", "step"), [(0.0, 0.05), (0.1, 0.3), (0.9, 2.0)])
@pytest.mark.parametrize("new_tokens", [2, 12, 200])
def test_a_bad_draft_costs_little(new_tokens, chance, step, batch):
    """Catches trials, also those at the beginning of a request, that lose more than their share of the time."""
    known, seconds = Experience(), 0.0
    requests = 4800 // new_tokens
    for _ in range(requests):
        seconds += simulate(known, chance, new_tokens, batch, step)[0]
    assert seconds <= 1.03 * requests * new_tokens


def test_a_good_draft_pays():
    """Catches caution that costs what speculation would have gained: the best fixed length is nearly reached."""
    known = Experience()
    simulate(known, 0.8, 300)
    seconds, _ = simulate(known, 0.8, 2000)
    best = max(expected_tokens(0.8, k) / (1 + 0.25 * k) for k in range(1, ROOM + 1))
    assert 2000 / seconds > 0.95 * best


@pytest.mark.parametrize("batch", [1, 4])
def test_what_a_batch_gains(batch):
    """Catches a batch that pays for tokens its other rows gain: it is done when its last row is."""
    known = Experience()
    simulate(known, 0.85, 600, batch)
    assert known.gain_share(batch).value == pytest.approx(1.0) if batch == 1 else known.gain_share(batch).value < 1.0


@pytest.mark.parametrize("batch", [1, 3])
def test_a_change_of_topic(batch):
    """Catches a draft that is kept when it has become useless, or never asked again when it is useful once more."""
    known = Experience()
    for before, after, recovers in ((0.85, 0.0, 40), (0.0, 0.85, 600)):
        simulate(known, before, 1500, batch)
        _, rounds = simulate(known, after, 2400, batch)
        drafting = [drafted > 0 for drafted, _ in rounds[recovers:]]
        share = sum(drafting) / len(drafting)
        assert share < 0.05 if after == 0.0 else share > 0.95, (before, after, share)
