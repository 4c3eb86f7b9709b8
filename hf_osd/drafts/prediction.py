"""
Tokens per second of a draft before it serves, from its acceptance and from measured costs.

A round of draft length k takes k draft steps and one pass of the target over k + 1 tokens. If each token is accepted
independently with probability a, it yields (1 - a^(k + 1)) / (1 - a) tokens (Leviathan et al.,
https://arxiv.org/abs/2211.17192). The best length has the most tokens per second (SmartSpec,
https://arxiv.org/abs/2406.14066, and TIDE, https://arxiv.org/abs/2602.05145). Not covered: lookups, lengths that
change by confidence, and the time of learning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, repeat
from operator import mul

from ..config import shown
from ..errors import InputError
from .profiles import Profile

LONGEST = 15
"""Longest draft to consider: with the target's own token, the 16 tokens that a profile measures by default."""

Acceptance = float | Sequence[float]
"""Probability that a drafted token is accepted if all before it were: one for all tokens, or one for each."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """
    The predicted speed of a draft.

    Attributes:
        length (`int`): Best draft length; 0 where plain decoding is faster than any.
        tokens_per_round (`float`): Tokens that a row gains in a round, on average.
        tokens_per_second (`float`): Of all rows together.
        speedup (`float`): Over plain decoding; never below 1, which going without the draft gives.
    """

    length: int
    tokens_per_round: float
    tokens_per_second: float
    speedup: float


def predict(
    target: Profile,
    draft_step_seconds: float,
    acceptance: Acceptance,
    *,
    batch: int = 1,
    context: int = 256,
    longest: int = LONGEST,
) -> Prediction:
    """
    Predict how fast a draft serves at its best draft length.

    Args:
        target ([`Profile`]): Costs of the target's passes.
        draft_step_seconds (`float`): Time to draft one token for every row.
        acceptance (`float` or `Sequence[float]`): Probability that a drafted token is accepted if all before it were,
            in [0, 1]. Of a sequence, the first entry is the first token's, and the last goes on for all behind it.
        batch (`int`, defaults to 1): Rows.
        context (`int`, defaults to 256): Tokens of each row in the cache.
        longest (`int`, defaults to 15): Longest draft to consider. Beyond what the profile measured, costs are
            extrapolated.

    Returns:
        [`Prediction`]: Of the best length.

    Raises:
        InputError: An argument is out of its range.

    Example:

    ```python
    >>> predict(profile(target), draft_step_seconds=0.0022, acceptance=0.5)
    Prediction(length=4, tokens_per_round=1.94, tokens_per_second=36.6, speedup=1.54)
    ```
    """
    gains = expected_tokens(acceptance, longest)
    if not draft_step_seconds > 0:
        raise InputError(f"draft_step_seconds must be positive, got {shown(draft_step_seconds)}")
    plain = target.seconds(batch, context, 1)
    costs = [plain] + [k * draft_step_seconds + target.seconds(batch, context, k + 1) for k in range(1, longest + 1)]
    best = max(range(longest + 1), key=lambda k: gains[k] / costs[k])
    rate = gains[best] / costs[best]
    return Prediction(best, gains[best], batch * rate, rate * plain)


def expected_tokens(acceptance: Acceptance, longest: int) -> list[float]:
    """
    Return how many tokens a row gains in a round of draft length 0, 1, ... `longest`, on average.

    Args:
        acceptance (`float` or `Sequence[float]`): See [`predict`].
        longest (`int`): Last entry, at least 0.

    Raises:
        InputError: An argument is out of its range.
    """
    given = [acceptance] if isinstance(acceptance, int | float) else [*acceptance]
    if not given or not all(0 <= share <= 1 for share in given):
        raise InputError(f"acceptance must be in [0, 1], got {shown(acceptance)}")
    if longest < 0:
        raise InputError(f"longest must be at least 0, got {shown(longest)}")
    each = islice(chain(given, repeat(given[-1])), longest)
    reached = accumulate(each, mul, initial=1.0)  # probability that the k-th token of a round comes to be
    return [*accumulate(reached)]
