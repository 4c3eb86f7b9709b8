"""Batches cut by rows, so that learning can give way in between. Not covered: a row that takes long by itself."""

from collections.abc import Iterator

import torch

# Seconds of one backward pass beside serving: little for a request that has to wait, much beside its own overhead.
_LONGEST = 0.01


class BatchParts:
    """
    Cuts batches into parts of as many rows as can be learned from in about 10 ms: a GPU takes many of them at once.

    Args:
        max_rows (`int`): Rows of a part, at most.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._rows = 1

    def of(self, batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """
        Cut a batch of `ObservationCollator`; rows with nothing to learn from may be left out.

        Args:
            batch (`dict[str, torch.Tensor]`): The batch.

        Returns:
            `Iterator[dict[str, torch.Tensor]]`: Smaller batches, without the columns that only other rows need. The
            size of each is chosen when it is asked for.
        """
        start, end = 0, len(batch["learn_mask"])
        while start < end:
            rows = {
                name: tensor if name == "vocabulary" else tensor[start : start + self._rows]
                for name, tensor in batch.items()
            }
            start += self._rows
            if bool(rows["learn_mask"].any()):
                yield _trimmed(rows)

    def fit(self, seconds: float) -> None:
        """Halve parts that take too long, and double them where there is room."""
        if seconds > _LONGEST:
            self._rows = max(1, self._rows // 2)
        elif seconds < _LONGEST / 2:
            self._rows = min(2 * self._rows, self._max_rows)


def _trimmed(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first_input = int(rows["attention_mask"].any(0).int().argmax())  # of (rows, time)
    first_learned = int(rows["learn_mask"].any(0).int().argmax())  # of (rows, verified)
    begins = {name: first_learned for name in rows if name.startswith(("teacher", "learn"))}
    begins |= dict.fromkeys(("input_ids", "attention_mask", "position_ids", "states"), first_input)
    return {name: tensor[:, begins[name] :] if name in begins else tensor for name, tensor in rows.items()}
