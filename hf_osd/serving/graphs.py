"""
Forwards captured as CUDA graphs, one for each shape, and replayed without the cost of launching kernels.

A graph holds addresses, so all that it reads and writes has to stay in place: inputs are copied into its own buffers,
the ragged cache is kept from call to call, and weights are updated in place.
"""

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .._compat import attention_implementation

logger = logging.get_logger(__name__)

_WIDTHS = (1, 2, 4, 6, 8, 12, 17)  # tokens fed at once: captured widths; others are rounded up
_SPANS = 128  # keys: a graph reads 128, 256, 512 ... of them
_GRAPHS = 24  # graphs on one cache, at most; the least recently used one leaves
_PATIENCE = 2  # uses of a shape before it is captured, so that rare prompt lengths are not

Output = tuple[torch.Tensor | Any, ...]
"""Tensors that the next replay overwrites; other entries are `None`."""

Forward = Callable[..., Output]

# Models whose capture failed, which are served without.
_not_capturable: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()


class CapturedForward:
    """
    One forward of fixed shape, with its input and output buffers.

    Args:
        forward (`Callable`): Takes the inputs, returns tensors; the same kernels every time.
        inputs (`Sequence[torch.Tensor]`): Those of its first use.
        pool (`Any`): Memory pool that the graphs of one cache share. Each replay may overwrite the output of another,
            so an output has to be used, in the order of the stream, before the next replay.
    """

    @torch.inference_mode(False)  # else its buffers could not be written outside of the mode
    @torch.no_grad()
    def __init__(self, forward: Forward, inputs: Sequence[torch.Tensor], pool: Any) -> None:
        self._inputs, device = [value.clone() for value in inputs], inputs[0].device
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # what is set up lazily must not be captured
            forward(*self._inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        # Other threads, such as the one that trains, go on allocating meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._output = forward(*self._inputs)

    def __call__(self, *inputs: torch.Tensor) -> Output:
        """Replay it; the result is overwritten by the next replay of any graph of the same cache."""
        for buffer, value in zip(self._inputs, inputs, strict=True):
            buffer.copy_(value)
        self._graph.replay()
        return self._output


class ForwardGraphs:
    """The captured forwards on one ragged cache, by the shapes of their inputs and the number of keys read."""

    def __init__(self) -> None:
        self._uses: Counter[Any] = Counter()
        self._captured: OrderedDict[Any, CapturedForward] = OrderedDict()
        self._pool: Any = None

    def run(
        self,
        model: PreTrainedModel,
        kind: tuple[Any, ...],
        forward: Forward,
        *inputs: torch.Tensor,
    ) -> Output:
        """
        Run a forward; from the third use of its shape on, as a captured graph.

        Args:
            model (`PreTrainedModel`): Whose forward it is.
            kind (`tuple`): What tells it from others besides the shapes of its inputs, such as the keys it reads.
            forward (`Callable`): See [`CapturedForward`].
            inputs (`torch.Tensor`): Its inputs: tokens and positions `(batch, q)`, and what else the model reads.
        """
        key = (*kind, *(tuple(value.shape) for value in inputs))
        self._uses[key] += 1
        if key not in self._captured and self._uses[key] > _PATIENCE and model not in _not_capturable:
            self._capture(key, model, forward, inputs)
        if key not in self._captured:
            return forward(*inputs)
        self._captured.move_to_end(key)
        return self._captured[key](*inputs)

    def _capture(
        self,
        key: Any,
        model: PreTrainedModel,
        forward: Forward,
        inputs: Sequence[torch.Tensor],
    ) -> None:
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._captured[key] = CapturedForward(forward, inputs, self._pool)
        except Exception as error:  # a forward may do anything; it then runs without a graph
            _not_capturable.add(model)
            logger.warning("%s cannot be captured as a CUDA graph, and runs without: %s", type(model).__name__, error)
        while len(self._captured) > _GRAPHS:
            self._captured.popitem(last=False)


def can_capture(model: PreTrainedModel) -> bool:
    """Whether a model's forwards can be captured: all of it on one CUDA device, and nothing moved in between."""
    return model.device.type == "cuda" and getattr(model, "hf_device_map", None) is None


def captured_width(q: int) -> int | None:
    """Return the number of tokens to feed in place of `q`, at least as many; `None` where that is too many."""
    return next((width for width in _WIDTHS if width >= q), None)


def captured_span(span: int, capacity: int) -> int:
    """Return the number of keys to read in place of `span`."""
    bucket = _SPANS
    while bucket < span:
        bucket *= 2
    return min(bucket, capacity)


def fingerprint(model: PreTrainedModel) -> int:
    """
    Return a number that changes whenever graphs of a model may no longer be what its forward does.

    That is where parameters have moved, modules or hooks were added, or adapters were switched.
    """
    places = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    modules = [
        (id(module), len(module._forward_hooks), len(module._forward_pre_hooks), _adapters(module))
        for module in model.modules()
    ]
    return hash((tuple(places), tuple(modules), attention_implementation(model)))


def _adapters(module: torch.nn.Module) -> str | None:
    active = getattr(module, "_active_adapter", None)  # peft's tuner layers
    return None if active is None else f"{active} {getattr(module, '_disable_adapters', False)}"
