"""What one row's proposal is made of, and how it is judged."""

import pytest
from test_draft_length import experience

from hf_osd.serving.draft_length import MeasuredLength
from hf_osd.serving.experience import Stance, confidence_bin, evidence_bin
from hf_osd.serving.growing import Limits
from hf_osd.serving.lookup import Evidence, Lookup, RecentOutputs
from hf_osd.serving.row_proposal import RowProposal
from hf_osd.serving.steps import Counts
from hf_osd.serving.tree import ROOT

TEXT = [1, 2, 3, 4, 5, 1, 2]  # "1 2" was followed by "3 4 5"


def a_proposal(lengths, text=TEXT, is_active=True, ends=()):
    lookup = Lookup([text], RecentOutputs())
    return RowProposal(0, lengths, lookup, Limits(16, 8, ends, 0.01), is_active)


def reach_of(proposal, *path):
    """The reach of what follows the text."""
    node = ROOT
    for token in path:
        (node,) = [child for child in proposal.tree.children(node) if proposal.tree.tokens[child] == token]
    return proposal.tree.reach[node]


@pytest.fixture
def lengths():
    return MeasuredLength(experience(), 1)


def test_the_lookup_alone(lengths):
    """Catches a chance that is not that of the evidence."""
    rate = lengths.experience.evidence.rate
    one = a_proposal(lengths)
    assert reach_of(one, 3) == pytest.approx(rate(evidence_bin(Evidence(2, 1.0))))
    assert reach_of(one, 3, 4) == pytest.approx(reach_of(one, 3) * rate(evidence_bin(Evidence(3, 1.0))))


def test_both_together(lengths):
    """Catches a stance of the wrong place, and a drafted token that is believed whatever the lookup says."""
    known = lengths.experience
    for seen, rate in ((Stance.AGREES, 0.8), (Stance.DIFFERS, 0.2)):
        known.confidence._accepted[confidence_bin(0.5, seen)] = 3 * rate
        known.evidence._accepted[evidence_bin(Evidence(2, 1.0), seen)] = 3 * 0.7 * rate
        known.evidence._accepted[evidence_bin(Evidence(3, 1.0), seen)] = 3 * 0.7 * rate
    one = a_proposal(lengths)
    one.draft([3, 9], [0.5, 0.1], is_last=False)  # the lookup says 3
    one.draft([9, 8], [0.5, 0.1], is_last=False)  # and then 4
    tree = one.merge()
    assert tree.tokens[:2] == [3, 9]
    assert one.reach == pytest.approx([0.8, 0.8 * 0.2])
    assert reach_of(one, 3) == pytest.approx(0.8)
    assert reach_of(one, 3, 4) == pytest.approx(0.8 * 0.7 * 0.2)
    assert tree.looked_up >= {0}
    assert 1 not in tree.looked_up


def test_unseen_tokens_have_no_stance(lengths):
    """Catches stand-ins of tokens on the device that are compared with the lookup's."""
    alone = reach_of(a_proposal(lengths), 3)
    one = a_proposal(lengths)
    one.expect([-2, -3], 0.5)
    assert one.merge().tokens[:2] == [-2, -3]
    assert reach_of(one, 3) == alone


@pytest.mark.parametrize("is_active", [False, True])
def test_nothing_follows_an_end(lengths, is_active):
    """Catches tokens behind a drafted or looked-up end of text, and proposals for a row that is done."""
    one = a_proposal(lengths, is_active=is_active, ends={3})
    assert [one.tree.tokens, one.going] == ([[3], 1.0] if is_active else [[], 0.0])
    one.draft([3], [0.5], is_last=True)
    assert one.going == 0.0
    assert set(one.merge().tokens) == {3}


@pytest.mark.parametrize("drafted", [[], [3], [3, 4], [9]])
def test_what_is_judged(lengths, drafted):
    """Catches tokens that are judged only if they were submitted, or in the bin of another place."""
    known, counts = lengths.experience, Counts()
    one = a_proposal(lengths)
    for token in drafted:
        one.draft([token], [0.5], is_last=False)
    one.merge()
    one.submit([])
    seen = []
    known.evidence.note = lambda bin_, accepted: seen.append((bin_, accepted))
    one.note_guessed([3, 4, 7], counts)
    stances = [Stance.AGREES if place < len(drafted) else Stance.SILENT for place in range(3)]
    stances[0] = Stance.DIFFERS if drafted == [9] else stances[0]
    expected = [evidence_bin(Evidence(match, 1.0), seen) for match, seen in zip((2, 3, 4), stances, strict=True)]
    assert seen == list(zip(expected, [True, True, False], strict=True))
    assert (counts.guessed, counts.guessed_right) == (0, 0)
    one.submit(range(len(one.tree.tokens)))
    one.note_guessed([3, 4, 7], counts)
    assert (counts.guessed, counts.guessed_right) == (3, 2)
