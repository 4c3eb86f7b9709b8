"""Guesses against a slow search by the definition."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_osd.serving.lookup import Guess, Lookup, RecentOutputs, TokenIndex

END = -1
texts = st.lists(st.integers(0, 2), min_size=2, max_size=40)


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
    """All places of the last token that another follows: the latest five of its pair, else the latest of its own."""
    pairs = [place for place in range(1, len(text)) if text[place - 1 : place + 1] == list(suffix[-2:])]
    alone = [place for place in range(len(text) - 1) if text[place] == suffix[-1] and text[place + 1] != END]
    found = [(common_end(text[: place + 1], suffix), place + 1) for place in pairs[-5:] if place + 1 < len(text)]
    return max([*found, *((1, place + 1) for place in alone[-1:])], default=(0, 0))


def slow_read(text, place, count):
    """Copy token by token behind the text's end, as a decoder that trusts the match would."""
    grown = list(text)
    for step in range(count):
        grown.append(grown[place + step])
    found = grown[len(text) :]
    return found[: found.index(END)] if END in found else found


@given(text=texts, count=st.integers(1, 20))
@example(text=[0, 1] * 15, count=20)
@example(text=[1] * 30, count=3)
def test_own_text(text, count):
    """Catches matches that are too short, too long, not the latest, or that match the end of the text with itself."""
    index = index_of(text)
    assert index.find(text) == slow_find(text, text)
    match, place = index.find(text)
    if match:
        assert index.read(place, count) == slow_read(text, place, count)
        assert text[place - match : place] == text[len(text) - match :]


@given(outputs=st.lists(texts, min_size=1, max_size=4), text=texts, count=st.integers(1, 20))
def test_other_texts(outputs, text, count):
    """Catches a match across two outputs, and a separator that is matched or proposed."""
    other = [token for output in outputs for token in [*output, END]]
    index = index_of(other)
    assert index.find(text) == slow_find(other, text)
    match, place = index.find(text)
    if match:
        assert END not in other[place - match : place]
        assert index.read(place, count) == slow_read(other, place, count)


@given(pieces=st.lists(texts, min_size=1, max_size=5), outputs=st.lists(texts, max_size=3), count=st.integers(0, 9))
def test_guess(pieces, outputs, count):
    """Catches a text that is not kept up to date, others' text preferred to the row's own, and guesses too long."""
    recent = RecentOutputs()
    for output in outputs:
        recent.add(output)
    lookup = Lookup([[9, 9, 8], pieces[0]], recent)
    for piece in pieces[1:]:
        lookup.extend(1, piece)
    own, other = [t for piece in pieces for t in piece], [t for output in outputs for t in [*output, END]]
    mine, theirs = slow_find(own, own), slow_find(other, own)
    text, (match, place) = (other, theirs) if theirs[0] > mine[0] else (own, mine)
    tokens = slow_read(text, place, count) if match else []
    assert lookup.guess(1, count) == (Guess(tokens, match) if tokens else None)


def test_periodic_text_goes_on():
    """Catches a guess that ends with the text, although the text repeats itself."""
    lookup = Lookup([[1, 2, 3] * 4], RecentOutputs())
    assert lookup.guess(0, 8) == Guess([1, 2, 3, 1, 2, 3, 1, 2], 9)


def test_short_texts():
    """Catches a prompt of one token, or of none, that has no pair to look for."""
    lookup = Lookup([[], [5], [5, 5]], RecentOutputs())
    assert lookup.guess(0, 4) is lookup.guess(1, 4) is None
    assert lookup.guess(2, 3) == Guess([5, 5, 5], 1)


def test_outputs_are_left_to_later_requests():
    """Catches prompts, padding or cut-off tokens that are left as outputs, and rows mixed up."""
    recent = RecentOutputs()
    lookup = Lookup([[1, 2], [3]], recent)
    lookup.extend(0, [4, 5, 6])
    lookup.extend(1, [7, 8])
    lookup.finish([2, 2])
    assert recent.index.tokens == [4, 5, END, 7, 8, END]
    assert Lookup([[1, 4]], recent).guess(0, 4) == Guess([5], 1)


@pytest.mark.parametrize("length", [3, 10, 40])
def test_recent_outputs_are_bounded(length):
    """Catches memory that grows with the traffic, and a trim that drops the newest or loses what it keeps."""
    recent = RecentOutputs(capacity=100)
    for number in range(200):
        output = [1000 * number + step for step in range(length)]
        reader = recent.index
        held = list(reader.tokens)
        recent.add(output)
        assert len(recent.index.tokens) <= 101
        assert reader.tokens[: len(held)] == held  # a request in flight goes on with what it has
        assert recent.index.tokens[-length - 1 :] == [*output, END]
        assert Lookup([output[:2]], recent).guess(0, 1) == Guess(output[2:3], 2)
    assert len(recent.index.tokens) > 50


def test_a_reader_while_another_request_adds():
    """Catches a place that is announced before the token behind it is there: the reader would divide by zero."""
    index = TokenIndex()
    seen = []

    class Watched(list):
        def append(self, token):
            look()
            super().append(token)
            look()

    def look():
        match, place = index.find([7, 5])
        seen.append(index.read(place, 3) if match else None)

    index.tokens = Watched()
    index.extend([5, 6, 5, 6, 7, 5, 5, END, 7, 5, 8])
    assert seen[-1] == [8, 8, 8]
    assert None in seen
