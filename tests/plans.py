"""Rounds planned at random, for tests that whatever is proposed the output is the target's."""

import random

from fakes import prompts

from hf_osd.serving.draft_length import MeasuredLength, Plan
from hf_osd.serving.measured import MeasuredSpeculator
from hf_osd.serving.row_proposal import RowProposal
from hf_osd.serving.tree import ROOT

KINDS = ("draft", "trial", "lookup", "nothing")


class RandomPlans:
    """
    Stands in for every choice of `MeasuredLength`, and counts how often each kind of round was planned.

    Where it shuffles, nodes are worth anything, so that trees of every shape come up, behind the prompt already.
    """

    def __init__(self, seed, kinds=KINDS, shuffles=True):
        self.random, self.kinds, self.shuffles = random.Random(seed), kinds, shuffles
        self.planned = dict.fromkeys(KINDS, 0)
        self.shapes = set()  # parents of each row's nodes

    def install(self, monkeypatch):
        """Take over until the test is done."""
        monkeypatch.setattr(MeasuredLength, "plan", lambda *given: self.plan(*given))
        monkeypatch.setattr(MeasuredLength, "goes_on", lambda *_: self.random.random() < 0.8)
        monkeypatch.setattr(MeasuredLength, "best_cut", lambda _, reach, least=0: self.between(least, len(reach)))
        monkeypatch.setattr(MeasuredLength, "filled", lambda _, nodes, most: nodes and self.between(nodes, most))
        monkeypatch.setattr(MeasuredLength, "best_fixed", lambda _, now, longest: self.random.randint(1, longest))
        monkeypatch.setattr(RowProposal, "_chance", lambda *_: self.random.choice([0.0, 1.0]))
        monkeypatch.setattr(MeasuredSpeculator, "_may_branch", property(lambda speculator: speculator._branches))
        merge, chosen = RowProposal.merge, MeasuredSpeculator._chosen
        monkeypatch.setattr(RowProposal, "merge", lambda proposal: self.shuffled(merge(proposal)))
        monkeypatch.setattr(MeasuredSpeculator, "_chosen", lambda *a: self.noted(chosen(*a)))
        return self

    def between(self, least, most):
        """A number, both ends included; the least where that is more than the most."""
        return self.random.randint(least, max(least, most))

    def plan(self, lengths, now, guesses):
        """Any plan that the rooms allow."""
        lengths.rate, kind = 1.0, self.random.choice(self.kinds)
        possible = {"lookup": len(guesses), "nothing": 1, "draft": now.draft_room, "trial": now.draft_room}
        kind = kind if possible[kind] and now.nodes else "nothing"
        self.planned[kind] += 1
        if kind == "nothing":
            return Plan()
        k = 0 if kind == "lookup" else self.random.randint(1, min(now.draft_room, now.nodes))
        return Plan(k, self.random.randint(max(k, 1), now.nodes), kind == "trial")

    def shuffled(self, found):
        """Any worth for each node, no more than its parent's."""
        for node, parent in enumerate(found.parents if self.shuffles else ()):
            found.reach[node] = self.random.choice([0.5, 0.9, 1.0]) * (found.reach[parent] if parent != ROOT else 1.0)
        return found

    def noted(self, proposal):
        """Remember which trees there were."""
        self.shapes.update(tuple(nodes) for nodes in proposal.parents or ())
        return proposal


def repeating(batch, length=9, seed=0):
    """Left-padded prompts whose rows repeat themselves, so that there is something to look up from the start."""
    inputs = prompts(batch, length, seed)
    for row in range(batch):
        start = int((inputs["attention_mask"][row] == 0).sum())
        width = length - start
        inputs["input_ids"][row, start:] = inputs["input_ids"][row, start : start + 3].repeat(length)[:width]
    return inputs


def blind(monkeypatch):
    """Make speculators believe that they are on an accelerator."""
    monkeypatch.setattr(MeasuredSpeculator, "_looks", property(lambda _: False, lambda *_: None), raising=False)
