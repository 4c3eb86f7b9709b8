"""What the requests of one assistant have measured: costs, acceptance, recent outputs. In memory only."""

import copy
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise

from .acceptance import Average, Calibration
from .costs import CostTable
from .lookup import Evidence, RecentOutputs

# Upper ends of the bins of the draft's own probability of a token; one more bin reaches up to 1.
CONFIDENCES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
# Acceptance of the draft's second, third and fourth best token before any was judged.
RANKS = (0.1, 0.05, 0.03)
# Upper ends of the bins of a looked-up token's share of the places; beyond the last, all places agree.
_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.999)
_OF_SHARE = 0.75  # acceptance of a looked-up token over its share, before any was judged
# Upper ends of the bins of the match where all places agree, and the acceptance in each before any was judged.
_MATCHES = (1, 2, 3, 4, 6, 9)
_UNANIMOUS = (0.5, 0.65, 0.7, 0.75, 0.8, 0.8, 0.85)


class Stance(IntEnum):
    """What the other one of draft and lookup says of a token that one of them proposes."""

    SILENT = 0  # it proposes nothing at this place, or was not asked
    AGREES = 1  # it is its first choice, too
    ALLOWS = 2  # it is among its choices
    DIFFERS = 3  # it proposes others only


def stance(token: int, choices: Sequence[int]) -> Stance:
    """Compare a token with the choices of the other one, the best first."""
    if not choices:
        return Stance.SILENT
    if token == choices[0]:
        return Stance.AGREES
    return Stance.ALLOWS if token in choices else Stance.DIFFERS


def confidence_bin(probability: float, seen: Stance = Stance.SILENT) -> int:
    """Return the bin of a drafted token by the draft's own probability of it, and by what the lookup says of it."""
    return seen * (1 + len(CONFIDENCES)) + bisect_right(CONFIDENCES, probability)


def evidence_bin(evidence: Evidence, seen: Stance = Stance.SILENT) -> int:
    """Return the bin of a looked-up token by the lookup's evidence, and by what the draft says of it."""
    bin_ = bisect_left(_SHARES, evidence.share)
    if bin_ == len(_SHARES):
        bin_ += bisect_left(_MATCHES, evidence.match)
    return seen * (len(_SHARES) + len(_UNANIMOUS)) + bin_


def _middles(ends: Sequence[float]) -> list[float]:
    return [(low + high) / 2 for low, high in pairwise((0.0, *ends))]


def _of_confidence() -> Calibration:
    return Calibration(_middles([*CONFIDENCES, 1.0]) * len(Stance))


def _of_evidence() -> Calibration:
    return Calibration([*(_OF_SHARE * share for share in _middles(_SHARES)), *_UNANIMOUS] * len(Stance))


@dataclass(slots=True)
class Rounds:
    """
    Means over the latest rounds at one batch size.

    Attributes:
        tokens (`Average`): Tokens that a row took in a round.
        seconds (`Average`): Seconds of a round, without those that read the prompt.
        seen (`int`): Rounds so far.
    """

    tokens: Average = field(default_factory=lambda: Average(1.0, 64, weight=0))
    seconds: Average = field(default_factory=lambda: Average(0.0, 64, weight=0))
    seen: int = 0


@dataclass(slots=True)
class Experience:
    """
    Shared by all requests of an [`~hf_osd.OnlineAssistant`]. Concurrent requests may lose a sample; nothing else.

    Attributes:
        draft_costs (`CostTable`): Seconds of a forward of the draft; all contexts count as 0, since they hardly
            matter.
        target_costs (`CostTable`): Seconds of a round without drafting.
        confidence (`Calibration`): Acceptance of a drafted token by its [`confidence_bin`].
        others (`Calibration`): Likewise, of the next best tokens beside it.
        ranks (`Calibration`): Acceptance of these by rank, where probabilities are not read.
        evidence (`Calibration`): Acceptance of a looked-up token by its [`evidence_bin`].
        acceptance (`Average`): Acceptance rate of the draft.
        rescue (`Average`): How often a row accepted a token in rounds where the lookup had none, or a wrong one.
        rounds (`dict[int, Rounds]`): By batch size.
        answer_length (`Average`): Tokens of an output.
        allowance (`float`): Seconds saved up for trials of a draft that does not seem to pay.
        unmeasured (`int`): Rounds with the draft before a step of it was measured.
        outputs (`RecentOutputs`): For the lookup.
    """

    draft_costs: CostTable = field(default_factory=CostTable)
    target_costs: CostTable = field(default_factory=CostTable)
    confidence: Calibration = field(default_factory=_of_confidence)
    others: Calibration = field(default_factory=_of_confidence)
    ranks: Calibration = field(default_factory=lambda: Calibration(RANKS))
    evidence: Calibration = field(default_factory=_of_evidence)
    acceptance: Average = field(default_factory=lambda: Average(0.6, 64, weight=2))
    rescue: Average = field(default_factory=lambda: Average(0.6, 64, weight=2))
    rounds: dict[int, Rounds] = field(default_factory=lambda: defaultdict(Rounds))
    answer_length: Average = field(default_factory=lambda: Average(64.0, 16))
    allowance: float = 0.0
    unmeasured: int = 0
    outputs: RecentOutputs = field(default_factory=RecentOutputs)
    _gain_shares: dict[int, Average] = field(default_factory=dict)

    def expect(self, acceptance: float) -> None:
        """
        Reset the acceptance of the draft after its weights have changed, to what learning has measured.

        Without this, a draft that was bad before is hardly ever tried, and its gain is noticed much later.

        Args:
            acceptance (`float`): How often the draft chose as the target did lately, in [0, 1].
        """
        self.acceptance = Average(acceptance, 64, weight=16)
        self.rescue = Average(acceptance, 64, weight=16)

    def of_another_draft(self) -> "Experience":
        """Return that of another draft for the same target: what is known of target and traffic is shared."""
        return Experience(
            target_costs=self.target_costs,
            evidence=copy.deepcopy(self.evidence),  # a copy, since it also says how far this draft confirms the lookup
            answer_length=self.answer_length,
            outputs=self.outputs,
        )

    def gain_share(self, batch: int) -> Average:
        """
        Return the share of the rows' mean gain that shortens the batch, which is done when its last row is.

        It is 1 for one row. The prior for more rows falls with their number, without further justification.
        """
        return self._gain_shares.setdefault(batch, Average(batch**-0.3, 4))
