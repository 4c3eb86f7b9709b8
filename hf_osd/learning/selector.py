"""
The selector: which candidate should be live, by the scores of all on recent requests. It knows no tensors.

A leader-following form of Fixed Share (Herbster and Warmuth 1998) with a safe expert (Sani, Neu and Lazaric 2014).
Every candidate has a sum of its scores, and no sum falls far behind the best one. The candidate that leads clearly
enough goes live.
"""

from collections.abc import Mapping
from typing import Any

STATIC = "static"  # name of the draft before it learned anything, the safe expert

# All in acceptance, summed over requests of the usual length.
MEMORY = 0.5  # most that a sum falls behind the best one; a change of the traffic is noticed after about this loss
STATIC_MEMORY = 0.25  # the same for the static draft while others lead; learned weights that lose more give way to it
LEAD = 0.15  # lead over the leader that a candidate needs to replace it
ENTRY = 0.2  # lead over the static draft that the first learned weights need to replace it; later ones need twice that
HIGHEST_ENTRY = 3.2  # upper bound of the entry, which doubles after each stay of learned weights that lost


class Selector:
    """
    Follows the candidate that has done best lately.

    The static draft is a candidate for ever. Learned weights replace it once they lead by the entry, at first `ENTRY`,
    and give way once they have lost `STATIC_MEMORY` and `LEAD` against it. After that the entry is twice `ENTRY` if
    they had gained on the whole, else it doubles, so that losses against the static draft do not add up.

    Attributes:
        leader (`str`): Name of the candidate that should be live.
        sums (`dict[str, float]`): The sum of each candidate's scores relative to the best sum; at most 0.
        stay (`float`): What the leaders have gained on the static draft since it gave way last.
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
        """Give a candidate, new or changed, the sum of another one."""
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
