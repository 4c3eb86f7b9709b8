"""
How many tokens to draft and to submit in a round: as many as promise the most tokens per second, none included.

A round costs T and yields E tokens; over many rounds the rate E / T is largest if every round maximises E - rate * T
for the best rate there is (Dinkelbach). Goodput as the objective: SmartSpec (https://arxiv.org/abs/2406.14066) and
TIDE (https://arxiv.org/abs/2602.05145), with the closed form of Leviathan et al. for the tokens of a fixed length.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

from .acceptance import RequestFactor
from .experience import Experience

_TRIAL = 4  # tokens that a trial drafts, to find out whether the draft pays again
_SIZES = (2, 4, 6, 8, 12, 16)  # tokens submitted at once: sizes whose cost is measured
_DEAR = 2.0  # in plain rounds: once a size costs more, larger ones are not measured
_TRIAL_SHARE = 0.0075  # share of all time that trials of the draft may lose
_TRIAL_ROUNDS = 32  # in plain rounds: the most time that may be saved up for trials
_MARGIN = 1.04  # factor by which a draft's expected gain has to exceed its cost, or noise would decide
_ENOUGH_ROUNDS = 16  # rounds after which their own yield may stand for the best rate
_LEAST_REACH = 0.01  # chance below which a looked-up token is never thought of
_HOPELESS = 0.5  # of the reach at which a token breaks even: below it, a looked-up token is not thought of either
_UNKNOWN_STEP = 0.125  # in plain rounds: assumed cost of a draft step that has not been measured


@dataclass(frozen=True, slots=True)
class Round:
    """
    The state of a batch at the start of a round.

    Attributes:
        rows (`Sequence[int]`): Rows that still take tokens.
        context (`int`): Tokens of the longest row.
        lag (`int`): Most tokens of a row that the draft has not read yet.
        draft_room, lookup_room (`int`): Most tokens that the draft and the lookup may propose.
        nodes (`int`): Most tokens that may be submitted to the target.
        remaining (`int`): Most tokens that a row may still take.
        generated (`int`): Most tokens that a row has generated.
    """

    rows: Sequence[int]
    context: int
    lag: int
    draft_room: int
    lookup_room: int
    nodes: int
    remaining: int
    generated: int


@dataclass(frozen=True, slots=True)
class Plan:
    """
    How many tokens a round drafts and submits.

    Attributes:
        draft (`int`): Most tokens to draft; with 0 the lookup alone proposes.
        nodes (`int`): Most tokens to submit to the target.
        trial (`bool`): Whether the draft proposes although it does not seem to pay, to find out.
        guessed (`int`): Tokens that the lookup alone would submit for each row.
    """

    draft: int = 0
    nodes: int = 0
    trial: bool = False
    guessed: int = field(default=0, compare=False)


class Guess(NamedTuple):
    """
    A token of the lookup.

    Attributes:
        token (`int`): The token.
        reach (`float`): The chance that the row takes it, and all before it.
        is_first (`bool`): Whether it follows the text itself.
    """

    token: int
    reach: float
    is_first: bool


class MeasuredLength:
    """
    Plans the rounds of one batch.

    Args:
        experience (`Experience`): What earlier requests have learned.
        batch (`int`): Rows.
    """

    def __init__(self, experience: Experience, batch: int) -> None:
        self.experience = experience
        self.batch = batch
        self.draft_factors = [RequestFactor() for _ in range(batch)]
        self.lookup_factors = [RequestFactor() for _ in range(batch)]
        self.share = experience.gain_share(batch).value  # of what rows gain, how much shortens the batch
        self.rate = 0.0  # tokens per second, all rows together: the best rate known
        self._cheapest: list[int] = []  # [n]: which number of submitted tokens, n or more, costs least
        self._costs: list[float] = []  # [n]: seconds of a round that submits `_cheapest[n]` tokens, without drafting
        self._step = 0.0  # seconds of a draft step
        self.least_reach = _LEAST_REACH  # of a looked-up token that may be worth submitting

    def plan(self, now: Round, guesses: Mapping[int, Sequence[Guess]]) -> Plan:
        """Choose for a round, given by row what the lookup alone would submit, in this order."""
        costs = self.experience.target_costs
        curve = costs.curve(self.batch, now.context, 1 + max(now.nodes, now.draft_room))
        if curve is None:
            return Plan()  # the first round is plain: later ones are compared with it
        if costs.is_point(self.batch, now.context):  # submit few tokens until there is a slope to extrapolate by
            now = replace(now, draft_room=min(now.draft_room, 2), nodes=min(now.nodes, 2))
        self._cheapest = _cheapest_from(curve[1:])
        self._costs = [curve[1 + tokens] for tokens in self._cheapest]
        self.rate = self._best_rate(len(now.rows))
        self.least_reach = max(_LEAST_REACH, _HOPELESS * self._break_even(len(now.rows)))
        step = self.experience.draft_costs.curve(self.batch, 0, 1)
        self._step = step[1] if step is not None else _UNKNOWN_STEP * self._costs[0]
        longest = min(now.draft_room, now.nodes, 2 if step is None else now.draft_room)
        guessed = self.best_cut(self.gains([[one.reach for one in row[: now.nodes]] for row in guesses.values()]))
        right = {row: sum(one.reach for one in found[:guessed] if one.is_first) for row, found in guesses.items()}
        wrong = {row: max(1.0 - right.get(row, 0.0), 0.0) for row in now.rows}
        if self._is_worthwhile(now, longest, guessed, wrong):
            return Plan(longest, now.nodes, guessed=guessed)
        return replace(self._trial(now) or Plan(0, now.nodes), guessed=guessed)

    def _best_rate(self, rows: int) -> float:
        """Tokens per second: what rounds have yielded lately, or plain decoding where that is better."""
        past, plain = self.experience.rounds[self.batch], rows / self._costs[0]
        return max(plain, rows * past.tokens.value / past.seconds.value) if past.seen >= _ENOUGH_ROUNDS else plain

    def _break_even(self, rows: int) -> float:
        """The reach at which another token in each row gains as much as it costs on average."""
        return self.rate * (self._costs[-1] - self._costs[0]) / max(len(self._costs) - 1, 1) / (self.share * rows)

    def _is_worthwhile(self, now: Round, longest: int, guessed: int, wrong: Mapping[int, float]) -> bool:
        """Whether drafting gains more, in rows where the lookup is wrong, than its time would yield otherwise."""
        catching_up = self._catching_up(now) / self._remaining(now)
        for k in range(1, longest + 1):
            gains = {row: self._rescued(row, k) for row in now.rows}
            gained = self.share * sum(gain * wrong[row] for row, gain in gains.items())
            seconds = k * self._step + self._costs[max(k, guessed)] - self._costs[guessed]
            if gained > _MARGIN * self.rate * (seconds + catching_up * (1 + max(gains.values()))):
                return True
        return False

    def _rescued(self, row: int, k: int) -> float:
        """Tokens that a row is expected to gain by k drafted ones where the lookup is wrong."""
        chance = min(self.experience.rescue.value * self.draft_factors[row].value, 1.0)
        return chance * (1 + _gain(self.request_acceptance(row), k - 1))

    def gains(self, reach: Collection[Sequence[float]]) -> list[float]:
        """Return what the batch gains by the first, second ... token of its rows, by their reach."""
        longest = max(map(len, reach), default=0)
        return [self.share * sum(row[i] for row in reach if i < len(row)) for i in range(longest)]

    def best_fixed(self, now: Round, longest: int) -> int:
        """Return the length, at least 1, with the highest rate if all tokens of a row have the same acceptance."""
        rates = [self.request_acceptance(row) for row in now.rows]

        def rate(k: int) -> float:
            return sum(1 + self.share * _gain(rate, k) for rate in rates) / (k * self._step + self._costs[k])

        return max(range(1, longest + 1), key=rate)

    def request_acceptance(self, row: int) -> float:
        """Return the expected acceptance rate of a row's next drafted token."""
        return min(self.experience.acceptance.value * self.draft_factors[row].value, 0.99)

    def _catching_up(self, now: Round) -> float:
        """Seconds, beyond those of a step, that the draft takes to read the text it has not read yet."""
        if now.lag <= 2:
            return 0.0
        curve = self.experience.draft_costs.curve(self.batch, 0, bucket(now.lag))
        return max(curve[-1] - curve[1], 0.0) if curve is not None else 0.0

    def _remaining(self, now: Round) -> float:
        return max(min(now.remaining, self.experience.answer_length.value - now.generated), 8.0)

    def _trial(self, now: Round) -> Plan | None:
        """Plan a trial of the draft, if the time saved up for trials covers what it may cost."""
        k = min(now.draft_room, now.nodes, _TRIAL)
        # The cost of a trial cannot be told from that of reading the prompt, and a short rest would not pay for it.
        if k < _TRIAL or not now.generated:
            return None
        cost = self._catching_up(now) + k * self._step + self._costs[k] - self._costs[0]
        return Plan(k, now.nodes, trial=True) if cost < self.experience.allowance else None

    def best_cut(self, reach: Sequence[float], least: int = 0) -> int:
        """
        Return the number of tokens that is worth most to submit.

        Args:
            reach (`Sequence[float]`): What the batch gains by the first, second, ... of them.
            least (`int`, defaults to 0): Tokens that have to be submitted.
        """
        if len(reach) <= least:
            return least
        sums = [0.0, *accumulate(reach)]
        return max(range(least, len(sums)), key=lambda m: sums[m] - self.rate * self._costs[m])

    def filled(self, nodes: int, most: int) -> int:
        """
        Return how many tokens to submit, at least those that are worth it.

        More may cost less: in float32 on a CPU, five tokens may be faster than two. The costs of a few sizes are
        measured in ascending order, until one is too expensive.

        Args:
            nodes (`int`): Tokens that are worth submitting.
            most (`int`): Tokens that may be submitted.
        """
        if not nodes:
            return 0
        table, last = self.experience.target_costs, self._costs[0]
        for size in (size for size in _SIZES if size <= most):
            cost = table.seen(self.batch, 1 + size)
            if cost is None and size >= nodes and last < _DEAR * self._costs[0]:
                return size
            last = cost or last
        return max(nodes, min(self._cheapest[nodes], most))

    def goes_on(self, reach: float, drafted: int, left: int) -> bool:
        """
        Say whether to draft another token: whether some number of further ones is worth its time.

        Args:
            reach (`float`): Expected number of rows that accept all tokens drafted so far, times `share`.
            drafted (`int`): Tokens drafted.
            left (`int`): Tokens that may still be.
        """
        acceptance, worth = min(self.experience.acceptance.value, 0.99), 0.0
        for step in range(1, left + 1):
            reach *= acceptance
            verifying = self._costs[min(drafted + step, len(self._costs) - 1)] - self._costs[drafted + step - 1]
            worth += reach - self.rate * (self._step + verifying)
            if worth > 0.0:
                return True
        return False

    def settle(self, now: Round, plan: Plan, seconds: float, taken: int) -> None:
        """Account for a finished round: a share of its time is saved for trials, and a trial spends what it lost."""
        experience, past = self.experience, self.experience.rounds[self.batch]
        past.seen += 1
        past.tokens.note(taken / len(now.rows))
        past.seconds.note(seconds)
        if plan.trial:
            gained = len(now.rows) + self.share * (taken - len(now.rows))
            experience.allowance -= max(seconds - gained / self.rate, 0.0)
        cap = _TRIAL_ROUNDS * self._costs[0] if self._costs else 0.0
        experience.allowance = min(experience.allowance + _TRIAL_SHARE * seconds, cap)


def bucket(tokens: int) -> int:
    """Round a number of tokens fed at once up to a power of two, beyond 8."""
    return tokens if tokens <= 8 else 1 << (tokens - 1).bit_length()


def _cheapest_from(costs: Sequence[float]) -> list[int]:
    """Return for each index the index of the smallest of `costs` from there on."""
    found = [len(costs) - 1]
    for place in range(len(costs) - 2, -1, -1):
        found.append(place if costs[place] <= costs[found[-1]] else found[-1])
    return found[::-1]


def _gain(acceptance: float, k: int) -> float:
    """Tokens that k proposals add to a round, each accepted with the same chance (arXiv 2211.17192, eq. 1, less 1)."""
    return acceptance * (1 - acceptance**k) / (1 - acceptance)
