"""Results of a verification: counts and differences of logits, never texts."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..evaluation.exactness import Difference


@dataclass(slots=True)
class Outcome:
    """
    The outputs of one way to decode, compared.

    Attributes:
        is_ours (`bool`): Whether hf_osd wrote them.
        differences (`list[Difference]`): One for each output that differs.
        tokens_per_pass (`float`, *optional*): Tokens for each forward of the target; of hf_osd alone.
        fallbacks (`dict[str, int]`): Outputs that hf_osd wrote without the draft or without speculation, by reason.
    """

    is_ours: bool = False
    differences: list[Difference] = field(default_factory=list)
    tokens_per_pass: float | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)

    @property
    def largest_gap(self) -> float | None:
        """The largest distance among the differences that have one."""
        return max((one.gap for one in self.differences if one.gap is not None), default=None)


@dataclass(slots=True)
class Verification:
    """
    All outputs, compared with those of plain `generate`, one prompt at a time.

    Attributes:
        dtype (`str`): The target's.
        outcomes (`dict[str, Outcome]`): By way to decode.
        requests (`int`): Prompts.
        tokens (`int`): Tokens of the outputs that the others are compared with.
        rounding (`float`):
            The largest change of the distance between the target's two best tokens, over all positions of these
            outputs, when the target computes their logits in one pass or in a batch instead of token by token.
    """

    dtype: str
    outcomes: dict[str, Outcome]
    requests: int = 0
    tokens: int = 0
    rounding: float = 0.0

    def unexplained(self, outcome: Outcome) -> list[Difference]:
        """Return the differences of an outcome that neither rounding explains nor the batch."""
        return [one for one in outcome.differences if not one.is_explained(self.rounding)]

    @property
    def is_lossless(self) -> bool:
        """Whether rounding explains every difference of hf_osd's outputs."""
        return not any(self.unexplained(one) for one in self.outcomes.values() if one.is_ours)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, ready for JSON."""
        decoding = {
            name: {
                "outputs_that_differ": len(one.differences),
                "outside_rounding": len(self.unexplained(one)),
                "largest_gap": one.largest_gap,
                "tokens_per_pass": one.tokens_per_pass,
                "fallbacks": one.fallbacks,
                "differences": [asdict(difference) for difference in one.differences],
            }
            for name, one in self.outcomes.items()
        }
        names = ("dtype", "requests", "tokens", "rounding")
        return {**{name: getattr(self, name) for name in names}, "decoding": decoding}
