"""What the lookup adds to a tree, against the definition: every path with the product of its chances."""

from hypothesis import given
from hypothesis import strategies as st

from hf_osd.serving.growing import Limits, grow
from hf_osd.serving.lookup import Lookup, RecentOutputs
from hf_osd.serving.tree import ROOT, Candidates, depths

EOS = 3
texts = st.lists(st.integers(0, EOS), min_size=2, max_size=30)


def by_share(node, branch):
    """Believe the lookup."""
    return branch.evidence.share


def all_paths(branch, before=(), reach=1.0, depth=4, least=0.0):
    """Every text that may follow, with its reach; nothing follows the end of a text."""
    found = {}
    for one in branch.branches if depth and before[-1:] != (EOS,) else ():
        path, chance = (*before, one.token), reach * one.evidence.share
        if chance >= least:
            found |= {path: chance} | all_paths(one, path, chance, depth - 1, least)
    return found


def paths_of(tree):
    """The text that each node stands for, with its reach."""
    found = {ROOT: ()}
    for node, parent in enumerate(tree.parents):
        found[node] = (*found[parent], tree.tokens[node])
    return {found[node]: reach for node, reach in enumerate(tree.reach)}


@given(text=texts, nodes=st.integers(0, 40), depth=st.integers(0, 4), least=st.floats(0.0, 0.5))
def test_the_likeliest_paths(text, nodes, depth, least):
    """Catches a path that is lost, too deep, too unlikely, behind an end of text, or of another reach."""
    branch, tree = Lookup([text], RecentOutputs()).find(0), Candidates()
    grow(tree, {ROOT: branch}, by_share, Limits(nodes, depth, {EOS}, least))
    found, possible = paths_of(tree), all_paths(branch, depth=depth, least=least)
    assert found.items() <= possible.items()
    assert tree.looked_up == set(range(len(tree.tokens)))
    assert all(level <= depth for level in depths(tree.parents))
    likeliest = sorted(possible.values(), reverse=True)
    assert sorted(found.values(), reverse=True)[:nodes] == likeliest[: min(nodes, len(found))]
    if nodes >= len(possible) + 1:
        assert found == possible


def test_behind_a_drafted_chain():
    """Catches a drafted token that is not gone on from, one that loses its reach, and a lookup that starts over."""
    lookup, tree = Lookup([[5, 6, 7, 8, 9, 5]], RecentOutputs()), Candidates()
    first, second = tree.add_chain([7, 8], [0.9, 0.8])
    places = {ROOT: lookup.find(0), first: lookup.find(0, [7]), second: lookup.find(0, [7, 8])}
    grow(tree, places, lambda node, branch: 0.5, Limits(16, 4, (), 0.1))
    assert paths_of(tree) == {
        (7,): 0.9,
        (7, 8): 0.8,
        (7, 8, 9): 0.4,
        (7, 8, 9, 5): 0.2,
        (6,): 0.5,
        (6, 7): 0.25,
        (6, 7, 8): 0.125,
    }
    assert first not in tree.looked_up
    assert second in tree.looked_up  # both say so


def test_a_node_that_both_propose_is_gone_on_from_with_the_better_reach():
    """Catches children whose chance is that of a drafted token before the lookup has confirmed it."""
    lookup, tree = Lookup([[5, 6, 7, 5]], RecentOutputs()), Candidates()
    (first,) = tree.add_chain([6], [0.2])
    grow(tree, {ROOT: lookup.find(0), first: lookup.find(0, [6])}, lambda *_: 0.9, Limits(16, 2, (), 0.1))
    assert tree.reach == [0.9, 0.9 * 0.9]
