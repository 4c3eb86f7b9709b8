"""Checkpoints, their archive and their scores: what is copied, shared and known, and who leaves first."""

import gc
import weakref
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.archive import Archive, Checkpoint, ScoreBook
from hf_osd.learning.judge import Score
from hf_osd.records import Observation


def checkpoint(number: int) -> Checkpoint:
    weights = {"weight": torch.full((2,), float(number))}
    return Checkpoint(weights, weights)


def numbers(archive: Archive) -> list[int]:
    return [int(one.weights["weight"][0]) for one in archive.all()]


@given(
    size=st.integers(0, 4), steps=st.lists(st.tuples(st.sampled_from(("add", "use")), st.integers(0, 5)), max_size=30)
)
def test_the_one_that_was_not_live_for_the_longest_time_leaves_first(size: int, steps: list[tuple[str, int]]) -> None:
    """Catches first in, first out, one too many, and an initial checkpoint that leaves."""
    archive, known, expected = Archive(checkpoint(0), size), [checkpoint(0)], []
    for number, (what, place) in enumerate(steps, start=1):
        if what == "add":
            known.append(checkpoint(number))
            archive.add(known[-1])
            expected = [*expected, number][-size:] if size else []
        else:
            one = archive.all()[place % len(archive.all())]
            archive.use(one)
            used = int(one.weights["weight"][0])
            expected = [other for other in expected if other != used] + [used] * (used in expected)
        assert numbers(archive) == [0, *expected]
        assert len(archive.others) <= size


def test_strangers_do_not_get_in_by_being_used() -> None:
    """Catches the weights before the last update, which may go live again but are not archived, in the archive."""
    archive = Archive(checkpoint(0), 2)
    archive.add(checkpoint(1))
    archive.use(checkpoint(1))  # equal, and not the same
    archive.use(archive.initial)
    assert numbers(archive) == [0, 1]


def test_a_checkpoint_is_a_copy() -> None:
    """Catches training that goes on in what is live, and in what is remembered."""
    weight, adapter = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    for state in ({"weight": weight}, {"adapter": adapter}):
        made = Checkpoint.of({"weight": weight}, state)
        with torch.no_grad():
            weight.fill_(7.0)
            adapter.fill_(7.0)
        for copied in (*made.weights.values(), *made.state.values()):
            assert copied.tolist() == [1.0] * 3
            assert not copied.requires_grad
        with torch.no_grad():
            weight.fill_(1.0)
            adapter.fill_(1.0)


def test_weights_that_are_the_state_are_kept_once() -> None:
    """Catches a draft that is held twice, for each entry of the archive."""
    weight = torch.ones(3)
    made = Checkpoint.of({"weight": weight.detach()}, {"weight": weight.detach()})
    assert made.state is made.weights
    moved = made.on_cpu()
    assert moved.state is moved.weights


def test_training_goes_on_from_what_is_published() -> None:
    """Catches a rollback to what training had led to, where only some of the way went live: two tensors of a name."""
    made = Checkpoint.of({"weight": torch.ones(3)}, {"weight": torch.zeros(3)})
    assert made.state is made.weights
    assert made.state["weight"].tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "state", [{"lora_A": torch.ones(2)}, {"weight": torch.zeros(3), "more": torch.ones(1)}], ids=["adapter", "more"]
)
def test_another_state_is_kept_beside_the_weights(state: dict[str, torch.Tensor]) -> None:
    """Catches an adapter that is lost because the merged weights have names of their own."""
    made = Checkpoint.of({"weight": torch.ones(3)}, state)
    for one in (made, made.on_cpu(), Checkpoint.from_groups(made.groups("live"), "live")):
        assert one.weights["weight"].tolist() == [1.0] * 3
        assert one.state.keys() == state.keys()
        assert all(torch.equal(one.state[name], state[name]) for name in state)


def test_a_checkpoint_is_itself_alone() -> None:
    """Catches a comparison of tensors, which is an error, and two checkpoints that are taken for one."""
    one, other = checkpoint(1), checkpoint(1)
    assert one in [other, one]
    assert one not in [other]
    assert len({one: 0, other: 0}) == 2


