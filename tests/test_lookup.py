"""What the lookup finds, against a slow search by the definition."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_osd.serving.lookup import Evidence, Lookup, RecentOutputs, TokenIndex

END = -1
texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def index_of(text):
    index = TokenIndex()
    index.extend(text)
    return index


def common_end(a, b):
    """Tokens at the ends of two texts that are the same, 16 at most, no separator among them."""
    length = 0
    while length < min(len(a), len(b), 16) and a[-1 - length] == b[-1 - length] != END:
        length += 1
    return length


def slow_find(text, suffix):
    """The latest 16 places of the last token and of the last pair that another token follows, with their matches."""
    matches = {end: common_end(text[: end + 1], suffix) for end in range(len(text))}
    ends = {*[end for end in matches if matches[end]][-16:], *[end for end in matches if matches[end] > 1][-16:]}
    return [(end + 1, matches[end]) for end in sorted(ends, reverse=True) if end + 1 < len(text)]


def slow_read(text, place, count):
    """Copy token by token behind the text's end, as a decoder that trusts the match would."""
    grown = list(text)
    for step in range(count):
        grown.append(grown[place + step])
    return grown[len(text) :]


def slow_branches(places, path):
    """The share and the longest match of each token that follows a path, behind places `(text, place, match)`."""
    step, weights, matches = len(path), {}, {}
    for text, place, match in places:
        *before, token = slow_read(text, place, step + 1)
        if before == list(path):
            weights[token] = weights.get(token, 0.0) + 4.0 ** min(match + step, 8)
            matches[token] = max(match + step, matches.get(token, 0))
    total = sum(weights.values())
    return {token: (matches[token], weight / total) for token, weight in weights.items() if token != END}


def seen(branch):
    """What a branch says comes next."""
    return {one.token: (one.evidence.match, pytest.approx(one.evidence.share)) for one in branch.branches}


def longest(branch, count):
    """The continuation with the largest share at each place."""
    found = []
    while len(found) < count and branch.branches:
        branch = branch.branches[0]
        found.append(branch.token)
    return found


@given(text=texts, suffix=texts)
def test_places(text, suffix):
    """Catches matches that are too short or too long, places that are lost, and the end of the text itself."""
    for end in (suffix, text):
        found = index_of(text).find(end)
        assert [(place.start, place.match) for place in found] == slow_find(text, end)


@given(pieces=st.lists(texts, min_size=1, max_size=5), outputs=st.lists(texts, max_size=3), data=st.data())
@example(pieces=[[0, 1] * 15], outputs=[], data=None)
@example(pieces=[[1] * 30], outputs=[[1]], data=None)
def test_what_follows(pieces, outputs, data):
    """
    Catches a text that is not kept up to date, a separator that is matched or proposed, shares that do not add up to
    one, and a continuation that goes on from places where it was not.
    """
    recent = RecentOutputs()
    for output in outputs:
        recent.add(output)
    lookup = Lookup([[9, 9, 8], pieces[0]], recent)
    for piece in pieces[1:]:
        lookup.extend(1, piece)
    own, other = [t for piece in pieces for t in piece], [t for output in outputs for t in [*output, END]]
    proposed = data.draw(st.lists(st.integers(0, 2), max_size=3)) if data else []
    end = [*own, *proposed]
    places = [(end, *found) for found in slow_find(own, end)] + [(other, *found) for found in slow_find(other, end)]
    branch, path = lookup.find(1, proposed), []
    for _ in range(20):
        expected = slow_branches(places, path)
        assert seen(branch) == expected
        shares = [one.evidence.share for one in branch.branches]
        assert shares == sorted(shares, reverse=True)
        if not expected:
            break
        branch = data.draw(st.sampled_from(branch.branches)) if data else branch.branches[0]
        path.append(branch.token)


def test_periodic_text_goes_on():
    """Catches a guess that ends with the text, although the text repeats itself."""
    lookup = Lookup([[1, 2, 3] * 4], RecentOutputs())
    assert longest(lookup.find(0), 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert lookup.find(0).branches[0].evidence == Evidence(9, 1.0)


def test_short_texts():
    """Catches a prompt of one token, or of none, that has no pair to look for."""
    lookup = Lookup([[], [5], [5, 5]], RecentOutputs())
    assert [longest(lookup.find(row), 3) for row in range(3)] == [[], [], [5, 5, 5]]
    assert lookup.find(1, [6, 5]).branches == []
    assert longest(lookup.find(2, [5]), 1) == [5]


def test_outputs_are_left_to_later_requests():
    """Catches prompts, padding or cut-off tokens that are left as outputs, and rows mixed up."""
    recent = RecentOutputs()
    lookup = Lookup([[1, 2], [3]], recent)
    lookup.extend(0, [4, 5, 6])
    lookup.extend(1, [7, 8])
    lookup.finish([2, 2])
    assert recent.index.tokens == [4, 5, END, 7, 8, END]
    assert longest(Lookup([[1, 4]], recent).find(0), 4) == [5]


@given(outputs=st.lists(texts, max_size=8), capacity=st.integers(0, 50))
def test_no_more_is_kept_than_was_asked_for(outputs, capacity):
    """Catches an output longer than the memory that is kept whole, and one of which nothing is kept."""
    recent, told = RecentOutputs(capacity), []
    for output in outputs:
        recent.add(output)
        told += [*output, END]
        kept = recent.index.tokens
        assert len(kept) <= capacity
        assert kept == told[len(told) - len(kept) :]
        assert len(kept) >= min(len(output) + 1, capacity)


@pytest.mark.parametrize("length", [3, 10, 40])
def test_recent_outputs_are_bounded(length):
    """Catches memory that grows with the traffic, and a trim that drops the newest or loses what it keeps."""
    recent = RecentOutputs(capacity=100)
    for number in range(200):
        output = [1000 * number + step for step in range(length)]
        reader = recent.index
        held = list(reader.tokens)
        recent.add(output)
        assert len(recent.index.tokens) <= 100
        assert reader.tokens[: len(held)] == held  # a request in flight goes on with what it has
        assert recent.index.tokens[-length - 1 :] == [*output, END]
        assert longest(Lookup([output[:2]], recent).find(0), 1) == output[2:3]
    assert len(recent.index.tokens) > 50


def test_a_reader_while_another_request_adds():
    """Catches a place that is announced before the token behind it is there: the reader would divide by zero."""
    index = TokenIndex()
    found = []

    class Watched(list):
        def append(self, token):
            look()
            super().append(token)
            look()

    def look():
        found.append([place.tokens[place.start] for place in index.find([7, 5])])

    index.tokens = Watched()
    index.extend([5, 6, 5, 6, 7, 5, 5, END, 7, 5, 8])
    assert found[-1][0] == 8
    assert [] in found
