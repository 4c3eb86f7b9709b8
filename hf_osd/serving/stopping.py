"""transformers' stopping criteria over rows that commit several tokens at once."""

from collections.abc import Sequence

import torch
from transformers.generation import stopping_criteria as sc
from transformers.generation.stopping_criteria import StoppingCriteria

from .sequences import Sequences

# The loop itself enforces these: eos and length token by token as it commits.
_BUILT_IN: tuple[type, ...] = (sc.EosTokenCriteria, sc.MaxLengthCriteria)


class StopCheck:
    """
    Asks each criterion after every token, as token-by-token decoding would, and ends rows at the first yes.

    Args:
        criteria (`Sequence[StoppingCriteria]`): Everything that `generate` built or the user gave.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria]) -> None:
        self._criteria = [criterion for criterion in criteria if type(criterion) not in _BUILT_IN]

    @property
    def asks(self) -> bool:
        """Whether there is any criterion beyond eos and length."""
        return bool(self._criteria)

    def __call__(
        self, sequences: Sequences, taken: Sequence[int], scores: tuple[torch.Tensor, ...] | None
    ) -> list[int]:
        """
        Check the tokens that were just committed.

        Args:
            sequences (`Sequences`): The batch, after the commit; rows are ended in place.
            taken (`Sequence[int]`): Tokens that each row has just taken.
            scores (`tuple[torch.FloatTensor]`, *optional*): Scores of shape `(batch, vocab)` for each generated
                column so far, where the user asked for them.

        Returns:
            `list[int]`: Tokens that each row keeps, at most `taken`.
        """
        if self._criteria:
            ends = list(sequences.ends)
            starts = [end - count for end, count in zip(ends, taken, strict=True)]
            fresh = {length for start, end in zip(starts, ends, strict=True) for length in range(start + 1, end + 1)}
            for length in sorted(fresh):
                rows = [row for row in range(sequences.batch) if starts[row] < length <= sequences.ends[row]]
                self._check(sequences, length, rows, scores)
            taken = [min(end, sequences.ends[row]) - starts[row] for row, end in enumerate(ends)]
        sequences.settle()
        return list(taken)

    def _check(
        self, sequences: Sequences, length: int, rows: Sequence[int], scores: tuple[torch.Tensor, ...] | None
    ) -> None:
        if not rows:
            return
        seen = scores[: length - sequences.prompt_length] if scores is not None else None
        ids = sequences.ids[:, :length]
        stopped = self._votes(ids, seen)
        for row in rows:
            stop = sequences.stops[row]
            if stopped[row] and (stop is None or length < stop):
                sequences.stop(row, length)

    def _votes(self, ids: torch.Tensor, scores: tuple[torch.Tensor, ...] | None) -> list[bool]:
        votes = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for criterion in self._criteria:
            votes = votes | torch.as_tensor(criterion(ids, scores), device=ids.device)
        return list(votes.tolist())