def test_groups_are_written_once_and_come_back() -> None:
    """Catches a file with everything twice, and a checkpoint that is two after a restart."""
    same = checkpoint(3)
    groups = same.groups("archive-0")
    assert groups.keys() == {"archive-0"}
    back = Checkpoint.from_groups(groups, "archive-0")
    assert back.state is back.weights
    assert torch.equal(back.weights["weight"], same.weights["weight"])
    other = Checkpoint({"weight": torch.ones(1)}, {"lora": torch.ones(2)})
    both = {**groups, **other.groups("archive-1")}
    assert Checkpoint.from_groups(both, "archive-1").state.keys() == {"lora"}
    assert Checkpoint.from_groups(both, "archive-0").state.keys() == {"weight"}
    with pytest.raises(KeyError, match="archive-2"):
        Checkpoint.from_groups(both, "archive-2")


def observation(number: int) -> Observation:
    """A request of its own, with a number in it."""
    ids = torch.full((1,), number)
    mass = torch.zeros(1)
    return Observation(ids, ids, ids[:, None], mass[:, None], mass, ids, ids.bool())


class Finder:
    """Finds scores that say whose they are, and counts how often it was asked for each."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[float, int]] = Counter()

    def __call__(self, one: Checkpoint, observations: Sequence[Observation]) -> list[Score]:
        assert observations, "a forward pass for nothing"
        found = [(float(one.weights["weight"][0]), int(each.prompt_ids[0])) for each in observations]
        self.asked.update(found)
        return [Score(weight, 0.0, number) for weight, number in found]


LOOKUPS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 7), unique=True)), max_size=12)


@given(lookups=LOOKUPS)
def test_each_score_is_found_once(lookups: list[tuple[int, list[int]]]) -> None:
    """Catches requests that are scored at every update, scores of other weights, and another order."""
    finder = Finder()
    book = ScoreBook(finder)
    checkpoints, observations = [checkpoint(n) for n in range(3)], [observation(n) for n in range(8)]
    for place, numbers_asked in lookups:
        found = book.of(checkpoints[place], [observations[number] for number in numbers_asked])
        assert found == [Score(float(place), 0.0, number) for number in numbers_asked]
    assert all(times == 1 for times in finder.asked.values())
    assert finder.asked.keys() == {(float(place), number) for place, asked in lookups for number in asked}


def test_scores_that_are_noted_are_not_found_again() -> None:
    """Catches new live weights that are scored twice, and scores that are noted for other requests."""
    finder = Finder()
    book, one = ScoreBook(finder), checkpoint(1)
    first, second = observation(1), observation(2)
    book.note(one, [first], [Score(0.5, 2.0, 9)])
    assert book.of(one, [second, first]) == [Score(1.0, 0.0, 2), Score(0.5, 2.0, 9)]
    assert finder.asked == {(1.0, 2): 1}
    with pytest.raises(ValueError, match="zip"):
        book.note(one, [first, second], [Score(0.5, 2.0, 9)])


def test_only_what_is_kept_stays_known() -> None:
    """Catches a book that grows for ever, and one that forgets what it was told to keep."""
    finder = Finder()
    book = ScoreBook(finder)
    one, other, stranger = checkpoint(1), checkpoint(2), checkpoint(3)
    observations = [observation(number) for number in range(3)]
    book.of(one, observations)
    book.of(other, observations)
    book.keep([one, stranger], observations[:2])
    book.of(one, observations)
    book.of(other, observations)
    assert [finder.asked[1.0, number] for number in range(3)] == [1, 1, 2]
    assert [finder.asked[2.0, number] for number in range(3)] == [2, 2, 2]


def test_what_is_forgotten_takes_no_memory() -> None:
    """Catches checkpoints, drafts each, and requests that stay in memory for their scores."""
    book = ScoreBook(Finder())
    one, each = checkpoint(1), observation(1)
    tensors = [weakref.ref(one.weights["weight"]), weakref.ref(each.prompt_ids)]
    book.of(one, [each])
    book.keep([], [])
    del one, each
    gc.collect()
    assert [tensor() for tensor in tensors] == [None, None]


def test_a_new_request_is_not_taken_for_one_that_is_gone() -> None:
    """Catches a memory by address alone: Python gives the address of an object that is gone to the next one."""
    book, one = ScoreBook(Finder()), checkpoint(1)
    for number in range(50):
        assert book.of(one, [observation(number)]) == [Score(1.0, 0.0, number)]
    for number in range(50, 100):
        assert book.of(one, [observation(number)]) == [Score(1.0, 0.0, number)]
        book.keep([one], [])
        assert book.of(checkpoint(number), [observation(number)]) == [Score(float(number), 0.0, number)]
