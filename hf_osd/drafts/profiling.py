"""
Measures what a forward costs at the shapes of serving: a few tokens for each row, behind a cached context.

Only the forward is timed. Captured graphs and compiled models are passed as functions. Not covered: the pass over the
prompt, which comes once.
"""

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from .._caches import cache_argument, show_windows_only
from .._compat import execution_device
from ..config import shown
from ..errors import HfOsdError, InputError
from .machine import describe_machine, describe_model, digest, synchronize
from .profiles import Cost, Profile, Shape, kept_path, shapes_of

logger = logging.get_logger(__name__)

BATCHES = (1, 4)
CONTEXTS = (128, 512)
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
REPEATS = 11

Forward = Callable[[], Any]
Prepare = Callable[[int, int, int], Forward]
"""Makes a forward for a batch, a context and a number of tokens, to be run and timed repeatedly."""


def profile(
    model: PreTrainedModel | Prepare,
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    lengths: Sequence[int] = LENGTHS,
    repeats: int = REPEATS,
    device: torch.device | None = None,
    use_cache: bool = True,
) -> Profile:
    """
    Measure how long the forwards of a model take, or those of any function.

    Every shape is run once to warm up, then once in each of `repeats` rounds, in another order each time, so that a
    machine that slows down meanwhile slows all of them. A model is measured in eval mode, without gradients, on
    transformers' dynamic cache, which each forward first crops back to the context.

    Args:
        model (`PreTrainedModel` or `Callable[[int, int, int], Callable[[], Any]]`):
            A decoder-only model, where it is going to run; or a function that is called with batch, context and tokens
            for every shape, and returns what is timed.
        batches (`Sequence[int]`, defaults to `(1, 4)`): Rows.
        contexts (`Sequence[int]`, defaults to `(128, 512)`): Tokens of each row in the cache.
        lengths (`Sequence[int]`, defaults to `(1, 2, 3, 4, 5, 6, 8, 12, 16)`): Tokens fed to each row.
        repeats (`int`, defaults to 11): Measurements of each shape, at least 2.
        device (`torch.device`, *optional*): Whose queue to wait for; defaults to the model's, and for a function to
            the CPU.
        use_cache (`bool`, defaults to `True`): Whether to return what an earlier run has measured here of a model of
            the same kind. A measurement is kept in either case, that of a function in neither.

    Returns:
        [`Profile`]: Median and quartiles of each shape.

    Raises:
        InputError: A shape is empty, `repeats` is below 2, or the model has fewer positions than a shape needs.

    Example:

    ```python
    >>> costs = profile(target)
    >>> costs.seconds(batch=1, context=200, tokens=5)
    0.0443
    ```
    """
    shapes = _checked(shapes_of(batches, contexts, lengths), repeats)
    if not isinstance(model, PreTrainedModel):
        device = device or torch.device("cpu")
        return Profile(describe_machine(device), _measure(model, shapes, repeats, device))
    _check_positions(model, shapes)
    about = describe_model(model)
    path = kept_path(digest([about, shapes, repeats]))
    known = _kept(path) if use_cache else None
    if known is not None:
        return known
    with _evaluating(model):
        costs = _measure(_Forwards(model).prepare, shapes, repeats, device or execution_device(model))
    found = Profile(about, costs)
    _keep(found, path)
    return found


def _checked(shapes: list[Shape], repeats: int) -> list[Shape]:
    if not shapes or any(batch < 1 or context < 0 or tokens < 1 for batch, context, tokens in shapes):
        raise InputError(f"a shape needs at least one row, and at least one token fed to it, got {shown(shapes)}")
    if repeats < 2:
        raise InputError(f"repeats must be at least 2, for a spread, got {shown(repeats)}")
    return shapes


def _check_positions(model: PreTrainedModel, shapes: Sequence[Shape]) -> None:
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(context + tokens for _, context, tokens in shapes)
    if room is not None and longest > room:
        raise InputError(f"{type(model).__name__} has {room} positions, and the longest shape needs {longest}")


def _kept(path: Any) -> Profile | None:
    try:
        return Profile.load(path) if path.is_file() else None
    except (HfOsdError, OSError) as error:
        logger.warning(f"A profile cannot be read and is measured again: {error}")
        return None


def _keep(found: Profile, path: Any) -> None:
    try:
        found.save(path)
    except OSError as error:
        logger.warning(f"A profile cannot be kept, so the next run measures again: {error}")


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def _measure(prepare: Prepare, shapes: Sequence[Shape], repeats: int, device: torch.device) -> tuple[Cost, ...]:
    forwards = {shape: prepare(*shape) for shape in shapes}
    seconds: dict[Shape, list[float]] = {shape: [] for shape in shapes}
    for shape in _shown(_order(shapes, repeats + 1)):
        seconds[shape].append(_timed(forwards[shape], device))
    return tuple(_cost(shape, found[1:]) for shape, found in seconds.items())  # the first one has warmed up


def _order(shapes: Sequence[Shape], rounds: int) -> list[Shape]:
    """Return all shapes, again in each round, in an order that is random and always the same."""
    generator = random.Random(0)
    return [shape for _ in range(rounds) for shape in generator.sample(shapes, len(shapes))]


def _shown(order: list[Shape]) -> Iterable[Shape]:
    """Show a bar on a terminal, unless transformers' progress bars are off."""
    shown: Iterable[Shape] = logging.tqdm(order, desc="profile", leave=False, disable=None)  # None: off elsewhere
    return shown


def _timed(forward: Forward, device: torch.device) -> float:
    synchronize(device)
    start = perf_counter()
    forward()
    synchronize(device)
    return perf_counter() - start


def _cost(shape: Shape, seconds: Sequence[float]) -> Cost:
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return Cost(*shape, seconds=median(seconds), low=low, high=high)


class _Forwards:
    """Makes the forwards of a model; those of one batch and context share a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._device = execution_device(model)
        self._config = model.config.get_text_config(decoder=True)
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._caches: dict[tuple[int, int], DynamicCache] = {}

    def prepare(self, batch: int, context: int, tokens: int) -> Forward:
        """See [`Prepare`]."""
        if (batch, context) not in self._caches:
            self._caches[batch, context] = self._filled(batch, context)
        cache, ids = self._caches[batch, context], self._ids(batch, tokens)

        def forward() -> None:
            if cache.get_seq_length():
                cache.crop(context - cache.get_seq_length())  # by 0 too: it bounds windows
            self._run(ids, cache)

        return forward

    def _filled(self, batch: int, context: int) -> DynamicCache:
        cache = DynamicCache(config=self._config)
        cache.activate_past_recording()  # windows, too, are cropped back
        show_windows_only(cache)
        if context:
            keep = {"logits_to_keep": 1} if "logits_to_keep" in self._parameters else {}
            self._run(self._ids(batch, context), cache, **keep)
        return cache

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self._config.vocab_size, (batch, tokens), generator=generator).to(self._device)

    def _run(self, ids: torch.Tensor, cache: DynamicCache, **keep: int) -> None:
        self._model(input_ids=ids, use_cache=True, **cache_argument(self._parameters, cache), **keep)
