"""Checkpoints and the archive that keeps them: what is copied, what is shared, and who leaves first."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.archive import Archive, Checkpoint


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


@pytest.mark.parametrize(
    "state",
    [
        {"weight": torch.zeros(3)},  # the same name, and another tensor
        {"lora_A": torch.ones(2)},
        {"weight": torch.ones(3), "more": torch.ones(1)},
    ],
)
def test_another_state_is_kept_beside_the_weights(state: dict[str, torch.Tensor]) -> None:
    """Catches an adapter that is lost because the merged weights have names of their own."""
    made = Checkpoint.of({"weight": torch.ones(3)}, state)
    for one in (made, made.on_cpu(), Checkpoint.from_groups(made.groups("live"), "live")):
        assert one.weights["weight"].tolist() == [1.0] * 3
        assert one.state.keys() == state.keys()
        assert all(torch.equal(one.state[name], state[name]) for name in state)


def test_a_view_of_another_shape_is_not_the_same() -> None:
    """Catches tensors that begin at one address and are taken for one: half a weight for a whole one."""
    storage = torch.arange(4.0)
    made = Checkpoint.of({"weight": storage}, {"weight": storage[:2]})
    assert made.weights["weight"].shape == (4,)
    assert made.state["weight"].shape == (2,)


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
