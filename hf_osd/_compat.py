"""
What hf_osd needs of transformers and accelerate that is private there, or differs between the supported versions.

Each function says for which versions it was written. Not here: TRL, which `learning/trainer.py` knows alone.
"""

import copy
import importlib
import inspect
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import (
    GENERATION_MODES_MAPPING,
    MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL,
    GenerationMixin,
)

from ._caches import CACHE_NAME, CACHE_NAMES, empty_cache
from .errors import UnsupportedGenerationError

FIRST_PASS_INPUTS = frozenset(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)
"""Model inputs that `generate` hands to the first pass only: images, sounds, and what was made of them (5.17)."""


# `transformers.utils.logging.set_verbosity` acts on loggers below "transformers" alone, and its `get_logger` (5.17 to
# 5.24) puts no other package there. Python documents `parent` as read-only.
logging.getLogger(__package__).parent = logging.getLogger("transformers")


def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


def decoder_prefix(model: PreTrainedModel) -> str:
    """Return what the names of inputs about the output begin with: without it, they are those of an encoder."""
    return "decoder_" if model.config.is_encoder_decoder else ""


def encoder_inputs(model: PreTrainedModel, rows: int, model_kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """
    Find what the encoder has read in the `generate` call that is running a custom decoding callable.

    transformers (5.17 to 5.24) computes its outputs, and hands on nothing else to a callable.

    Args:
        model (`PreTrainedModel`): The target.
        rows (`int`): Rows of the batch; several may go back to one input.
        model_kwargs (`Mapping[str, Any]`): What `generate` prepared.

    Returns:
        `dict[str, torch.Tensor]`: The input, by its name, and its mask, if any. Empty without an encoder, and where
        the caller gave its outputs.
    """
    frame = _generate_frame() if model.config.is_encoder_decoder else None
    found, name = (frame.f_locals.get(part) for part in ("inputs_tensor", "model_input_name")) if frame else (None, "")
    if not isinstance(found, torch.Tensor) or not name:
        return {}
    if not found.is_floating_point() and bool((found < 0).any()):  # stands for an input that was not given
        return {}
    mask = model_kwargs.get("attention_mask")
    inputs = {name: found.repeat_interleave(rows // len(found), dim=0)}
    return inputs if mask is None else {**inputs, "attention_mask": mask}


def text_length(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: Mapping[str, Any],
) -> int:
    """
    Return how many tokens the caller's attention mask covers, those in a cache included.

    `generate` drops a mask of ones, and notes its length privately (5.23); before, the position ids show it.
    """
    mask, positions = (model_kwargs.get(decoder_prefix(model) + name) for name in ("attention_mask", "position_ids"))
    noted = getattr(generation_config, "_mask_length", None)
    if mask is None and noted is not None:
        return int(noted)
    shown = mask if mask is not None else positions
    return int(shown.shape[-1]) if isinstance(shown, torch.Tensor) else input_ids.shape[1]


def decode_plainly(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """
    Go on with a request as `generate` would have without a custom callable (5.17): by a private method of its mixin.

    Speculative modes of transformers' own are lossless, so sampling or choosing token by token stands for them.

    Raises:
        UnsupportedGenerationError: The mode is one that transformers loads from the Hub, before it prepares anything.
    """
    mode = generation_config.get_generation_mode()
    if mode is GenerationMode.ASSISTED_GENERATION:
        mode = GenerationMode.SAMPLE if generation_config.do_sample else GenerationMode.GREEDY_SEARCH
    method = getattr(type(model), GENERATION_MODES_MAPPING[mode], None)
    if method is None:
        raise UnsupportedGenerationError(f"{mode.value} does not go with custom_generate: call model.generate alone")
    if "streamer" in inspect.signature(method).parameters:
        model_kwargs["streamer"] = streamer
    return method(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        synced_gpus=synced_gpus,
        **model_kwargs,
    )


def plain_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: Mapping[str, Any],
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Decode a few tokens greedily by the very calls that `generate` makes.

    Args:
        model (`PreTrainedModel`): The model.
        input_ids (`torch.LongTensor` of shape `(batch, prompt)`): As `generate` prepared it.
        generation_config (`GenerationConfig`): Likewise; not changed.
        model_kwargs (`Mapping[str, Any]`): Likewise; its cache is left alone.
        count (`int`): Tokens to decode.

    Returns:
        `tuple(torch.LongTensor, torch.FloatTensor)`: All tokens, `(batch, prompt + count)`, and the raw logits that
        each new one was chosen from, `(batch, count, vocab)`, float32.
    """
    config = copy.copy(generation_config)
    config.do_sample = config.output_attentions = config.output_hidden_states = config.output_scores = False
    config.num_beams, config.return_dict_in_generate, config.output_logits = 1, True, True
    config.prompt_lookup_num_tokens = config.prefill_chunk_size = None
    fresh = empty_cache(model, reads_encoder="encoder_outputs" in model_kwargs)
    name = "cache_params" if "cache_params" in parameters_of(model.forward) else CACHE_NAME  # Mamba's, up to 5.23
    inputs = {name: value for name, value in model_kwargs.items() if name not in CACHE_NAMES}
    output = decode_plainly(
        model,
        input_ids,
        logits_processor=LogitsProcessorList(),
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(max_length=input_ids.shape[1] + count)]),
        generation_config=config,
        **{**inputs, "use_cache": True, name: fresh},
    )
    return output.sequences, torch.stack(output.logits, dim=1)


def dropped_streamer() -> BaseStreamer | None:
    """
    Find the streamer of the `generate` call that is running a custom decoding callable.

    transformers (5.17 to 5.24) hands the prompt to `streamer`, but drops `streamer` before it calls a callable given
    as `custom_generate` (`_extract_generation_mode_kwargs`), so that nothing would be streamed and nobody told. This
    can go once transformers passes it on.
    """
    frame = _generate_frame()
    streamer = frame.f_locals.get("streamer") if frame is not None else None
    return streamer if isinstance(streamer, BaseStreamer) or hasattr(streamer, "put") else None


def _generate_frame() -> FrameType | None:
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def pad_token_of(generation_config: GenerationConfig) -> int | None:
    """Return the pad token that `generate` settled on, which it keeps privately (5.17)."""
    pad = generation_config._pad_token_tensor
    return None if pad is None else int(pad)


def constraint_of_row(processor: PrefixConstrainedLogitsProcessor, row: int) -> PrefixConstrainedLogitsProcessor:
    """Return a processor that asks the user's rule, a private field (5.17 to 5.24), about one row: its only one."""
    rule, prompt = processor._prefix_allowed_tokens_fn, row // processor._num_beams
    return PrefixConstrainedLogitsProcessor(lambda _, text: rule(prompt, text), num_beams=1)


def attention_implementation(model: PreTrainedModel) -> str:
    """Return how the text part of a model attends: a private field of its configuration (5.17)."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def is_compiled(model: torch.nn.Module) -> bool:
    """
    Whether some of a model is compiled in place: graphs that torch (2.11 to 2.13) has made may leave out new hooks.

    `torch.compile(model)` is a wrapper instead, through which transformers runs the model inside as it is.
    """
    return any(
        module._compiled_call_impl is not None
        or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def execution_device(model: Any) -> torch.device:
    """
    Return where the forward of a model runs.

    accelerate (1.10) keeps offloaded weights on the meta device, and notes privately where it brings them to work.
    """
    device: torch.device = model.device
    if device.type != "meta":
        return device
    for module in model.modules():
        for hook in _hooks(module):
            place = getattr(hook, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return torch.device("cpu")


def is_offloaded(model: Any) -> bool:
    """Whether accelerate (1.10) brings weights of a model that are kept elsewhere."""
    return any(getattr(hook, "offload", False) for module in model.modules() for hook in _hooks(module))


def _hooks(module: Any) -> Sequence[Any]:
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def import_quietly(name: str) -> ModuleType:
    """Import a module, and leave the global random state as it was: rich, which TRL imports, draws from it."""
    state, is_first = random.getstate(), name not in sys.modules
    module = importlib.import_module(name)
    if is_first:
        random.setstate(state)
    return module


_SEEDING = threading.Lock()  # held while `set_seed` is replaced: two at once would restore each other's replacement


@contextmanager
def global_seed_untouched(*modules: ModuleType) -> Iterator[None]:
    """
    Keep `Trainer.__init__` from seeding the global generators, which serving samples from (5.24, TRL 1.16).

    Restoring their state afterwards would leave a moment in which another thread samples from a seeded one. Only the
    calling thread skips the seeding; trainers of others are not affected.

    Args:
        modules (`ModuleType`): Those that call their own `set_seed`.
    """
    owner = threading.get_ident()

    def for_others(original: Callable[..., None]) -> Callable[..., None]:
        def set_seed(*args: Any, **kwargs: Any) -> None:
            if threading.get_ident() != owner:
                original(*args, **kwargs)

        return set_seed

    with _SEEDING:
        originals = [module.set_seed for module in modules]
        for module, original in zip(modules, originals, strict=True):
            module.set_seed = for_others(original)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module, original in zip(modules, originals, strict=True):
                module.set_seed = original  # type: ignore[attr-defined]
