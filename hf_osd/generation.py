"""The entry points: `generate`, and the callable that transformers' `custom_generate` takes."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from ._compat import dropped_streamer, encoder_inputs, text_length
from .assistant import OnlineAssistant
from .decoding import Call, Output, decode
from .drafts.compatibility import check_target
from .errors import InputError, UnsupportedError, check_kind
from .resolving import resolve_assistant
from .serving.randomness import seeded
from .serving.support import SETTINGS, Asked, check_limits
from .serving.weights import eval_mode


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    *,
    online_assistant: OnlineAssistant | PreTrainedModel | str,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generator: torch.Generator | None = None,
    osd_route: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Output:
    """
    Generate exactly what `model.generate` would, faster, with a draft that learns from the traffic.

    Greedy output equals the target's own token for token; sampled output has the target's distribution. Accepts
    everything that `model.generate` does. What has no lossless speculative form is served by `model.generate` itself,
    with one warning for each reason, and counted in [`OnlineStats`]; see `docs/support.md`, and
    `OnlineConfig(unsupported="error")`.

    Args:
        model (`PreTrainedModel`):
            The target: a language model.
        inputs (`torch.LongTensor` of shape `(batch, prompt)`, *optional*):
            The prompts, left-padded; also accepted as `input_ids`, together with `attention_mask`.
        generation_config (`GenerationConfig`, *optional*):
            As in transformers; keyword arguments override it.
        logits_processor (`LogitsProcessorList`, *optional*):
            As in transformers. Your own must be functions of the tokens and scores they are given: state that they
            keep from call to call would be misled by proposals that are rejected.
        stopping_criteria (`StoppingCriteriaList`, *optional*):
            As in transformers; the same holds.
        online_assistant (`OnlineAssistant`, `PreTrainedModel` or `str`):
            The draft. A model, or a Hub id or local path of one, is wrapped into an [`OnlineAssistant`] with default
            settings, which is kept for the next call with the same target. `"auto"` makes a draft of the target
            itself, which learns from the requests it sees.
        streamer (`BaseStreamer`, *optional*):
            Gets the prompt, then each token as soon as it is final.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Needed for `stop_strings` only.
        generator (`torch.Generator`, *optional*):
            Source of randomness for sampling; defaults to one seeded from torch's global state.
        osd_route (`str` or `Sequence[str]`, *optional*):
            The route of all prompts, or of each: which draft of the assistant serves it. By default the assistant's
            router decides; see `docs/routing.md`.
        kwargs:
            Everything else that `model.generate` takes: `attention_mask`, `max_new_tokens`, `do_sample`,
            `prefix_allowed_tokens_fn`, `return_dict_in_generate` ...

    Returns:
        `torch.LongTensor` of shape `(batch, length)`, or [`~transformers.generation.GenerateDecoderOnlyOutput`] with
        `return_dict_in_generate=True`. Behind a row's end, `scores` and `logits` are zero.

    Raises:
        InputError: No prompt, padding that is not on the left, a cache that does not fit its prompt, or arguments that
            contradict `online_assistant`.
        UnsupportedModelError: The target or the draft is nothing that generates, or the draft is the target itself.
        UnsupportedGenerationError, UnsupportedModelError: With `OnlineConfig(unsupported="error")`, whatever is not
            served by speculation.

    Example:

    ```python
    >>> import hf_osd
    >>> output = hf_osd.generate(target, **inputs, online_assistant=draft, max_new_tokens=128)
    ```
    """
    check_target(model)
    for name in ("custom_generate", "assistant_model"):
        if kwargs.get(name) is not None:
            raise InputError(f"{name} and online_assistant both say how to decode: leave one of them out")
    check_kind("generator", generator, torch.Generator)
    assistant = resolve_assistant(online_assistant, model)
    assistant.check_open()
    given = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
    kwargs |= {name: value for name, value in given.items() if value is not None}
    with eval_mode(model):
        try:
            _check_call(model, generation_config, kwargs)
        except UnsupportedError as error:
            assistant.fall_back(error, _rows(inputs, kwargs))
            kwargs |= {} if streamer is None else {"streamer": streamer}
            kwargs |= {} if tokenizer is None else {"tokenizer": tokenizer}
            return _call(model, inputs, generator, generation_config=generation_config, **kwargs)
        kwargs = _with_stop_strings(model, generation_config, tokenizer, kwargs)

        mask = None if model.config.is_encoder_decoder else kwargs.get("attention_mask")  # else of the encoder's text
        text = int(mask.shape[-1]) if isinstance(mask, torch.Tensor) and mask.ndim else None

        def decode_prepared(target: PreTrainedModel, input_ids: torch.Tensor, **prepared: Any) -> Output:
            own: dict[str, Any] = {"generator": generator, "streamer": streamer, "keys": osd_route, "text": text}
            call = _prepared(target, input_ids, **own, **prepared)
            return decode(call, assistant, put_prompt=True)

        kwargs |= {"generation_config": generation_config, "custom_generate": decode_prepared}
        return _call(model, inputs, None, **kwargs)


def _call(
    model: PreTrainedModel, inputs: torch.Tensor | None, generator: torch.Generator | None, **kwargs: Any
) -> Output:
    """Call the target's own `generate`, by position, since some name their first argument otherwise."""
    call: Any = model.generate
    with seeded(generator):
        output: Output = call(*([] if inputs is None else [inputs]), **kwargs)
    return output


