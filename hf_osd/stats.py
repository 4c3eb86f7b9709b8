"""The counters of an assistant."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class OnlineStats:
    """
    Counters of an [`OnlineAssistant`] since it was made. Every field is a total; `*_seconds` are wall time.

    Attributes:
        > Requests

        requests (`int`): Prompts served; a batch counts each of its rows.
        fallbacks (`int`): Of these, prompts served without the draft, or by the target's own decoding alone.
        fallback_reasons (`Mapping[str, int]`): `fallbacks` by reason.

        > Tokens. Prompts that the target's own decoding served are in `requests` alone.

        generated_tokens (`int`): Tokens of the outputs.
        target_passes (`int`): Forward passes of the target; a pass counts once for each row that it went on with.
        submitted_tokens (`int`): Proposed tokens that these passes checked, of the draft and of the lookup.
        proposed_tokens (`int`): Tokens that the draft chose, those that were never submitted included.
        draft_tokens (`int`): Of these, tokens that the target judged: up to and including the first wrong one of each
            round. What follows a wrong token says nothing about the draft.
        accepted_tokens (`int`): Of these, tokens that were right. Divided by `draft_tokens`: `acceptance_rate`.
        accepted_other_tokens (`int`): Tokens accepted where the draft's first choice was wrong, and its second,
            third or fourth, beside it in the tree, was right. Not in `accepted_tokens`.
        lookup_tokens (`int`): Places where the target judged tokens of the lookup, one or several, the draft's own
            choice or not.
        accepted_lookup_tokens (`int`): Of these, places where one of them was right.

        > Time of serving

        decode_seconds (`float`): Speculative decoding, summed over calls.
        draft_seconds (`float`): Of it, what the draft took.
        verify_seconds (`float`): Of it, what the passes of the target took.
        accept_seconds (`float`): Of it, comparing proposals with the target's choices.
        record_seconds (`float`): Of it, recording what to learn from.

        > Learning

        updates (`int`): Times that learned weights went live.
        failed_updates (`int`): Updates that failed; serving went on with the live weights.
        learned_steps (`int`): Optimiser steps.
        learned_positions (`int`): Positions that these steps learned from; one that two steps used counts twice.
        learn_seconds (`float`): What learning has cost: training, scoring and imports, without pauses.
        saved_seconds (`float`): Estimate of what learning has saved: passes of the target for tokens that the static
            draft would not have got right.

        > Routes

        routes (`Mapping[str, OnlineStats]`): The same by route, where there are routes. What was served without
            speculation has none.
    """

    requests: int = 0
    fallbacks: int = 0
    fallback_reasons: Mapping[str, int] = field(default_factory=dict)
    generated_tokens: int = 0
    target_passes: int = 0
    submitted_tokens: int = 0
    proposed_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_other_tokens: int = 0
    lookup_tokens: int = 0
    accepted_lookup_tokens: int = 0
    decode_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    record_seconds: float = 0.0
    updates: int = 0
    failed_updates: int = 0
    learned_steps: int = 0
    learned_positions: int = 0
    learn_seconds: float = 0.0
    saved_seconds: float = 0.0
    routes: Mapping[str, "OnlineStats"] = field(default_factory=dict)

    def __add__(self, other: "OnlineStats") -> "OnlineStats":
        """Return what happened here and there together: the sum of every counter, without reasons and routes."""
        if not isinstance(other, OnlineStats):
            return NotImplemented
        return OnlineStats(**{name: getattr(self, name) + getattr(other, name) for name in _counters()})

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
        reasons = Counter(self.fallback_reasons)
        reasons.subtract(earlier.fallback_reasons)
        return OnlineStats(
            **{name: getattr(self, name) - getattr(earlier, name) for name in _counters()},
            fallback_reasons={reason: count for reason, count in reasons.items() if count},
            routes={name: one - earlier.routes.get(name, OnlineStats()) for name, one in self.routes.items()},
        )

    @property
    def acceptance_rate(self) -> float:
        """`accepted_tokens / draft_tokens`: how likely a drafted token is accepted; alpha in the literature."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def tokens_per_target_pass(self) -> float:
        """`generated_tokens / target_passes`: what a pass of the target yields; 1.0 is plain decoding."""
        return self.generated_tokens / self.target_passes if self.target_passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """`generated_tokens / decode_seconds`."""
        return self.generated_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and rates, ready for JSON."""
        rates = ("acceptance_rate", "tokens_per_target_pass", "tokens_per_second")
        routes = {name: one.to_dict() for name, one in self.routes.items()}
        return {**asdict(self), **{name: getattr(self, name) for name in rates}, "routes": routes}


def _counters() -> Iterator[str]:
    return (counter.name for counter in fields(OnlineStats) if counter.name not in ("fallback_reasons", "routes"))
