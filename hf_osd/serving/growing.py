"""Adds to a row's tree what the lookup proposes."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from .lookup import Branch
from .tree import ROOT, Candidates, depths

Chance = Callable[[int, Branch], float]
"""How likely the row is to take a token behind a node, once it has taken the node."""


@dataclass(frozen=True, slots=True)
class Limits:
    """
    How far a tree grows.

    Attributes:
        nodes (`int`): Nodes to go on from, at most.
        depth (`int`): Tokens that may follow one another.
        ends (`Collection[int]`): Tokens that nothing follows.
        reach (`float`): Tokens that are less likely to be accepted are left out.
    """

    nodes: int
    depth: int
    ends: Collection[int]
    reach: float


def grow(tree: Candidates, found: Mapping[int, Branch], chance: Chance, limits: Limits) -> None:
    """
    Add what followed some nodes earlier, and what followed that, by falling reach.

    Args:
        tree (`Candidates`): The tree; changed in place.
        found (`Mapping[int, Branch]`): By node, or [`~hf_osd.serving.tree.ROOT`], what the lookup found there.
        chance (`Chance`): See there.
        limits (`Limits`): How far to go.
    """
    found, levels = dict(found), {ROOT: 0, **dict(enumerate(depths(tree.parents)))}
    waiting = [(-tree.reach[node] if node != ROOT else -1.0, node) for node in found]
    heapify(waiting)
    for _ in range(limits.nodes):
        if not waiting or -waiting[0][0] < limits.reach:
            return
        _, node = heappop(waiting)
        if levels[node] == limits.depth or (node != ROOT and tree.tokens[node] in limits.ends):
            continue
        reach = tree.reach[node] if node != ROOT else 1.0  # the lookup may have raised it since
        for branch in found[node].branches:
            new = reach * chance(node, branch)
            if new < limits.reach:
                continue
            child = tree.add(node, branch.token, new)
            tree.looked_up.add(child)
            levels[child] = levels[node] + 1
            if child not in found:
                found[child] = branch
                heappush(waiting, (-tree.reach[child], child))
