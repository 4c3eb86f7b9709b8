"""
A proposal as a tree of tokens: its nodes, their order of worth, and the mask by which the target checks it.

SpecInfer (https://arxiv.org/abs/2305.09781) checks a tree in one pass of the target, by a mask that shows every node
its own ancestors; EAGLE-2 (https://arxiv.org/abs/2406.16858) chooses its nodes by the chance that all up to them are
right.
"""

from collections.abc import Iterable, Sequence

import torch

ROOT = -1  # the parent of nodes that follow the text itself


class Candidates:
    """
    The nodes that may be proposed behind one row. What several proposers agree on is one node.

    Attributes:
        tokens (`list[int]`): The token of each node.
        parents (`list[int]`): The earlier node that each node follows; [`ROOT`] for the end of the text.
        reach (`list[float]`): The probability that the row accepts a node and all its ancestors.
        looked_up (`set[int]`): The nodes that the lookup proposes.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.reach: list[float] = []
        self.looked_up: set[int] = set()
        self._places: dict[tuple[int, int], int] = {}

    def add(self, parent: int, token: int, reach: float) -> int:
        """Add a node, or raise the reach of the one that is there already; return its number."""
        reach = min(reach, self.reach[parent]) if parent != ROOT else reach
        place = self._places.setdefault((parent, token), len(self.tokens))
        if place == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.reach.append(reach)
        self.reach[place] = max(self.reach[place], reach)
        return place

    def add_chain(self, tokens: Iterable[int], reach: Iterable[float]) -> list[int]:
        """Add tokens that follow one another behind the text; return their numbers."""
        nodes: list[int] = []
        for token, chance in zip(tokens, reach, strict=False):
            nodes.append(self.add(nodes[-1] if nodes else ROOT, token, chance))
        return nodes

    def children(self, node: int) -> list[int]:
        """Return the nodes that follow one."""
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def ranked(self) -> list[int]:
        """Return all nodes by falling reach. Since parents come first, the first `n` are a tree for any `n`."""
        return sorted(range(len(self.tokens)), key=lambda node: (-self.reach[node], node))

    def best_chain(self, first: Sequence[int] = ()) -> list[int]:
        """Return nodes that follow one another, `first` and then those from which the row accepts most tokens."""
        worth, best = list(self.reach), dict[int, int]()
        for node in reversed(range(len(worth))):  # children come before their parents
            if node in best:
                worth[node] += worth[best[node]]
            rival = best.setdefault(self.parents[node], node)
            if worth[node] >= worth[rival]:
                best[self.parents[node]] = node
        found = list(first)
        while (last := found[-1] if found else ROOT) in best:
            found.append(best[last])
        return found

    def arranged(self, chosen: Iterable[int], first: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """
        Lay out some nodes as the target will read them.

        The likeliest path comes first, since its accepted part then lies in the right slots of the cache.

        Args:
            chosen (`Iterable[int]`): A tree.
            first (`Sequence[int]`): A chain of these that has to come first.

        Returns:
            `tuple[list[int], list[int]]`: Tokens and parents, in the new order.
        """
        children: dict[int, list[int]] = {}
        for node in sorted(chosen, key=lambda node: (-self.reach[node], node)):
            children.setdefault(self.parents[node], []).append(node)
        order = {node: place for place, node in enumerate(first)}
        waiting = [ROOT]
        while waiting:
            node = waiting.pop()
            if node != ROOT:
                order.setdefault(node, len(order))
            waiting += reversed(children.get(node, ()))
        parents = [order[self.parents[node]] if self.parents[node] != ROOT else ROOT for node in order]
        return [self.tokens[node] for node in order], parents


def chain(length: int) -> list[int]:
    """Return the parents of nodes that follow one another."""
    return list(range(-1, length - 1))


def depths(parents: Sequence[int]) -> list[int]:
    """Return how many tokens behind the text each node stands, from 1 on."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent == ROOT else found[parent] + 1)
    return found


def lineage(parents: Sequence[int]) -> list[list[int]]:
    """Return each node's ancestors and itself, from the text on."""
    found: list[list[int]] = []
    for node, parent in enumerate(parents):
        found.append([*(found[parent] if parent != ROOT else ()), node])
    return found


def visible(parents: Sequence[Sequence[int]], fed: int) -> torch.Tensor:
    """
    Return which of the tokens that are fed together see one another.

    Args:
        parents (`Sequence[Sequence[int]]`): The nodes of each row, equally many.
        fed (`int`): Tokens fed: text, which every token behind it sees, and at the end the nodes.

    Returns:
        `torch.BoolTensor` of shape `(batch, fed, fed)`: True where a token (dimension 1) sees another (dimension 2).
    """
    seen = torch.ones(fed, fed, dtype=torch.bool).tril().repeat(len(parents), 1, 1)
    text = fed - len(parents[0])
    for row, nodes in enumerate(parents):
        for node, ancestors in enumerate(lineage(nodes)):
            seen[row, text + node, text:] = False
            seen[row, text + node, [text + ancestor for ancestor in ancestors]] = True
    return seen
