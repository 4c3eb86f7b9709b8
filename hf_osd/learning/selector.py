"""
Which candidate should be live, by how all of them did on recent requests. Numbers only: no weights, no tensors.

A leader-following form of Fixed Share (Herbster and Warmuth 1998) with a safe expert (Sani, Neu and Lazaric 2014).
Every candidate has a sum of its scores, no sum falls far behind the best one, and who leads clearly enough goes live.
"""

from collections.abc import Mapping
from typing import Any

STATIC = "static"  # name of the draft before it learned anything, the safe expert

# All in acceptance, summed over requests of the usual length.
MEMORY = 0.5  # what a candidate can be behind the best one; a change of the traffic shows after about as much loss
STATIC_MEMORY = 0.25  # what the static draft can be behind; learned weights that lose as much give way to it
LEAD = 0.15  # by how much a candidate has to lead the leader to replace it
ENTRY = 0.2  # by how much it has to lead the static draft the first time; twice as much after that gave way once
HIGHEST_ENTRY = 3.2  # bound on the entry, which doubles after each stay of learned weights that lost


class Selector:
    """
    Follows the candidate that has done best lately.

    The static draft is a candidate for ever. Learned weights replace it once they lead by `ENTRY`, and give way after
    they have lost `STATIC_MEMORY` and `LEAD` against it. A stay that lost on the whole doubles the entry, and one that
    gained sets it to twice the first one, so that losses against the static draft do not add up.

    Attributes:
        leader (`str`): Name of the candidate that should be live.
        sums (`dict[str, float]`): Of each candidate: its score, summed, relative to the best one; at most 0.
        stay (`float`): What the leaders have gained on the static draft since that gave way the last time.
    """

    def __init__(self) -> None:
        self.leader = STATIC
        self.sums: dict[str, float] = {STATIC: 0.0}
        self._entry = ENTRY
        self.stay = 0.0

    def add(self, scores: Mapping[str, float]) -> str:
        """
        Count one request.

        Args:
            scores (`Mapping[str, float]`): Of every candidate: acceptance on the request, in [0, 1], times its length
                in requests of the usual length.

        Returns:
            `str`: The leader from now on.
        """
        self.stay += scores[self.leader] - scores[STATIC]
        sums = {name: total + scores[name] for name, total in self.sums.items()}
        best = max(sums.values())
        self.sums = {name: max(total - best, -self._memory(name)) for name, total in sums.items()}
        challenger = max(self.sums, key=lambda name: self.sums[name])
        if self.sums[challenger] - self.sums[self.leader] > self._needed():
            self.follow(challenger)
        return self.leader

    def _memory(self, name: str) -> float:
        if name != STATIC:
            return MEMORY
        return 2.0 * self._entry if self.leader == STATIC else STATIC_MEMORY

    def _needed(self) -> float:
        return self._entry if self.leader == STATIC else LEAD

    def follow(self, name: str) -> None:
        """Make a candidate the leader."""
        if name == STATIC and self.leader != STATIC:
            self._entry = min(2.0 * (ENTRY if self.stay >= 0.0 else self._entry), HIGHEST_ENTRY)
        if self.leader == STATIC:
            self.stay = 0.0
        self.leader = name

    def enter(self, name: str, like: str) -> None:
        """Let a candidate begin where another one stands; what it had before is forgotten."""
        self.sums[name] = self.sums[like]

    def leave(self, name: str) -> None:
        """Forget a candidate that is not the leader."""
        del self.sums[name]

    def state_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {"leader": self.leader, "sums": self.sums, "entry": self._entry, "stay": self.stay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.leader, self.sums = str(state["leader"]), dict(state["sums"])
        self._entry, self.stay = float(state["entry"]), float(state["stay"])
