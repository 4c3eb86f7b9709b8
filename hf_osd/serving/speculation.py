"""The interface of speculators, which propose tokens for a batch, and the one that always asks the draft."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from ..records import Proposal
from .drafting import OnlineAssistedGenerator
from .sequences import Sequences
from .stopwatch import Stopwatch


class Speculator(ABC):
    """
    Proposes for one batch, and learns from the outcome.

    Args:
        drafter (`OnlineAssistedGenerator`): The draft.
    """

    def __init__(self, drafter: OnlineAssistedGenerator) -> None:
        self.drafter = drafter
        self.counts = drafter.counts

    @abstractmethod
    def propose(self, sequences: Sequences, room: int, watch: Stopwatch) -> Proposal:
        """
        Propose tokens behind the end of every row.

        Args:
            sequences (`Sequences`): The batch.
            room (`int`): Tokens that may be proposed at most.
            watch (`Stopwatch`): Its stage `"draft"` is what the draft takes.
        """

    @abstractmethod
    def note(self, logits: torch.Tensor, tokens: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """
        Note what the target made of the last proposal.

        Args:
            logits (`torch.FloatTensor` of shape `(batch, k + 1, vocab)`): The target's logits.
            tokens (`Sequence[Sequence[int]]`): For each row, the tokens that the target settled on.
            taken (`Sequence[int]`): How many of them the row kept; 0 for finished rows.
        """

    def settle(self, seconds: dict[str, float]) -> None:  # noqa: B027 -- optional
        """Note how long the stages of the round took."""

    def finish(self, lengths: Sequence[int]) -> None:  # noqa: B027
        """Leave to later requests what this one has learned; each row has generated `lengths[r]` tokens."""


class DraftSpeculator(Speculator):
    """The draft proposes, `num_assistant_tokens` at most."""

    def propose(self, sequences: Sequences, room: int, watch: Stopwatch) -> Proposal:
        """Draft; see [`Speculator.propose`]."""
        k = max(min(int(self.drafter.num_assistant_tokens), room, self.drafter.room(sequences.ends)), 0)
        watch.lap("")
        proposal = self.drafter.propose(sequences.ids, sequences.ends, k)
        watch.lap("draft")
        return proposal

    def note(self, logits: torch.Tensor, tokens: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """Tell the draft; see [`Speculator.note`]."""
        self.drafter.note(logits, tokens, taken)
