"""The learning rate, found while learning: by what the gate says of the weights it leads to."""

from .journal import Decision

# What harm does to the rate, and a gain from going all the way; going a third of it does the opposite.
_HARM, _GAIN = 0.3, 1.1
# Where the gate cannot tell, it goes back towards where it began: what once did harm may be what is needed later.
_RECOVERY = 1.1
# Bounds, as multiples of the rate it starts from: from 1e-5 to 4e-3 for the default.
_LOWEST, _HIGHEST = 0.01, 4.0


class LearningRate:
    """
    A learning rate that needs no tuning, between a hundredth and four times its initial value.

    It starts where a draft that knows nothing of the traffic learns fast. A draft at an optimum only leaves it with
    such steps; the gate sees that, nothing is published, and the rate falls within a few updates.

    Args:
        initial (`float`): Where it starts, and starts again after a change of the traffic.
        adapts (`bool`): `False` stays there.
    """

    def __init__(self, initial: float, adapts: bool) -> None:
        self.initial = initial
        self.value = initial
        self._adapts = adapts

    @property
    def scale(self) -> float:
        """`value / initial`."""
        return self.value / self.initial

    def follow(self, decision: Decision, mixing: float = 1.0) -> None:
        """
        Go up or down.

        Args:
            decision (`str`): What the gate made of the last update.
            mixing (`float`, defaults to 1.0): How far on the way to what was learned that went which was published.
        """
        if not self._adapts:
            return
        if decision == "rolled back":
            value = self.value * _HARM
        elif decision == "published":
            value = self.value * _GAIN ** (3.0 * mixing - 2.0)
        else:
            value = max(self.value, min(self.value * _RECOVERY, self.initial))
        self.value = min(max(value, _LOWEST * self.initial), _HIGHEST * self.initial)

    def restart(self) -> None:
        """Start anew, since nothing is known of what comes."""
        self.value = self.initial
