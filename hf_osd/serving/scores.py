"""The target's scores along the path that a row takes: read as a walk down the tree comes to them, and kept."""

from collections.abc import Sequence

import torch
from transformers.generation.logits_process import LogitsProcessor

from .processing import is_context_free, process
from .transfer import upload
from .verification import Places


class History:
    """
    Scores or logits of every generated token, where the user asked for them.

    Args:
        batch (`int`): Rows.
    """

    def __init__(self, batch: int) -> None:
        self._rows: list[list[torch.Tensor]] = [[] for _ in range(batch)]  # (taken, vocab) each

    def append(self, values: torch.Tensor, taken: Sequence[int]) -> None:
        """Keep the first `taken[r]` positions of each row of `values`, shape `(batch, q, vocab)`."""
        for row, count in enumerate(taken):
            self._rows[row].append(values[row, :count].clone())

    def columns(self, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return `(batch, vocab)` for each generated column; row r holds zeros behind its first `lengths[r]`."""
        rows = [torch.cat(row)[:length] for row, length in zip(self._rows, lengths, strict=True)]
        padded = [torch.nn.functional.pad(row, (0, 0, 0, max(lengths) - len(row))) for row in rows]
        return torch.stack(padded).unbind(1)


class PathScores:
    """
    The target's processed scores, read where a walk down the trees comes to.

    Processors see the texts that plain decoding would show them, and no others: of a tree, the path that is accepted.

    Args:
        processors (`Sequence[LogitsProcessor]`): In order.
        ids (`torch.LongTensor` of shape `(batch, columns)`): The token buffer. The path is written to it.
        starts (`Sequence[int]`): The column behind the text of each row.
        logits (`torch.FloatTensor` of shape `(batch, n + 1, vocab)`): Behind the text, and behind each node.
        keep (`bool`): Whether all that is read is kept.
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        ids: torch.Tensor,
        starts: Sequence[int],
        logits: torch.Tensor,
        keep: bool,
    ) -> None:
        self._processors, self._ids, self._starts, self._logits = processors, ids, starts, logits
        self._writes = not is_context_free(processors)
        self._keep = keep
        self._read: list[tuple[list[int], torch.Tensor]] = []  # by depth

    def __call__(self, places: Places) -> torch.Tensor:
        """Read at some places; see [`~hf_osd.serving.verification.ReadScores`]."""
        lengths = [self._starts[row] + places.depth for row in places.rows]
        if self._writes and places.last:
            columns = [length - 1 for length in lengths]
            self._ids[places.rows, columns] = upload(places.last, self._ids.device)
        logits = self._logits[places.rows, [nodes[0] + 1 for nodes in places.nodes]]  # (rows, vocab)
        scores = process(self._processors, self._ids, logits, places.rows, lengths)
        if self._keep:
            self._read.append((places.rows, scores))
        return scores

    @property
    def kept(self) -> torch.Tensor | None:
        """What was read, `(batch, depths, vocab)`; zeros behind the end of a row's path. `None` if it is not kept."""
        if not self._keep:
            return None
        found = self._logits.new_zeros(len(self._logits), len(self._read), self._logits.shape[2])
        for depth, (rows, scores) in enumerate(self._read):
            found[rows, depth] = scores
        return found


def along(paths: Sequence[Sequence[int]], values: torch.Tensor) -> torch.Tensor:
    """Pick from `(batch, n + 1, vocab)` the positions of each path, the text's end first; short rows are padded."""
    longest = max(map(len, paths))
    places = [[0, *(node + 1 for node in path), *[0] * (longest - len(path))] for path in paths]
    rows = torch.arange(len(paths), device=values.device)[:, None]
    return values[rows, torch.tensor(places, device=values.device)]