def _check_call(model: PreTrainedModel, config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """Raise the limits of speculation that the call alone shows; `decode` finds the others."""
    configs = [one for one in (config, model.generation_config) if one is not None]

    def setting(name: str) -> Any:
        values = [kwargs[name]] if name in kwargs else [getattr(one, name, None) for one in configs]
        return next((value for value in values if value is not None), None)

    check_limits(SETTINGS, Asked(model, setting))


def _rows(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> int:
    given = (inputs, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "input_features", "input_values")))
    return next((len(value) for value in given if isinstance(value, torch.Tensor) and value.ndim), 1)


def _with_stop_strings(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Turn stop strings into a criterion, since transformers passes no tokenizer to a custom callable."""
    configs = [config for config in (generation_config, model.generation_config) if config is not None]
    strings = kwargs.get("stop_strings") or next((c.stop_strings for c in configs if c.stop_strings), None)
    if not strings:
        return kwargs
    if tokenizer is None:
        raise InputError(f"stop_strings={strings!r} needs the tokenizer: pass tokenizer=...")
    criteria = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or [])])
    criteria.append(StopStringCriteria(tokenizer, strings))
    return {**kwargs, "stopping_criteria": criteria, "stop_strings": None}  # None overrides the configs


def online_decoding(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    online_assistant: OnlineAssistant | PreTrainedModel | str | None = None,
    generator: torch.Generator | None = None,
    streamer: BaseStreamer | None = None,
    osd_route: str | Sequence[str] | None = None,
    **model_kwargs: Any,
) -> Output:
    """
    The decoding loop as transformers' `custom_generate` takes it.

    Not called directly: `model.generate(**inputs, custom_generate=hf_osd.online_decoding, online_assistant=a)`, or
    through a pipeline. The same as [`generate`], except that `stop_strings` has to be given as
    `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`, since transformers does not pass the tokenizer on.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs:
            Prepared by `model.generate`.
        online_assistant, generator, streamer, osd_route: See [`generate`].

    Raises:
        InputError: `online_assistant` is missing; otherwise see [`generate`].
    """
    if online_assistant is None:
        raise InputError("custom_generate=online_decoding needs online_assistant=...: an OnlineAssistant or a draft")
    call = _prepared(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        generator=generator,
        keys=osd_route,
        streamer=streamer if streamer is not None else dropped_streamer(),
        **model_kwargs,
    )
    return decode(call, resolve_assistant(online_assistant, model))


def _prepared(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    generator: torch.Generator | None,
    streamer: BaseStreamer | None,
    keys: str | Sequence[str] | None,
    text: int | None = None,
    **model_kwargs: Any,
) -> Call:
    return Call(
        model=model,
        input_ids=input_ids,
        processors=logits_processor,
        criteria=stopping_criteria,
        config=generation_config,
        model_kwargs=model_kwargs,
        generator=generator,
        keys=keys,
        streamer=streamer,
        text=text if text is not None else text_length(model, input_ids, generation_config, model_kwargs),
        encoder_inputs=encoder_inputs(model, len(input_ids), model_kwargs),
    )
