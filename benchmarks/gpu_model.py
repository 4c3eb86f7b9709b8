"""
What a draft would be worth on a GPU, by a model of the cost of a pass: nothing here is measured on one.

At a small batch a pass reads every weight once, and each layer takes at least as long as its kernels take to start. So
a check of sixteen tokens costs what one costs, and so does a longer text. Not covered: batches that fill the device,
long contexts, kernels of several layers in one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from hf_osd.drafts.prediction import LONGEST, predict
from hf_osd.drafts.profiles import Cost, Profile

BYTES = 2  # of a weight in bfloat16
FEED_FORWARD = 0.8  # share of a layer's weights in its feed-forward part


@dataclass(frozen=True)
class Gpu:
    """
    A device.

    Attributes:
        bandwidth (`float`): Bytes per second that a pass really reads: .7 of an H100's 3.35 TB/s.
        layer_seconds (`float`): Least time of a layer: some ten kernels of a captured graph.
        other_seconds (`float`): Of the kernels around the layers: embedding, norm, head, choice of a token.
    """

    bandwidth: float = 0.7 * 3.35e12
    layer_seconds: float = 15e-6
    other_seconds: float = 20e-6

    def seconds(self, layers: int, layer_weights: float, other_weights: float) -> float:
        """Return the seconds of a pass; `other_weights` are those of the head and of a map in front."""
        layer = max(self.layer_seconds, BYTES * layer_weights / self.bandwidth)
        return layers * layer + self.other_seconds + BYTES * other_weights / self.bandwidth


@dataclass(frozen=True)
class Shape:
    """Layers, hidden size, weights of a layer and tokens of a target."""

    layers: int
    hidden: int
    layer_weights: float
    vocabulary: int


def speedup(
    gpu: Gpu,
    target: Shape,
    chances: Sequence[Sequence[float]],
    *,
    layers: int,
    width: float = 1.0,
    states: int = 0,
    vocabulary: int,
) -> float:
    """
    Return the speed-up over plain decoding, of one row.

    Args:
        gpu ([`Gpu`]): The device.
        target ([`Shape`]): The target.
        chances (`Sequence[Sequence[float]]`): Chances that a chain's tokens are accepted, of each stream.
        layers (`int`): Of the draft.
        width (`float`, defaults to 1): Of its feed-forward parts, relative to the target's.
        states (`int`, defaults to 0): How many states of the target it reads.
        vocabulary (`int`): Tokens that it proposes from.
    """
    layer = target.layer_weights * (1 + FEED_FORWARD * (width - 1))
    maps = (states + 1) * target.hidden**2 if states else 0  # and one of the token's embedding
    step = gpu.seconds(layers, layer, maps + target.hidden * vocabulary)
    one = gpu.seconds(target.layers, target.layer_weights, target.hidden * target.vocabulary)
    costs = Profile({}, tuple(Cost(1, 1, tokens, one, one, one) for tokens in (1, LONGEST + 1)))
    return geometric_mean(predict(costs, step, each, context=1).speedup for each in chances)
