"""What the requests of one assistant have measured: costs, acceptance, recent outputs. In memory only."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from .acceptance import Average, Calibration
from .costs import CostTable
from .lookup import RecentOutputs

# Upper ends of the bins of the draft's own probability of a token; one more bin reaches up to 1.
CONFIDENCES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_MIDDLES = [(low + high) / 2 for low, high in pairwise((0.0, *CONFIDENCES, 1.0))]
# Acceptance of the draft's second, third and fourth best token before any was judged.
RANKS = (0.1, 0.05, 0.03)
# Acceptance of a guessed token by the length of its match, 0 to 16 and more, before any was judged; 0 does not occur.
MATCHES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.7, 0.75, 0.75, 0.8, 0.8, 0.8, 0.85, 0.85, 0.9)


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
        confidence (`Calibration`): Acceptance of a drafted token by the draft's own probability of it.
        others (`Calibration`): Likewise, of the next best tokens beside it.
        ranks (`Calibration`): Acceptance of these by rank, where probabilities are not read.
        match (`Calibration`): Acceptance of a guessed token by the length of its match.
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
            target_costs=self.target_costs, match=self.match, answer_length=self.answer_length, outputs=self.outputs
        )

    def gain_share(self, batch: int) -> Average:
        """
        Return the share of the rows' mean gain that shortens the batch, which is done when its last row is.

        It is 1 for one row. The prior for more rows falls with their number, without further justification.
        """
        return self._gain_shares.setdefault(batch, Average(batch**-0.3, 4))
