"""
How many tokens to propose, and by whom: what promises the most tokens per second, plain decoding included.

A round costs T and yields E tokens; over many rounds the rate E / T is largest if every round maximises E - rate * T
for the best rate there is (Dinkelbach). Goodput as the objective: SmartSpec (https://arxiv.org/abs/2406.14066) and
TIDE (https://arxiv.org/abs/2602.05145), with the closed form of Leviathan et al. for the tokens of a fixed length.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from .acceptance import RequestFactor
from .experience import CONFIDENCES, Experience
from .lookup import Guess

_TRIAL = 4  # tokens drafted to find out whether the draft pays again
_TRIAL_SHARE = 0.0075  # of all time may be lost by that
_TRIAL_ROUNDS = 32  # plain rounds whose time may be saved up for it
_MARGIN = 1.04  # a draft has to promise that much more than going without, or noise would decide
FEW_ROUNDS = 4  # rounds with the draft before their record is believed
_UNKNOWN_STEP = 0.125  # cost of a draft step before it is measured, in plain rounds


@dataclass(frozen=True, slots=True)
class Round:
    """
    Where a round begins.

    Attributes:
        rows (`Sequence[int]`): Rows that still take tokens.
        context (`int`): Tokens of the longest row.
        lag (`int`): Tokens that the draft has not seen yet, at most.
        draft_room, lookup_room (`int`): Tokens that the draft and the lookup may propose at most.
        remaining (`int`): Tokens that a row is still going to take, at most.
        generated (`int`): Tokens that a row has taken.
    """

    rows: Sequence[int]
    context: int
    lag: int
    draft_room: int
    lookup_room: int
    remaining: int
    generated: int


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What a round does: draft up to `draft` tokens, or submit up to `lookup` guessed ones, or neither.

    `trial` says that the draft is tried out although it does not seem to pay.
    """

    draft: int = 0
    lookup: int = 0
    trial: bool = False


