"""What a request made the models compute: the shapes of all its forwards, in order, noted while it is timed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from hf_osd._caches import cache_of
from hf_osd.evaluation.contenders import Assisted, Contender, Generate
from hf_osd.serving.croppable_decoder import CroppableDecoder
from hf_osd.serving.decoder import Decoder, Parents, RaggedDecoder


@dataclass(frozen=True, slots=True)
class Shape:
    """
    One forward of one model.

    Attributes:
        model (`str`): `"target"` or `"draft"`.
        batch (`int`): Rows.
        queries (`int`): Tokens fed, per row.
        context (`int`): Tokens in the cache before them; of the longest row where rows differ.
        keep (`int`): Last positions that logits were computed for, in [1, queries].
    """

    model: str
    batch: int
    queries: int
    context: int
    keep: int

    @property
    def end(self) -> int:
        """Tokens in the cache behind it."""
        return self.context + self.queries


class ShapeRecorder(AbstractContextManager["ShapeRecorder"]):
    """
    Notes every forward of some models, prefills included, while it is open.

    A note is a tuple of numbers and takes a microsecond or two, so a request is timed meanwhile. A separate pass of
    the same request would not do: a drafter that learns, or that looks up earlier outputs, takes other forwards then.

    Args:
        models (`Mapping[str, PreTrainedModel]`): What to watch, by the name that its shapes get.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        self._models = dict(models)
        self._seen: list[tuple[str, int, int, int, int]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._watch(self._stack)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _watch(self, stack: ExitStack) -> None:
        """Start to note; what ends it goes onto the stack."""
        raise NotImplementedError

    def shapes(self) -> list[Shape]:
        """Return what was noted, in order."""
        return [
            Shape(name, batch, queries, context, min(keep, queries) or queries)  # 0 means all of them
            for name, batch, queries, context, keep in self._seen
        ]


class CallRecorder(ShapeRecorder):
    """
    Notes the calls of the models themselves, by forward pre-hooks: for transformers' own loops.

    Compiled code does not pass here.
    """

    def _watch(self, stack: ExitStack) -> None:
        for name, model in self._models.items():
            hook = _Note(name, self._seen)
            stack.callback(model.register_forward_pre_hook(hook, with_kwargs=True).remove)


class _Note:
    """A hook that notes what a model is called with."""

    def __init__(self, name: str, seen: list[tuple[str, int, int, int, int]]) -> None:
        self._name, self._seen = name, seen

    def __call__(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        cache = cache_of(kwargs)
        context = 0 if cache is None else int(cache.get_seq_length())
        self._seen.append((self._name, *ids.shape, context, int(kwargs.get("logits_to_keep") or 0)))


class FeedRecorder(ShapeRecorder):
    """
    Notes what our own engine feeds to its decoders.

    On CUDA these replay captured graphs, which no hook sees, and which a hook on the model would make them capture
    again. A prompt that is fed in chunks counts as one forward.
    """

    def _watch(self, stack: ExitStack) -> None:
        for kind in (RaggedDecoder, CroppableDecoder):
            stack.callback(setattr, kind, "feed", kind.feed)
            setattr(kind, "feed", self._noting(kind.feed))  # noqa: B010 -- a plain assignment to a method is refused

    def _noting(self, feed: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        names = {id(model): name for name, model in self._models.items()}

        def noting(
            decoder: Decoder, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Parents | None = None
        ) -> torch.Tensor:
            lag = max(end - cached for end, cached in zip(ends, decoder.cached, strict=True))
            longest = max(end - padding for end, padding in zip(ends, decoder.padding, strict=True))
            queries = max(lag, keep)
            self._seen.append((names[id(decoder.model)], len(ends), queries, max(longest - queries, 0), keep))
            return feed(decoder, ids, ends, keep, parents)

        return noting


def recorder_of(contender: Contender) -> ShapeRecorder:
    """Return what notes the forwards of a contender; of none, where no hook sees them or one would change them."""
    if isinstance(contender, Assisted):
        return FeedRecorder({"target": contender.target, "draft": contender.assistant.draft})
    if isinstance(contender, Generate):
        return CallRecorder(
            {"target": contender.target} | ({} if contender.draft is None else {"draft": contender.draft})
        )
    return CallRecorder(getattr(contender, "seen_models", {}))
