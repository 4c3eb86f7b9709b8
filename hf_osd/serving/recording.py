"""Turns the rounds of a request into observations: the target's distribution at each position of its output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..records import Observation, sparse_teacher
from .sequences import Sequences
from .states import TargetStates


@dataclass(frozen=True, slots=True)
class _Round:
    teacher_ids: torch.Tensor  # (batch, t, k)
    teacher_log_probs: torch.Tensor  # (batch, t, k)
    teacher_tail: torch.Tensor  # (batch, t)
    drafted: torch.Tensor  # (batch, t), -1 where nothing was drafted
    judged: list[int]
    right: list[int]
    taken: list[int]


class Recorder:
    """
    Collects the rounds of one batch, and makes an [`~hf_osd.records.Observation`] of each row at the end.

    It runs no forward, since the logits are those of the verification. Tensors stay on the target's device until the
    request is over, so that recording adds no synchronisation to a round.

    Args:
        top_k (`int`): Log-probabilities to keep at a position.
        rows (`Sequence[bool]`): Which rows to record.
        deliver (`Callable`): Takes each observation.
        states (`TargetStates`, *optional*): Hidden states of the target, for a draft that reads them.
    """

    def __init__(
        self,
        top_k: int,
        rows: Sequence[bool],
        deliver: Callable[[Observation], None],
        states: TargetStates | None = None,
    ) -> None:
        self._states = states
        self._top_k = top_k
        self._rows = list(rows)
        self._deliver = deliver
        self._rounds: list[_Round] = []

    def record(
        self,
        logits: torch.Tensor,
        drafted: torch.Tensor,
        judged: Sequence[int],
        right: Sequence[int],
        taken: Sequence[int],
    ) -> None:
        """
        Note one round.

        Args:
            logits (`torch.FloatTensor` of shape `(batch, q, vocab)`): The target's raw logits.
            drafted (`torch.LongTensor` of shape `(batch, k)`): The draft's tokens for the same positions.
            judged (`Sequence[int]`): How many of them the target judged: up to and including the first wrong one.
            right (`Sequence[int]`): How many it agreed with.
            taken (`Sequence[int]`): Tokens that each row kept.
        """
        width = max(taken)
        teacher = sparse_teacher(logits[:, :width], self._top_k)
        drafted = torch.nn.functional.pad(drafted, (0, max(width - drafted.shape[1], 0)), value=-1)[:, :width]
        self._rounds.append(_Round(*teacher, drafted, list(judged), list(right), list(taken)))

    def finish(self, sequences: Sequences) -> None:
        """Deliver an observation for every recorded row that produced anything."""
        rounds = [
            _Round(
                r.teacher_ids.cpu(),
                r.teacher_log_probs.cpu(),
                r.teacher_tail.cpu(),
                r.drafted.cpu(),
                r.judged,
                r.right,
                r.taken,
            )
            for r in self._rounds
        ]
        for row in range(sequences.batch):
            prompt_ids, output_ids = sequences.text(row)
            if self._rows[row] and len(output_ids):
                states = self._states_of(row, sequences.ends[row] - 1)
                observation = _observation(rounds, row, prompt_ids.cpu(), output_ids.cpu(), states)
                source = sequences.sources[row] if sequences.sources is not None else None
                self._deliver(observation if source is None else replace(observation, source_ids=source.cpu().clone()))

    def _states_of(self, row: int, end: int) -> torch.Tensor | None:
        """The states of a row in bfloat16: half the memory, with the range of float32."""
        return None if self._states is None else self._states.of(row, end).to("cpu", torch.bfloat16, copy=True)


def _observation(
    rounds: Sequence[_Round],
    row: int,
    prompt_ids: torch.Tensor,
    output_ids: torch.Tensor,
    states: torch.Tensor | None,
) -> Observation:
    def gather(name: str) -> torch.Tensor:
        return torch.cat([getattr(r, name)[row, : r.taken[row]] for r in rounds])[: len(output_ids)]

    def mark(name: str) -> torch.Tensor:
        return torch.cat([torch.arange(r.taken[row]) < getattr(r, name)[row] for r in rounds])[: len(output_ids)]

    return Observation(
        prompt_ids=prompt_ids.clone(),
        output_ids=output_ids.clone(),
        teacher_ids=gather("teacher_ids"),
        teacher_log_probs=gather("teacher_log_probs"),
        teacher_tail=gather("teacher_tail"),
        draft_ids=gather("drafted").masked_fill(~mark("judged"), -1),
        accepted=mark("right"),
        states=states,
    )
