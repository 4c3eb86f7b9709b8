"""The tokens of a batch while it is decoded: a left-padded buffer, and the end of each row in it."""

from collections.abc import Iterator, Sequence

import torch

from .transfer import upload


class Sequences:
    """
    Rows of different lengths in one buffer, in the layout that transformers' processors and criteria expect.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(batch, prompt)`): Left-padded prompts.
        padding (`Sequence[int]`): Padding columns of each row.
        max_length (`int`): Columns after which every row ends, prompt and padding included.
        slack (`int`): Columns beyond `max_length` for proposals of rows that are nearly done.
        pad_token_id (`int`): What stands behind the end of a finished row.
        eos_token_ids (`Sequence[int]`): Tokens that end a row.
        pads (`bool`, *optional*): Whether a row ends where a criterion stops it, and is padded from there on. If not,
            it goes on until every row has stopped, as in transformers' own loop. Defaults to whether there are
            `eos_token_ids`.
        sources (`Sequence[torch.LongTensor]`, *optional*): What an encoder has read for each row, where that is text;
            1D each.
    """

    def __init__(
        self,
        prompt_ids: torch.Tensor,
        padding: Sequence[int],
        max_length: int,
        slack: int,
        pad_token_id: int,
        eos_token_ids: Sequence[int] = (),
        pads: bool | None = None,
        sources: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.batch, self.prompt_length = prompt_ids.shape
        self.padding = list(padding)
        self.pad_token_id = pad_token_id
        self.sources = sources
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pads = bool(eos_token_ids) if pads is None else pads
        self.limit = max_length  # falls to the last stop once all rows have stopped
        self.ends = [self.prompt_length] * self.batch  # column behind the last committed token of each row
        self.stops: list[int | None] = [None] * self.batch  # the end of each row, once it is known
        self.ids = torch.full(
            (self.batch, max_length + slack), pad_token_id, dtype=torch.long, device=prompt_ids.device
        )  # (batch, columns)
        self.ids[:, : self.prompt_length] = prompt_ids

    def is_active(self, row: int) -> bool:
        """Say whether a row still takes tokens."""
        stopped = self.stops[row] is not None and self.pads
        return self.ends[row] < self.limit and not stopped

    @property
    def finished(self) -> bool:
        """Whether no row takes any more tokens."""
        return not any(self.is_active(row) for row in range(self.batch))

    @property
    def budget(self) -> int:
        """The most tokens that any active row may still take."""
        return max((self.limit - self.ends[row] for row in range(self.batch) if self.is_active(row)), default=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has generated."""
        return [end - self.prompt_length for end in self.ends]

    def propose(self, tokens: torch.Tensor) -> None:
        """Write a proposal of shape `(batch, k)` behind each row's end, without moving the ends."""
        if self.batch == 1:
            self.ids[:, self.ends[0] : self.ends[0] + tokens.shape[1]] = tokens
        else:
            self.ids.scatter_(1, self._columns(self.ends, tokens.shape[1]), tokens)

    def _columns(self, starts: Sequence[int], count: int) -> torch.Tensor:
        offsets = torch.arange(count, device=self.ids.device)
        return upload(starts, self.ids.device)[:, None] + offsets  # (batch, count)

    def commit(self, tokens: Sequence[Sequence[int]], in_place: bool = True) -> list[int]:
        """
        Append tokens to the active rows, each up to its first eos token and the limit.

        Args:
            tokens (`Sequence[Sequence[int]]`): For each row, the tokens the target settled on.
            in_place (`bool`, defaults to `True`): Whether all but the last are in the buffer already, as the accepted
                part of a proposal that was a chain.

        Returns:
            `list[int]`: How many tokens each row took; 0 for rows that were finished.
        """
        taken = [self._taken(row, tokens[row]) for row in range(self.batch)]
        rows = [row for row in range(self.batch) if taken[row]]
        self._write(rows, tokens, taken, in_place)
        for row in rows:
            self.ends[row] += taken[row]
            if tokens[row][taken[row] - 1] in self.eos_token_ids:
                self.stops[row] = self.ends[row]
        return taken

    def _write(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], taken: Sequence[int], only_last: bool
    ) -> None:
        steps = [(row, step) for row in rows for step in range(taken[row] - 1 if only_last else 0, taken[row])]
        columns = [self.ends[row] + step for row, step in steps]
        values = [tokens[row][step] for row, step in steps]
        if self.batch == 1:  # scalars need no index tensors
            for column, value in zip(columns, values, strict=True):
                self.ids[0, column] = value
            return
        index = upload([*(row for row, _ in steps), *columns, *values], self.ids.device).view(3, -1)  # (3, tokens)
        self.ids[index[0], index[1]] = index[2]

    def _taken(self, row: int, tokens: Sequence[int]) -> int:
        if not self.is_active(row):
            return 0
        room = min(len(tokens), self.limit - self.ends[row])
        ended = (index + 1 for index in range(room) if tokens[index] in self.eos_token_ids)
        return next(ended, room)

    def stop(self, row: int, column: int) -> None:
        """End a row at a column that a stopping criterion chose; later tokens of the row are dropped."""
        self.stops[row] = column
        if self.pads:
            self.ends[row] = column

    def settle(self) -> None:
        """Once every row has stopped, let the last stop be the end of all: see `pads` above."""
        stops = [stop for stop in self.stops if stop is not None]
        if len(stops) == self.batch:
            self.limit = max(stops)
            self.ends = [min(end, self.limit) for end in self.ends]

    def text(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a row's prompt and output, without padding; 1D each."""
        ids = self.ids[row]
        return ids[self.padding[row] : self.prompt_length], ids[self.prompt_length : self.ends[row]]

    def padded(self, end: int) -> torch.Tensor:
        """Return the first `end` columns of the buffer, padded behind the end of each row: `(batch, end)`."""
        columns = torch.arange(end, device=self.ids.device)
        behind = columns >= torch.tensor(self.ends, device=self.ids.device)[:, None]
        return self.ids[:, :end].masked_fill(behind, self.pad_token_id)

    def finished_columns(self, start: int) -> Iterator[torch.Tensor]:
        """Yield the columns from `start` on that no row will change any more, each `(batch,)`, as a streamer wants."""
        settled = [end for row, end in enumerate(self.ends) if self.is_active(row)]
        end = min(settled, default=max(self.ends))
        if start < end:
            yield from self.padded(end)[:, start:].unbind(1)
