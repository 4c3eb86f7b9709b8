"""Adds to a row's tree what the lookup proposes."""

from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush

from .lookup import Branch
from .tree import ROOT, Candidates, depths

Judge = Callable[[int, Branch], tuple[int, float]]
"""Returns the bin of what speaks for a token behind a node, and the chance that the row takes it there."""


def grow(tree: Candidates, found: Mapping[int, Branch], judge: Judge, nodes: int, depth: int, least: float) -> None:
    """
    Add what followed some nodes earlier, and what followed that, by falling reach.

    Args:
        tree (`Candidates`): The tree; changed in place.
        found (`Mapping[int, Branch]`): By node, or [`~hf_osd.serving.tree.ROOT`], what the lookup found there.
        judge (`Judge`): See there.
        nodes (`int`): How many nodes to go on from, at most.
        depth (`int`): Tokens that may follow one another.
        least (`float`): Reach below which a token is left out.
    """
    found, levels = dict(found), {ROOT: 0, **dict(enumerate(depths(tree.parents), 0))}
    waiting = [(-tree.reach[node] if node != ROOT else -1.0, node) for node in found]
    heapify(waiting)
    while waiting and nodes:
        nodes -= 1
        reach, node = heappop(waiting)
        for branch in found[node].branches if levels[node] < depth else ():
            bin_, chance = judge(node, branch)
            if -reach * chance < least:
                continue
            child = tree.add(node, branch.token, -reach * chance)
            tree.bins[child], levels[child] = bin_, levels[node] + 1
            if child not in found:
                found[child] = branch
                heappush(waiting, (-tree.reach[child], child))