class MeasuredLength:
    """
    Chooses for the requests of one batch.

    Args:
        experience (`Experience`): What earlier requests have learned.
        batch (`int`): Rows.
    """

    def __init__(self, experience: Experience, batch: int) -> None:
        self.experience = experience
        self.batch = batch
        self.draft_factors = [RequestFactor() for _ in range(batch)]
        self.lookup_factors = [RequestFactor() for _ in range(batch)]
        self.share = experience.gain_share(batch).value  # of what rows gain, what the batch gains
        self.rate = 0.0  # tokens per second of all rows together that the best steady choice yields
        self._costs: list[float] = []  # seconds of a round without its draft, by tokens proposed
        self._step = 0.0  # seconds of a draft step

    def plan(self, now: Round, guesses: dict[int, Guess]) -> Plan:
        """Choose for a round, given each row's guess."""
        costs = self.experience.target_costs
        curve = costs.curve(self.batch, now.context, 1 + max(now.draft_room, now.lookup_room))
        if curve is None:
            return Plan()  # a plain round first: every other is compared with it
        if costs.is_point(self.batch, now.context):  # short steps, until there is a slope to trust
            now = replace(now, draft_room=min(now.draft_room, 2), lookup_room=min(now.lookup_room, 2))
        self._costs = curve[1:]
        rows, plain = len(now.rows), self._costs[0]
        self.rate = rows / plain
        drafted, tokens, seconds = self._draft_option(now)
        if drafted:
            catching_up = self._catching_up(now) * min(tokens / rows / self._remaining(now), 1.0)
            seconds = (seconds + catching_up) * _MARGIN
            self.rate = max(self.rate, tokens / seconds)
        reach = self.guess_reach(now, guesses)
        looked_up = self.best_cut(reach)  # 0 is plain decoding
        worth = rows + sum(reach[:looked_up]) - self.rate * self._costs[looked_up]
        if drafted and tokens - self.rate * seconds > worth:
            return Plan(draft=drafted)
        return self._trial(now) or Plan(lookup=looked_up)

    def _draft_option(self, now: Round) -> tuple[int, float, float]:
        """Tokens to draft at most, and the tokens and seconds that such a round is expected to come to."""
        step = self.experience.draft_costs.curve(self.batch, 0, 1)
        longest = min(now.draft_room, 2 if step is None else now.draft_room)
        self._step = step[1] if step is not None else _UNKNOWN_STEP * self._costs[0]
        if longest < 1:
            return 0, 0.0, 0.0
        past, rows = self.experience.draft_rounds[self.batch], len(now.rows)
        if past.seen < FEW_ROUNDS or past.drafted.value > longest:
            return self._fixed_option(now, longest)
        factor = sum(self.draft_factors[row].value for row in now.rows) / rows
        sent = self._costs[min(round(past.sent.value), longest)]
        return longest, rows * (1 + past.gain.value * factor * self.share), past.drafted.value * self._step + sent

    def _fixed_option(self, now: Round, longest: int) -> tuple[int, float, float]:
        """The best fixed length by the mean acceptance; see [`best_fixed`]."""
        k = self.best_fixed(now, longest)
        tokens = sum(1 + self.share * _gain(self.request_acceptance(row), k) for row in now.rows)
        return k, tokens, k * self._step + self._costs[k]

    def best_fixed(self, now: Round, longest: int) -> int:
        """Return the length of at least 1 with the highest rate, if each of a row's tokens is accepted alike."""
        rates = [self.request_acceptance(row) for row in now.rows]

        def rate(k: int) -> float:
            return sum(1 + self.share * _gain(rate, k) for rate in rates) / (k * self._step + self._costs[k])

        return max(range(1, longest + 1), key=rate)

    def request_acceptance(self, row: int) -> float:
        """Return the expected acceptance rate of a row's next drafted token."""
        return min(self.experience.acceptance.value * self.draft_factors[row].value, 0.99)

    def _catching_up(self, now: Round) -> float:
        """Seconds that the draft takes to read what it has not seen yet, beyond a step's."""
        if now.lag <= 2:
            return 0.0
        curve = self.experience.draft_costs.curve(self.batch, 0, bucket(now.lag))
        return max(curve[-1] - curve[1], 0.0) if curve is not None else 0.0

    def _remaining(self, now: Round) -> float:
        return max(min(now.remaining, self.experience.answer_length.value - now.generated), 8.0)

    def _trial(self, now: Round) -> Plan | None:
        """Draft all the same, where the time saved up for that covers what it may cost."""
        k = min(now.draft_room, _TRIAL)
        # Beside the reading of the prompt, what a trial loses could not be told; at the end it would not be worth it.
        if k < _TRIAL or not now.generated:
            return None
        cost = self._catching_up(now) + k * self._step + self._costs[k] - self._costs[0]
        return Plan(draft=k, trial=True) if cost < self.experience.allowance else None

    def guess_reach(self, now: Round, guesses: dict[int, Guess]) -> list[float]:
        """Return what the batch gains by the first, second, ... token of its rows' guesses."""
        reaches = [self.row_guess_reach(row, guess) for row, guess in guesses.items()]
        longest = min(max(map(len, reaches), default=0), now.lookup_room)
        return [self.share * sum(reach[i] for reach in reaches if i < len(reach)) for i in range(longest)]

    def row_guess_reach(self, row: int, guess: Guess) -> list[float]:
        """Return how likely a row is to accept at least 1, 2, ... tokens of its guess."""
        factor, rate = self.lookup_factors[row].value, self.experience.match.rate
        chances = (min(rate(guess.match + step) * factor, 0.99) for step in range(len(guess.tokens)))
        return list(accumulate(chances, lambda reach, chance: reach * chance))

    def best_cut(self, reach: Sequence[float]) -> int:
        """Return how many tokens of a proposal are worth submitting, given what the batch gains by each."""
        sums = [0.0, *accumulate(reach)]
        return max(range(len(sums)), key=lambda m: sums[m] - self.rate * self._costs[m])

    def goes_on(self, reach: float, drafted: int, left: int) -> bool:
        """
        Say whether drafting on is worth its time.

        Args:
            reach (`float`): Rows that are expected to accept everything drafted so far, as the batch gains.
            drafted (`int`): Tokens drafted.
            left (`int`): Tokens that may still be.
        """
        acceptance, worth = min(self.experience.acceptance.value, 0.99), 0.0
        for step in range(1, left + 1):
            reach *= acceptance
            worth += reach - self.rate * (self._step + self._costs[drafted + step] - self._costs[drafted + step - 1])
            if worth > 0.0:
                return True
        return False

    def settle(self, now: Round, plan: Plan, seconds: float, taken: int) -> None:
        """Account for a finished round: a share of its time may be spent on trials, which pay for what they lose."""
        experience = self.experience
        if plan.trial:
            gained = len(now.rows) + self.share * (taken - len(now.rows))
            experience.allowance -= max(seconds - gained / self.rate, 0.0)
        cap = _TRIAL_ROUNDS * self._costs[0] if self._costs else 0.0
        experience.allowance = min(experience.allowance + _TRIAL_SHARE * seconds, cap)


def confidence_bin(probability: float) -> int:
    """Return the bin of the draft's own probability of a token."""
    return bisect_right(CONFIDENCES, probability)


def bucket(tokens: int) -> int:
    """Round a number of tokens fed at once up to a power of two, beyond 8."""
    return tokens if tokens <= 8 else 1 << (tokens - 1).bit_length()


def _gain(acceptance: float, k: int) -> float:
    """Tokens that k proposals add to a round, each accepted with the same chance (arXiv 2211.17192, eq. 1, less 1)."""
    return acceptance * (1 - acceptance**k) / (1 - acceptance)
