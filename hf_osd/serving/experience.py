"""What one assistant's requests learn about serving: costs, acceptance, recent outputs. Lives in memory only."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from .acceptance import Average, Calibration
from .costs import CostTable
from .lookup import RecentOutputs

# Upper ends of the bins of the draft's own probability of a token; the last bin reaches up to 1.
CONFIDENCES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_MIDDLES = [(low + high) / 2 for low, high in pairwise((0.0, *CONFIDENCES, 1.0))]
# Acceptance of the second, third and fourth best token at a place, to begin with.
RANKS = (0.1, 0.05, 0.03)
# Acceptance of a guess by the length of its match: 0 does not occur, the last bin is 16 and more.
MATCHES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.7, 0.75, 0.75, 0.8, 0.8, 0.8, 0.85, 0.85, 0.9)


@dataclass(slots=True)
class Rounds:
    """
    What rounds were like lately, at one batch size.

    Attributes:
        tokens (`Average`): Tokens that a row took.
        seconds (`Average`): Their time, where it was not the prompt that was read.
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
        draft_costs (`CostTable`): Seconds of a forward of the draft, whose contexts hardly matter: all count as 0.
        target_costs (`CostTable`): Seconds of a round without its draft.
        confidence (`Calibration`): Acceptance of a drafted token by the draft's own probability of it.
        others (`Calibration`): The same of the next best tokens at its place.
        ranks (`Calibration`): The same by rank, where nobody looks at probabilities.
        match (`Calibration`): Acceptance of a guessed token by how long its match was.
        acceptance (`Average`): Acceptance rate of the draft.
        rescue (`Average`): How often a row took a token of the draft's where the lookup had none, or a wrong one.
        rounds (`dict[int, Rounds]`): By batch size.
        answer_length (`Average`): Tokens of an output.
        allowance (`float`): Seconds that may be lost by trying out a draft that does not seem to pay.
        unmeasured (`int`): Rounds with the draft before one has told what a step of it costs.
        outputs (`RecentOutputs`): For the lookup.
    """

    draft_costs: CostTable = field(default_factory=CostTable)
    target_costs: CostTable = field(default_factory=CostTable)
    confidence: Calibration = field(default_factory=lambda: Calibration(_MIDDLES))
    others: Calibration = field(default_factory=lambda: Calibration(_MIDDLES))
    ranks: Calibration = field(default_factory=lambda: Calibration(RANKS))
    match: Calibration = field(default_factory=lambda: Calibration(MATCHES))
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
        Start anew with a draft that has changed, from what learning has seen of it.

        A draft that used to be cold is hardly ever tried, and would be found out to pay much later.

        Args:
            acceptance (`float`): How often the draft chose as the target did lately, in [0, 1].
        """
        self.acceptance = Average(acceptance, 64, weight=16)
        self.rescue = Average(acceptance, 64, weight=16)

    def gain_share(self, batch: int) -> Average:
        """
        Return how much of what the rows of a batch gain on average shortens it: it is done when its last row is.

        For one row that is all. The first assumption for others only says that it falls with their number.
        """
        return self._gain_shares.setdefault(batch, Average(batch**-0.3, 4))
