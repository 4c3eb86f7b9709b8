"""The decoder of a draft with another tokenizer: it is fed the target's tokens, and scores those that both have."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..drafts.translation import Translation
from .decoder import Decoder, Parents
from .transfer import upload


class _Text:
    """
    One row as the draft reads it.

    Attributes:
        tokens (`list[int]`): The draft's tokens.
        marks (`list[int]`): How many of them stand for the first 0, 1, 2, ... tokens of the target.
        start (`int`): The first of them that is fed; those before it are forgotten.
    """

    def __init__(self, begins: Sequence[int]) -> None:
        self.tokens, self.marks, self.start = list(begins), [len(begins)], 0

    def extend(self, run: Sequence[int]) -> None:
        """Append one token of the target."""
        self.tokens += run
        self.marks.append(len(self.tokens))

    def cut(self, count: int) -> None:
        """Forget all but the first `count` tokens of the target."""
        del self.marks[count + 1 :]
        del self.tokens[self.marks[-1] :]

    @property
    def columns(self) -> int:
        """Columns that the text takes of the draft's buffer."""
        return max(len(self.tokens) - self.start, 0)


class TranslatingDecoder(Decoder):
    """
    Speaks the target's tokens, on a decoder of the draft.

    Rows differ in how many of the draft's tokens spell them, so each begins in the first column of a buffer of its
    own. A text that outgrows this buffer, or the draft's context, goes on with its latter half.

    Args:
        model (`PreTrainedModel`): The draft, in eval mode.
        translation (`Translation`): How it reads the target's tokens.
        make (`Callable[[], Decoder]`): Makes the draft's own decoder, without padding.
        padding (`Sequence[int]`): Padding columns of each row, as the target is fed.
        columns (`int`): Columns of the draft's buffer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        translation: Translation,
        make: Callable[[], Decoder],
        padding: Sequence[int],
        columns: int,
    ) -> None:
        super().__init__(model, padding, columns)
        self.vocabulary = translation.targets.to(self._device)
        self._drafts = translation.drafts.to(self._device)
        self._translation, self._make, self._inner = translation, make, make()
        self._texts = [_Text(translation.begins) for _ in padding]
        self._ids = torch.zeros(len(padding), columns, dtype=torch.long, device=self._device)
        self._ids[:, : len(translation.begins)] = upload(translation.begins, self._device)

    def feed(self, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Parents | None = None) -> torch.Tensor:
        """Feed tokens of the target, and score what may follow them; see [`Decoder.feed`]."""
        assert keep == 1, "a draft is asked for one token at a time"
        assert parents is None, "a draft is fed chains"
        start = min(self.cached)
        read = ids[:, start : max(ends)].tolist()  # the host waits here, once for all rows
        for row, (first, end) in enumerate(zip(self.cached, ends, strict=True)):
            if first < end:
                self._read(row, read[row][first - start : end - start])
        self.cached = list(ends)
        return self._inner.feed(self._ids, self._columns, keep)[..., self._drafts]

    @property
    def _columns(self) -> list[int]:
        return [text.columns for text in self._texts]

    def _read(self, row: int, tokens: Sequence[int]) -> None:
        text, room = self._texts[row], self._ids.shape[1]
        first = len(text.tokens)
        for token in tokens:
            text.extend(self._translation.run(token) if len(text.marks) > 1 else self._translation.first(token))
        if first < text.start or text.columns > room:
            first = text.start = max(len(text.tokens) - room // 2, 0)
            self._inner.release()
            self._inner = self._make()
        self._ids[row, first - text.start : text.columns] = upload(text.tokens[first:], self._device)

    def rollback(self, ends: Sequence[int]) -> None:
        """Forget tokens of the target, and what the draft has read for them; see [`Decoder.rollback`]."""
        for text, end, pad in zip(self._texts, ends, self.padding, strict=True):
            text.cut(end - pad)
        self.cached = [min(cached, end) for cached, end in zip(self.cached, ends, strict=True)]
        self._inner.rollback(self._columns)

    def export(self) -> Cache:
        """The draft's own cache; see [`Decoder.export`]."""
        return self._inner.export()

    def release(self, failed: bool = False) -> None:
        """Leave the draft's own cache to later calls; see [`Decoder.release`]."""
        self._inner.release(failed)
