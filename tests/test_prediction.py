"""Tokens per second from acceptance and cost, against references written from the definition."""

from itertools import product

import pytest

from hf_osd.drafts import frontier
from hf_osd.drafts.frontier import Candidate, write_frontier
from hf_osd.drafts.prediction import expected_tokens, predict
from hf_osd.drafts.profiles import Cost, Profile
from hf_osd.errors import InputError, MissingDependencyError

STEP = 0.05  # seconds of a draft step, where a pass of one token takes a second


def profile_of(**seconds):
    """A profile by tokens (`n4=1.5`), the same at every batch and context."""
    shapes = [(b, c, int(n[1:]), value) for b in (1, 4) for c in (128, 512) for n, value in seconds.items()]
    return Profile({}, tuple(Cost(b, c, n, value, value, value) for b, c, n, value in shapes))


FLAT = profile_of(n1=1.0, n16=1.0)
DEAR_PAIR = profile_of(n1=1.0, n2=1.64, n3=1.95, n4=1.37, n5=1.25, n6=1.41, n8=1.36, n12=1.61, n16=1.80)


def tokens_by_hand(acceptance, length):
    """Go through every pattern of accepted and refused tokens; what follows a refusal is lost."""
    total = 0.0
    for pattern in product((True, False), repeat=length):
        probability = 1.0
        for share, accepted in zip(acceptance, pattern, strict=False):
            probability *= share if accepted else 1 - share
        gained = pattern.index(False) if False in pattern else length
        total += probability * (gained + 1)
    return total


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.77, 1.0])
def test_tokens_of_a_round_are_those_of_every_pattern(acceptance):
    """Would catch an exponent that is one off, or 0/0 at an acceptance of 1."""
    found = expected_tokens(acceptance, 6)
    assert found == pytest.approx([tokens_by_hand([acceptance] * 6, k) for k in range(7)])
    if acceptance < 1:  # the closed form of Leviathan et al.
        assert found == pytest.approx([(1 - acceptance ** (k + 1)) / (1 - acceptance) for k in range(7)])


def test_acceptance_may_differ_by_position():
    """Would catch a sequence that ends, or that is read from the wrong end."""
    shares = [0.9, 0.5, 0.2]
    assert expected_tokens(shares, 5) == pytest.approx([tokens_by_hand([*shares, 0.2, 0.2], k) for k in range(6)])


@pytest.mark.parametrize("target", [FLAT, DEAR_PAIR], ids=["flat", "dear pair"])
@pytest.mark.parametrize("acceptance", [0.1, 0.4, 0.8, 0.99])
def test_the_best_length_is_the_best_of_all(target, acceptance):
    """Would catch a search that stops at the first length that does not pay, or a pass of k tokens, not of k + 1."""
    rates = {0: 1 / target.seconds(1, 256, 1)}
    for k in range(1, 16):
        tokens = sum(acceptance**i for i in range(k + 1))
        rates[k] = tokens / (k * STEP + target.seconds(1, 256, k + 1))
    found = predict(target, STEP, acceptance)
    assert found.length == max(rates, key=rates.get)
    assert found.tokens_per_second == pytest.approx(rates[found.length])
    assert found.speedup == pytest.approx(rates[found.length] / rates[0])


def test_a_draft_that_cannot_pay_is_left_alone():
    """Would catch a prediction below plain decoding, which nobody is forced below."""
    found = predict(DEAR_PAIR, 2.0, 0.6)
    assert (found.length, found.tokens_per_round, found.speedup) == (0, 1.0, 1.0)


def test_a_dear_length_is_passed_over():
    """Would catch a search that ends where two tokens cost more than five, as in float32 on a CPU."""
    assert predict(DEAR_PAIR, STEP, 0.7).length == 4


def test_rows_and_contexts_are_those_asked_for():
    """Would catch costs of another batch size, or tokens per second of one row for a batch."""
    shapes = [(b, c, n) for b in (1, 4) for c in (128, 512) for n in (1, 16)]
    target = Profile({}, tuple(Cost(b, c, n, b * c * 1e-3, 0.0, 0.0) for b, c, n in shapes))
    found = predict(target, 1e-9, 1.0, batch=4, context=512)
    assert found.length == 15
    assert found.tokens_per_second == pytest.approx(4 * 16 / (4 * 512e-3))
    assert found.speedup == pytest.approx(16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FLAT, 0.0, 0.5), "draft_step_seconds must be positive, got 0.0"),
        ((FLAT, float("nan"), 0.5), "draft_step_seconds must be positive, got nan"),
        ((FLAT, STEP, 1.5), r"acceptance must be in \[0, 1\], got 1.5"),
        ((FLAT, STEP, float("nan")), r"acceptance must be in \[0, 1\], got nan"),
        ((FLAT, STEP, []), r"acceptance must be in \[0, 1\], got \[\]"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    """Would catch a promise made of a negative time or of a probability above 1."""
    with pytest.raises(InputError, match=message):
        predict(*arguments)


def test_the_frontier_is_drawn(tmp_path):
    """Would catch a picture that fails for one candidate, for dear ones, or for a name that looks like mathematics."""
    pytest.importorskip("matplotlib")
    for name, candidates in {
        "one": [Candidate("one", 0.05, 0.5)],
        "many": [
            Candidate("a $x", 0.01, 0.3),
            Candidate("as slow as its target", 1.0, 0.9),
            Candidate("no", 3.0, 0.0),
        ],
    }.items():
        path = write_frontier(DEAR_PAIR, candidates, tmp_path / f"{name}.png", batch=4, context=300)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_frontier_says_what_it_needs(tmp_path, monkeypatch):
    """Would catch an import error without a way out, or an empty picture."""
    with pytest.raises(InputError, match="at least one candidate"):
        write_frontier(FLAT, [], tmp_path / "none.png")
    monkeypatch.setattr(frontier, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"hf-osd\[plot\]"):
        write_frontier(FLAT, [Candidate("one", 0.05, 0.5)], tmp_path / "one.png")
