"""The target's hidden states of one batch, by column of the token buffer, for a draft that reads them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafts.states import StateTap
from .transfer import upload


class TargetStates:
    """
    Hidden states of the tokens that a target has read.

    The states of a rejected token are overwritten by those of the token that takes its place. Columns that the target
    has not read in this call, such as those of a caller's cache, are zeros.

    Args:
        target (`PreTrainedModel`): The target.
        layers (`Sequence[int]`): See [`~hf_osd.drafts.states.StateTap`].
        padding (`Sequence[int]`): Padding columns of each row.
        columns (`int`): Columns of the token buffer.

    Attributes:
        known (`bool`): Whether the target has read the prompt.
        layers (`tuple[int, ...]`): As given.
    """

    def __init__(self, target: PreTrainedModel, layers: Sequence[int], padding: Sequence[int], columns: int) -> None:
        self.known = False
        self.layers = tuple(layers)
        self._tap = StateTap.of(target, layers)
        self._padding = list(padding)
        self._columns = columns
        self._values = torch.empty(0)  # (batch, columns + 1, size): column c lies at c + 1

    def read(self, forward: Callable[[], Any]) -> tuple[Any, torch.Tensor]:
        """See [`~hf_osd.drafts.states.StateTap.read`]; what it reads is kept by [`write`]."""
        return self._tap.read(forward)

    def write(self, states: torch.Tensor, ends: Sequence[int]) -> None:
        """
        Store the states of a pass.

        Args:
            states (`torch.Tensor` of shape `(batch, q, size)`): Those of the last q columns of each row.
            ends (`Sequence[int]`): Column behind each row's last one.
        """
        if not self._values.numel():
            self._values = states.new_zeros(len(states), self._columns + 1, states.shape[-1])
        self.known, q = True, states.shape[1]
        if len(ends) == 1:
            count = min(q, ends[0])
            self._values[0, ends[0] - count + 1 : ends[0] + 1] = states[0, -count:]
            return
        columns = upload(ends, states.device)[:, None] + torch.arange(1 - q, 1, device=states.device)
        rows = torch.arange(len(ends), device=states.device)[:, None]
        self._values[rows, columns.clamp(min=0)] = states

    def move(self, rows: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move the states of some columns to others of their rows."""
        self._values[list(rows), [column + 1 for column in targets]] = self._values[
            list(rows), [column + 1 for column in sources]
        ]

    def before(
        self, columns: torch.Tensor, positions: torch.Tensor, rows: Sequence[int] | None = None
    ) -> torch.Tensor:
        """
        Return the states of the token before each of some tokens.

        Args:
            columns (`torch.LongTensor` of shape `(batch, q)`): Columns of these tokens.
            positions (`torch.LongTensor` of shape `(batch, q)`): Their positions; before position 0 the states are
                zeros.
            rows (`Sequence[int]`, *optional*): Whose they are; defaults to all rows in their order.

        Returns:
            `torch.Tensor` of shape `(batch, q, size)`: On the target's device.
        """
        device = self._values.device
        columns, positions = columns.to(device), positions.to(device)
        places = torch.arange(len(columns), device=device) if rows is None else upload(rows, device)
        found = self._values[places[:, None], columns.clamp(0, self._columns)]
        return found.masked_fill_((positions <= 0)[..., None], 0.0)

    def of_rows(self, rows: Sequence[int]) -> "StatesOfRows":
        """Return what a draft reads that serves only some of the rows."""
        return StatesOfRows(self, rows)

    def of(self, row: int, end: int) -> torch.Tensor:
        """Return the states of a row's tokens up to a column, without its padding: `(tokens, size)`."""
        return self._values[row, self._padding[row] + 1 : end + 1]


class StatesOfRows:
    """The states of some rows of a batch, for a draft that serves these alone; see [`TargetStates.before`]."""

    def __init__(self, states: TargetStates, rows: Sequence[int]) -> None:
        self._states, self._rows = states, list(rows)

    def before(self, columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the states of the token before each of some tokens; see [`TargetStates.before`]."""
        return self._states.before(columns, positions, self._rows)
