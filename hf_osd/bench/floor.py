"""
The floor: what the forwards of a request cost with nothing between them.

A forward is priced by its shape, measured in the same run on the same models: preallocated inputs, a cache that is
filled beforehand and rolled back after every call, and no Python but the model's own. On the CPU, the cheaper of
transformers' dynamic cache (cropped back) and static cache (its length set back), each the median of several calls;
the models take turns where they did in the request: each finds the processor's caches full of the other's weights.
On CUDA, the replay of a captured graph over the static cache, which has the exact size that the shape needs.
"""

import inspect
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from ..demo.contenders import synchronize
from .shapes import Shape

CONTEXT_STEP = 64  # tokens; contexts are priced at the nearest multiple, so that a stream needs tens of prices
QUERY_STEP = 16  # tokens; the same for prompts, where each has a length of its own
_PATIENCE = 1.0  # seconds; a forward that takes longer than this in all is not repeated further ...
_FEWEST = 5  # ... than this often, two calls that do not count included


class Floor:
    """
    Prices of raw forwards, each measured when it is first asked for.

    Args:
        models (`Mapping[str, PreTrainedModel]`): `"target"` and `"draft"`, in eval mode.
        repeats (`int`, defaults to 9): Calls whose median is the price; fewer where each takes long.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel], repeats: int = 9) -> None:
        self._models = dict(models)
        self._repeats = repeats
        self._prices: dict[Shape, float] = {}

    def total(self, shapes: Counter[Shape]) -> float:
        """Return the seconds that some forwards cost at least, one after another."""
        return sum(count * self.seconds(shape) for shape, count in shapes.items())

    def seconds(self, shape: Shape) -> float:
        """Return the price of one forward, at the nearest shape that is priced."""
        shape = self.rounded(shape)
        if shape not in self._prices:
            before = self._other_forward(shape) if shape.turn else lambda: None
            self._prices[shape] = measure_forward(self._models[shape.model], shape, self._repeats, before)
        return self._prices[shape]

    def _other_forward(self, shape: Shape) -> Callable[[], Any]:
        """Return a forward of the other model, untimed, which comes before each timed one."""
        others = [name for name in self._models if name != shape.model]
        run, reset = dynamic_forward(self._models[others[0]], Shape(others[0], shape.batch, 1, CONTEXT_STEP, 1))
        return partial(_in_order, reset, run)

    def rounded(self, shape: Shape) -> Shape:
        """Return the shape that stands for this one in the table: never beyond the model's context."""
        queries = shape.queries if shape.queries <= QUERY_STEP else _nearest(shape.queries, QUERY_STEP)
        config = self._models[shape.model].config.get_text_config(decoder=True)
        longest = getattr(config, "max_position_embeddings", None) or 2**31
        queries = min(queries, longest)
        context = min(_nearest(shape.context, CONTEXT_STEP), longest - queries)
        keep = queries if shape.keep == shape.queries else shape.keep
        turn = shape.turn and len(self._models) > 1 and self._models[shape.model].device.type == "cpu"
        return replace(shape, queries=queries, context=context, keep=min(keep, queries), turn=turn)

    def table(self) -> list[dict[str, Any]]:
        """Return all prices so far, in milliseconds, ready for JSON."""
        fields = ("model", "batch", "queries", "context", "keep", "turn")
        rows = [
            {name: getattr(shape, name) for name in fields} | {"ms": round(1e3 * seconds, 4)}
            for shape, seconds in self._prices.items()
        ]
        return sorted(rows, key=lambda row: tuple(row[name] for name in fields))


def _nearest(value: int, step: int) -> int:
    return (value + step // 2) // step * step


@torch.no_grad()
def measure_forward(
    model: PreTrainedModel, shape: Shape, repeats: int, before: Callable[[], Any] = lambda: None
) -> float:
    """
    Return the seconds of one raw forward; see the module for what that is.

    Args:
        model (`PreTrainedModel`): The model, in eval mode.
        shape (`Shape`): What to feed.
        repeats (`int`): Calls, after two that do not count.
        before (`Callable`, *optional*): What runs, untimed, before each call on a CPU.
    """
    if model.device.type == "cuda":
        run, reset = static_forward(model, shape)
        return _median_seconds(_capture(run, reset), lambda: None, repeats, model.device)
    ways = (dynamic_forward(model, shape), static_forward(model, shape))

    return min(_median_seconds(run, partial(_in_order, reset, before), repeats, model.device) for run, reset in ways)


def _in_order(*steps: Callable[[], Any]) -> None:
    for step in steps:
        step()


def _median_seconds(run: Callable[[], Any], reset: Callable[[], None], repeats: int, device: torch.device) -> float:
    times: list[float] = []
    while len(times) < repeats + 2 and not (len(times) >= _FEWEST and sum(times) > _PATIENCE):
        reset()
        synchronize(device)
        start = perf_counter()
        run()
        synchronize(device)
        times.append(perf_counter() - start)
    return statistics.median(times[2:])


def dynamic_forward(model: PreTrainedModel, shape: Shape) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """Return a forward over a dynamic cache, and what rolls the cache back before it."""
    ids, cache = _random_ids(model, shape), DynamicCache(config=model.config)
    if shape.context:
        model(ids[:, : shape.context], past_key_values=cache, use_cache=True, **_keep_option(model, 1))
    new, options = ids[:, shape.context :].contiguous(), _keep_option(model, shape.keep)

    def reset() -> None:
        if shape.context == 0:
            cache.layers = DynamicCache(config=model.config).layers
        elif surplus := int(cache.get_seq_length()) - shape.context:
            cache.crop(-surplus)

    return lambda: model(new, past_key_values=cache, use_cache=True, **options).logits, reset


def static_forward(model: PreTrainedModel, shape: Shape) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """
    Return a forward over static buffers, and what rolls the cache back before it.

    The mask and the positions are given, as a serving loop would keep them, so that nothing in the forward waits for
    the device and a CUDA graph can hold it.
    """
    ids = _random_ids(model, shape)
    end = shape.context + shape.queries
    cache = StaticCache(config=model.config, max_cache_len=end)
    first = ids[:, : max(shape.context, 1)]  # at least one token, since it also allocates
    model(first, past_key_values=cache, use_cache=True, **_keep_option(model, 1))
    new = ids[:, shape.context :].contiguous()
    positions = torch.arange(shape.context, end, device=ids.device)
    mask = torch.arange(end, device=ids.device) <= positions[:, None]  # (queries, end)
    options = _keep_option(model, shape.keep) | {
        "attention_mask": _as_model_mask(model, mask.expand(shape.batch, 1, -1, -1).contiguous())
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = positions.expand(shape.batch, -1).contiguous()
    layers: list[Any] = cache.layers

    def reset() -> None:
        for layer in layers:
            layer.cumulative_length.fill_(shape.context)

    return lambda: model(new, past_key_values=cache, use_cache=True, **options).logits, reset


def _as_model_mask(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    if model.config._attn_implementation != "eager":
        return mask
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~mask, lowest)


def _capture(run: Callable[[], torch.Tensor], reset: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of `reset` and `run`: setting a length back is part of every static step."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            reset()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reset()
        run()
    return graph.replay


def _random_ids(model: PreTrainedModel, shape: Shape) -> torch.Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.context + shape.queries)
    return torch.randint(vocabulary, size, generator=generator).to(model.device)


def _keep_option(model: PreTrainedModel, keep: int) -> dict[str, Any]:
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    return {"logits_to_keep": keep}
