"""What an assistant has done so far, in numbers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class OnlineStats:
    """
    What an [`OnlineAssistant`] has done so far.

    Attributes:
        requests (`int`): Prompts served; a batch counts each of its rows.
        fallbacks (`int`): Prompts of those that were served without the draft, or without speculation at all.
        fallback_reasons (`Mapping[str, int]`): The same by reason.
        generated_tokens (`int`): Tokens generated.
        target_passes (`int`): Forwards of the target, counted once for each row that was still going on.
        proposed_tokens (`int`): Tokens that the draft chose.
        draft_tokens (`int`): Those that the target judged: up to and including the first wrong one of each round.
            Later ones follow a wrong token and say nothing about the draft.
        accepted_tokens (`int`): Those that were right.
        accepted_other_tokens (`int`): Accepted tokens that were the draft's second, third or fourth choice.
        lookup_tokens (`int`): Tokens guessed from the text that were submitted and judged.
        accepted_lookup_tokens (`int`): Those that the target accepted; the draft may have proposed them too.
        submitted_tokens (`int`): Tokens that the target checked, whoever proposed them.
        updates (`int`): Times that new weights were published.
        failed_updates (`int`): Updates that were given up; serving went on with the old weights.
        decode_seconds (`float`): Wall time of speculative decoding, summed over calls.
        draft_seconds (`float`): Part of it that the draft took.
        verify_seconds (`float`): Part of it that the target took.
        accept_seconds (`float`): Part of it that comparing the two took.
        record_seconds (`float`): Part of it that recording took.
        learn_seconds (`float`): Wall time of learning, scoring and imports included, without pauses: what it has cost.
        saved_seconds (`float`): What it has won, as far as can be told: the passes of the target that were saved by
            drafted tokens which the draft, as it was at first, would not have got right.
        learned_steps (`int`): Steps of the optimiser.
        learned_positions (`int`): Positions that these learned from, counted once a step.
    """

    requests: int = 0
    fallbacks: int = 0
    fallback_reasons: Mapping[str, int] = field(default_factory=dict)
    generated_tokens: int = 0
    target_passes: int = 0
    proposed_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_other_tokens: int = 0
    lookup_tokens: int = 0
    accepted_lookup_tokens: int = 0
    submitted_tokens: int = 0
    updates: int = 0
    failed_updates: int = 0
    decode_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    record_seconds: float = 0.0
    learn_seconds: float = 0.0
    saved_seconds: float = 0.0
    learned_steps: int = 0
    learned_positions: int = 0

    def __sub__(self, earlier: "OnlineStats") -> "OnlineStats":
        """
        Return what happened since `earlier`: the difference of every counter, and so the rates of that time alone.

        Args:
            earlier (`OnlineStats`): What [`OnlineAssistant.stats`] returned before.

        Example:

        ```python
        >>> before = assistant.stats()
        >>> output = hf_osd.generate(target, **inputs, online_assistant=assistant)
        >>> (assistant.stats() - before).acceptance_rate  # of this request
        ```
        """
        if not isinstance(earlier, OnlineStats):
            return NotImplemented
        counters = (counter.name for counter in fields(self) if counter.name != "fallback_reasons")
        reasons = Counter(self.fallback_reasons)
        reasons.subtract(earlier.fallback_reasons)
        return OnlineStats(
            **{name: getattr(self, name) - getattr(earlier, name) for name in counters},
            fallback_reasons={reason: count for reason, count in reasons.items() if count},
        )

    @property
    def acceptance_rate(self) -> float:
        """`accepted_tokens / draft_tokens`: how likely a drafted token is accepted (alpha in the literature)."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def tokens_per_target_pass(self) -> float:
        """Tokens that one forward of the target yields for one request; 1.0 is plain decoding."""
        return self.generated_tokens / self.target_passes if self.target_passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens by second of decoding."""
        return self.generated_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and rates, ready for JSON."""
        rates = ("acceptance_rate", "tokens_per_target_pass", "tokens_per_second")
        return {**asdict(self), **{name: getattr(self, name) for name in rates}}
