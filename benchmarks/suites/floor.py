"""
The floor: what the forwards of a request cost with nothing between them.

The forwards that a request took are run again, in their order, right after it: the same models, rows, tokens fed,
tokens cached and positions with logits. Everything they read is prepared before the clock starts: tokens, positions,
masks, and a cache of buffers that each forward writes at its place and reads up to there, so that rolling back is
nothing. No host work is left but the loop and the models' own. On CUDA the forwards are replays of captured graphs,
prompts apart.

Not covered: models that hf_osd serves on transformers' own cache, such as windows that a request outgrows.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_osd._caches import cache_argument
from hf_osd._compat import attention_implementation
from hf_osd.evaluation.contenders import Contender, Sample, timed
from hf_osd.evaluation.encoding import Inputs
from hf_osd.evaluation.race import Race
from hf_osd.serving.choice import attention_span, holds_ragged_cache
from hf_osd.serving.decoder import context_length

from .shapes import Shape, recorder_of

_CAPACITY_STEP = 256  # positions: requests of similar length share buffers
_CONTEXT_STEP = 64  # tokens; a captured forward stands for its neighbours, so that a stream needs tens of graphs
_CAPTURED_QUERIES = 32  # prompts, which are longer, are worth no graph: each has a length of its own

REPLAYED = 16  # requests of a race whose forwards are replayed: a replay takes about as long as its request

Forward = Callable[[], Any]


class Floor:
    """
    Replays the forwards of requests.

    Args:
        models (`Mapping[str, PreTrainedModel]`): `"target"` and `"draft"`, in eval mode.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        self._models = dict(models)
        self._raw: dict[str, RawModel] = {}
        self._is_ragged: dict[str, bool] = {}

    @torch.no_grad()
    def seconds(self, shapes: Sequence[Shape]) -> float | None:
        """
        Return the wall time of some forwards, one after another; `None` where they cannot be replayed.

        Args:
            shapes (`Sequence[Shape]`): The forwards of one request, in order.
        """
        longest: dict[str, int] = {}
        for shape in shapes:
            longest[shape.model] = max(shape.end, longest.get(shape.model, 0))
        same_rows = len({shape.batch for shape in shapes}) == 1
        if not same_rows or not all(self._is_covered(name, end) for name, end in longest.items()):
            return None
        for name, end in longest.items():
            self._make_room(name, shapes[0].batch, end)
        forwards = [self._raw[shape.model].forward(shape) for shape in shapes]
        return timed(lambda: _run_all(forwards), self._models[shapes[0].model].device)[1]

    def _is_covered(self, name: str, longest: int) -> bool:
        model = self._models[name]
        if name not in self._is_ragged:  # found out by forwards, which must not come between those of a race
            self._is_ragged[name] = holds_ragged_cache(model)
        return longest <= attention_span(model) and self._is_ragged[name]

    def _make_room(self, name: str, batch: int, longest: int) -> None:
        """Keep the buffers of one batch size: those of all together may not fit."""
        kept = self._raw.get(name)
        if kept is None or kept.batch != batch or kept.capacity < longest:
            self._raw.pop(name, None)
            capacity = -(-longest // _CAPACITY_STEP) * _CAPACITY_STEP
            self._raw[name] = RawModel(self._models[name], batch, capacity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched(Sample):
    """
    A sample with what it was made of.

    Attributes:
        forwards (`Sequence[Shape]`): All forwards, in order; empty where they cannot be seen.
        floor (`float`, *optional*): Seconds that these take when replayed, where they were.
    """

    forwards: Sequence[Shape] = ()
    floor: float | None = None

    @property
    def rounds(self) -> int:
        """Forwards of the target, the prompt's among them."""
        return sum(shape.model == "target" for shape in self.forwards)

    @property
    def efficiency(self) -> float | None:
        """Share of the time that the forwards alone would have taken."""
        return None if self.floor is None else self.floor / self.seconds


def watched(race: Race, name: str) -> list[Watched]:
    """Return the samples of a contender in a race that was watched."""
    return [one for one in race.samples(name) if isinstance(one, Watched)]


class Watch:
    """
    Lets contenders answer, notes their forwards, and replays those of some requests right after their answer.

    Args:
        floor (`Floor`): Replays them.
        requests (`int`): Requests of the race. Of these, `REPLAYED` are replayed at most, evenly spread; and so is the
            one that warms up.
    """

    def __init__(self, floor: Floor, requests: int) -> None:
        self._floor, self._stride = floor, -(-requests // REPLAYED)
        self._answered: dict[str, int] = {}  # by contender, the one that warms up not counted

    def __call__(self, contender: Contender, request: Inputs, options: dict[str, Any]) -> tuple[torch.Tensor, Watched]:
        """See [`~hf_osd.evaluation.race.answer_plainly`]."""
        with recorder_of(contender) as recorder:
            output, sample = contender.answer(request, **options)
        index = self._answered.get(contender.name, -1)
        self._answered[contender.name] = index + 1
        forwards = recorder.shapes()
        floor = self._floor.seconds(forwards) if index < 0 or index % self._stride == 0 else None
        return output, Watched(**asdict(sample), forwards=forwards, floor=floor)


def _run_all(forwards: Sequence[Forward]) -> None:
    for forward in forwards:
        forward()


class RawModel:
    """
    One model over static buffers, for one batch size.

    Args:
        model (`PreTrainedModel`): The model, in eval mode.
        batch (`int`): Rows, all of the same length.
        capacity (`int`): Positions.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        config, device = model.config.get_text_config(decoder=True), model.device
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(config.vocab_size, (batch, capacity), generator=generator).to(device)
        self._model = model
        self._cache = _RawCache(config.num_hidden_layers, capacity)
        self._slots = torch.arange(capacity, device=device)
        self._takes = inspect.signature(model.forward).parameters
        self._captured: dict[Shape, Forward] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._prepare(Shape("", batch, 1, 0, 1))()  # allocates

    def forward(self, shape: Shape) -> Forward:
        """Prepare one forward; what is returned runs it, on CUDA as a captured graph where it is short."""
        if self._model.device.type != "cuda" or shape.queries > _CAPTURED_QUERIES:
            return self._prepare(shape)
        context = round(shape.context / _CONTEXT_STEP) * _CONTEXT_STEP
        shape = replace(shape, context=min(context, self.capacity - shape.queries))
        if shape not in self._captured:
            self._captured[shape] = _CapturedForward(self._prepare(shape), self._pool)
        return self._captured[shape]

    def _prepare(self, shape: Shape) -> Forward:
        start, end = shape.context, shape.end
        inputs: dict[str, Any] = {
            "input_ids": self.ids[:, start:end].contiguous(),
            "attention_mask": self._mask(start, end),
            **cache_argument(self._takes, self._cache),
        }
        if "position_ids" in self._takes:
            positions = self._slots[start:end].clamp(max=context_length(self._model) - 1)
            inputs["position_ids"] = positions.expand(self.batch, -1).contiguous()
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = shape.keep

        def run() -> torch.Tensor:
            self._cache.start = start
            logits: torch.Tensor = self._model(use_cache=True, **inputs).logits
            return logits

        return run

    def _mask(self, start: int, end: int) -> torch.Tensor | None:
        """Without one, transformers takes faster paths: for a prompt, and for a token, which sees all there is."""
        additive = attention_implementation(self._model) == "eager"
        if not additive and (start == 0 or end - start == 1):
            return None
        mask = self._slots[:end] <= self._slots[start:end, None]  # (queries, end)
        if additive:
            lowest = torch.finfo(self._model.dtype).min
            mask = torch.zeros(mask.shape, dtype=self._model.dtype, device=mask.device).masked_fill_(~mask, lowest)
        return mask.expand(self.batch, 1, -1, -1)


class _CapturedForward:
    """A forward as a CUDA graph; keeps alive what the graph reads."""

    def __init__(self, run: Forward, pool: Any) -> None:
        self._run = run
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up lazily must not be captured
            run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool):  # shared: nobody needs the outputs
            run()

    def __call__(self) -> None:
        self._graph.replay()


class _RawCache(Cache):
    """Buffers of a fixed size; `start` is the position of the next token fed, in every row."""

    def __init__(self, layers: int, capacity: int) -> None:
        self.start = 0
        super().__init__(layers=[_RawLayer(self, capacity) for _ in range(layers)])


class _RawLayer(CacheLayerMixin):
    is_compileable = False  # or transformers would build masks of its own
    is_sliding = False

    def __init__(self, cache: _RawCache, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache, self._capacity = cache, capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self._capacity, states.shape[3])  # (batch, heads, slots, head_dim)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new states where the cache starts now; return all states up to their end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        start, queries = self._cache.start, key_states.shape[2]
        self.keys.narrow(2, start, queries).copy_(key_states)
        self.values.narrow(2, start, queries).copy_(value_states)
        return self.keys.narrow(2, 0, start + queries), self.values.narrow(2, 0, start + queries)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.start + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.start

    def get_max_length(self) -> int:
        return self._capacity

    def get_max_cache_shape(self) -> int:  # the name of `get_max_length` up to transformers 5.17
        return self._capacity
