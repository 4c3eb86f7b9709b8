"""Rates of speculative decoding in plain Python. Not covered: how they differ between positions."""

import math
from collections.abc import Sequence
from statistics import NormalDist

from ..errors import InputError


def ratio(
    numerators: Sequence[int], denominators: Sequence[int], confidence_level: float = 0.95, highest: float = math.inf
) -> tuple[float | None, list[float] | None]:
    """
    Return a ratio of sums over requests, and its confidence interval.

    The tokens of one request resemble each other, so the sample is one of requests. The interval is the normal one of
    the ratio estimator (Cochran, Sampling Techniques, 1977, section 6.3), cut at 0 and `highest`. It is too narrow
    with fewer than about 30 requests, and has no width where all requests agree.

    Args:
        numerators (`Sequence[int]`): One count a request.
        denominators (`Sequence[int]`): One count a request.
        confidence_level (`float`, defaults to 0.95): In (0, 1).
        highest (`float`, *optional*): Largest possible ratio.

    Returns:
        `tuple[float | None, list[float] | None]`: The ratio, `None` where all denominators are 0; and the two ends of
        the interval, `None` for fewer than two requests.

    Raises:
        InputError: `confidence_level` is out of its range.
    """
    if not 0.0 < confidence_level < 1.0:
        raise InputError(f"confidence_level must be in (0, 1), got {confidence_level!r}")
    total, count = sum(denominators), len(denominators)
    if not total:
        return None, None
    value = sum(numerators) / total
    if count < 2:
        return value, None
    squares = sum((top - value * bottom) ** 2 for top, bottom in zip(numerators, denominators, strict=True))
    error = math.sqrt(count / (count - 1) * squares) / total
    reach = NormalDist().inv_cdf(0.5 + confidence_level / 2.0) * error
    return value, [max(value - reach, 0.0), min(value + reach, highest)]


def expected_speedup(acceptance_rate: float, draft_length: int, cost_ratio: float) -> float:
    """
    Return how many times faster than plain decoding a fixed draft length is expected to be.

    `(1 - a^(k + 1)) / ((1 - a) (k c + 1))`: tokens of a round over its cost (Leviathan et al., 2023,
    https://arxiv.org/abs/2211.17192, theorem 3.8), if every token is accepted with the same probability and a check of
    `k` tokens costs the target as much as one token.

    Args:
        acceptance_rate (`float`): `a`, in [0, 1].
        draft_length (`int`): `k`, tokens that the draft proposes in a round; at least 0.
        cost_ratio (`float`): `c`, the time of a pass of the draft over that of one of the target; at least 0.

    Raises:
        InputError: A value is out of its range.
    """
    if not 0.0 <= acceptance_rate <= 1.0:
        raise InputError(f"acceptance_rate must be in [0, 1], got {acceptance_rate!r}")
    if not isinstance(draft_length, int) or draft_length < 0:
        raise InputError(f"draft_length must be an integer of at least 0, got {draft_length!r}")
    if not cost_ratio >= 0.0:
        raise InputError(f"cost_ratio must be at least 0, got {cost_ratio!r}")
    tokens = sum(acceptance_rate**accepted for accepted in range(draft_length + 1))  # valid for a = 1, too
    return tokens / (draft_length * cost_ratio + 1.0)
