"""Recorded requests as padded batches. Not covered: padding to fixed sizes, for compiled training."""

import torch

from ..records import Observation


def teaches(observation: Observation, positions: str, known: int | None = None) -> bool:
    """Whether a request has any of the `positions` to learn from; see [`ObservationCollator`]."""
    chosen = observation.rejected if positions == "rejected" else torch.ones_like(observation.rejected)
    return bool((chosen & _is_known(observation.teacher_ids, known)).any())


def _is_known(teacher_ids: torch.Tensor, known: int | None) -> torch.Tensor:
    """Where a teacher names any token that the draft knows; of shape `(...)`, given `(..., k)`."""
    return (teacher_ids < known).any(-1) if known is not None else torch.ones_like(teacher_ids[..., 0]).bool()


class ObservationCollator:
    """
    Pads requests to one batch, right-aligned, so that the positions to learn from are the last ones of every row.

    Args:
        max_length (`int`): Tokens of a request, its end, that are kept.
        positions (`str`): `"all"` positions that the target verified, or the `"rejected"` ones.
        known (`int`, *optional*): Tokens that the draft knows. Where the teacher names none of them, there is nothing
            to learn. Defaults to counting every position.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `position_ids` of shape `(batch, time)`;
        `teacher_ids` and `teacher_log_probs` of shape `(batch, verified, k)`, `teacher_tail` and the bool `learn_mask`
        of shape `(batch, verified)`: what the last `verified` inputs have to predict, and where that counts.
    """

    def __init__(self, max_length: int, positions: str, known: int | None = None) -> None:
        self.max_length = max_length
        self.positions = positions
        self.known = known

    def __call__(self, observations: list[Observation]) -> dict[str, torch.Tensor]:
        """Pad a batch; see the class."""
        inputs = [self._inputs(observation) for observation in observations]
        verified = [min(len(o.output_ids), len(ids)) for o, ids in zip(observations, inputs, strict=True)]
        batch = self._pad_inputs(inputs)
        size, width = len(observations), max(verified)
        k = min(observation.teacher_ids.shape[1] for observation in observations)
        batch["teacher_ids"] = torch.zeros(size, width, k, dtype=torch.long)
        batch["teacher_log_probs"] = torch.zeros(size, width, k)
        batch["teacher_tail"] = torch.zeros(size, width)
        batch["learn_mask"] = torch.zeros(size, width, dtype=torch.bool)
        for row, (observation, count) in enumerate(zip(observations, verified, strict=True)):
            self._fill_teacher(batch, row, observation, count, k)
        batch["learn_mask"] &= _is_known(batch["teacher_ids"], self.known)
        return batch

    def _inputs(self, observation: Observation) -> torch.Tensor:
        # Nothing is predicted after the last token, so it is no input.
        return torch.cat((observation.prompt_ids, observation.output_ids))[:-1][-self.max_length :]

    @staticmethod
    def _pad_inputs(inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        shape = (len(inputs), max(len(ids) for ids in inputs))
        batch = {
            name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "position_ids")
        }
        for row, ids in enumerate(inputs):
            start = shape[1] - len(ids)
            batch["input_ids"][row, start:] = ids
            batch["attention_mask"][row, start:] = 1
            batch["position_ids"][row, start:] = torch.arange(len(ids))
        return batch

    def _fill_teacher(
        self, batch: dict[str, torch.Tensor], row: int, observation: Observation, count: int, k: int
    ) -> None:
        width = batch["learn_mask"].shape[1]
        where = (row, slice(width - count, width))
        log_probs = observation.teacher_log_probs[-count:].float()
        batch["teacher_ids"][where] = observation.teacher_ids[-count:, :k]
        batch["teacher_log_probs"][where] = log_probs[:, :k]
        # Requests recorded with a larger k fold what is cut off into the tail.
        batch["teacher_tail"][where] = observation.teacher_tail[-count:].float() + log_probs[:, k:].exp().sum(-1)
        batch["learn_mask"][where] = observation.rejected[-count:] if self.positions == "rejected" else True
