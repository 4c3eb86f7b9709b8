"""The entry points: `generate`, and the callable that transformers' `custom_generate` takes."""

import time
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
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ._compat import dropped_streamer
from .assistant import OnlineAssistant, Request, resolve_assistant
from .errors import InputError, UnsupportedGenerationError
from .serving.decoder import Decoder, make_decoder
from .serving.drafting import OnlineAssistedGenerator
from .serving.engine import Engine, History
from .serving.inputs import (
    check_cache,
    check_config,
    check_length,
    check_processors,
    check_settings,
    check_target,
    padding_of,
)
from .serving.lookup import LOOKUP_LENGTH
from .serving.processing import on_device
from .serving.randomness import Randomness
from .serving.sequences import Sequences
from .serving.speculation import DraftSpeculator, MeasuredSpeculator, Speculator
from .serving.stopping import StopCheck
from .serving.stopwatch import Stopwatch
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
    **kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """
    Generate exactly what `model.generate` would, faster, with a draft that learns from the traffic.

    Greedy output equals the target's own token for token; sampled output has the target's distribution. Accepts
    everything that `model.generate` does; modes without a lossless speculative form are refused before any work.

    Args:
        model (`PreTrainedModel`):
            The target: a decoder-only language model.
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
            settings, which is kept for the next call with the same target.
        streamer (`BaseStreamer`, *optional*):
            Gets the prompt, then each token as soon as it is final.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Needed for `stop_strings` only.
        generator (`torch.Generator`, *optional*):
            Source of randomness for sampling; defaults to one seeded from torch's global state.
        kwargs:
            Everything else that `model.generate` takes: `attention_mask`, `max_new_tokens`, `do_sample`,
            `prefix_allowed_tokens_fn`, `return_dict_in_generate` ...

    Returns:
        `torch.LongTensor` of shape `(batch, length)`, or [`~transformers.generation.GenerateDecoderOnlyOutput`] with
        `return_dict_in_generate=True`. Behind a row's end, `scores` and `logits` are zero.

    Raises:
        UnsupportedGenerationError: Beam search, contrastive search, guidance and the like.
        UnsupportedModelError: The target or the draft cannot be served.
        InputError: No prompt, or padding that is not on the left.

    Example:

    ```python
    >>> import hf_osd
    >>> output = hf_osd.generate(target, **inputs, online_assistant=draft, max_new_tokens=128)
    ```
    """
    check_target(model)
    base = generation_config if generation_config is not None else model.generation_config
    check_settings(lambda name: kwargs[name] if name in kwargs else getattr(base, name, None))
    for name in ("custom_generate", "assistant_model", "synced_gpus", "inputs_embeds", "negative_prompt_ids"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UnsupportedGenerationError(f"{name} cannot be combined with online_assistant: leave it out")
    assistant = resolve_assistant(online_assistant, model)
    given = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
    kwargs |= {name: value for name, value in given.items() if value is not None}
    kwargs = _with_stop_strings(model, generation_config, tokenizer, kwargs)

    def decode(target: PreTrainedModel, input_ids: torch.Tensor, **prepared: Any) -> Any:
        if streamer is not None:
            streamer.put(input_ids.cpu())
        return _decode(target, input_ids, assistant=assistant, streamer=streamer, generator=generator, **prepared)

    with eval_mode(model):
        call: Any = model.generate
        output: GenerateDecoderOnlyOutput | torch.Tensor = call(
            inputs, generation_config, custom_generate=decode, **kwargs
        )
    return output


def _with_stop_strings(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Turn stop strings into a criterion here: on the way to a custom callable, transformers loses the tokenizer."""
    configs = [config for config in (generation_config, model.generation_config) if config is not None]
    strings = kwargs.get("stop_strings") or next((c.stop_strings for c in configs if c.stop_strings), None)
    if not strings:
        return kwargs
    if tokenizer is None:
        raise InputError(f"stop_strings={strings!r} needs the tokenizer: pass tokenizer=...")
    criteria = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or [])])
    criteria.append(StopStringCriteria(tokenizer, strings))
    return {**kwargs, "stopping_criteria": criteria, "stop_strings": None}  # None: over what the configs say


def online_decoding(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    online_assistant: OnlineAssistant | PreTrainedModel | str | None = None,
    generator: torch.Generator | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """
    The decoding loop as transformers' `custom_generate` takes it.

    Not called directly: `model.generate(**inputs, custom_generate=hf_osd.online_decoding, online_assistant=a)`, or
    through a pipeline. The same as [`generate`], except that `stop_strings` has to be given as
    `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`, since transformers does not pass the tokenizer on.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs:
            Prepared by `model.generate`.
        online_assistant, generator, streamer: See [`generate`].

    Raises:
        InputError: `online_assistant` is missing; otherwise see [`generate`].
    """
    check_target(model)
    if online_assistant is None:
        raise InputError("custom_generate=online_decoding needs online_assistant=...: an OnlineAssistant or a draft")
    if model_kwargs.pop("synced_gpus", False):
        raise UnsupportedGenerationError("synced_gpus=True (generation over several ranks) is not supported")
    return _decode(
        model,
        input_ids,
        assistant=resolve_assistant(online_assistant, model),
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        generator=generator,
        streamer=streamer if streamer is not None else dropped_streamer(),
        **model_kwargs,
    )


@torch.no_grad()
def _decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    assistant: OnlineAssistant,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    generator: torch.Generator | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """One request: check, set up, decode, hand over what was learned, return."""
    config = generation_config
    check_config(config)
    check_processors(logits_processor)
    padding = padding_of(input_ids, model_kwargs)
    sequences = _sequences(input_ids.to(model.device), padding, config, stopping_criteria, assistant)
    check_length(model, sequences.limit - min(padding))
    config.max_length = sequences.limit  # of this call's own copy
    randomness = Randomness(generator) if config.do_sample else None
    started = time.perf_counter()
    with eval_mode(model, assistant.draft), assistant.request(len(padding)) as request:
        processors = on_device(logits_processor, assistant.draft.device, input_ids.device)
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        drafter = _drafter(assistant, request, sequences, config, processors, vocab_size, randomness)
        keep = bool(config.return_dict_in_generate)
        engine = Engine(
            sequences=sequences,
            target=_target(model, sequences, model_kwargs.get("past_key_values")),
            speculator=_speculator(assistant, drafter, sequences),
            watch=Stopwatch(model.device, assistant.draft.device),
            processors=on_device(logits_processor, model.device, input_ids.device),
            stop_check=StopCheck(stopping_criteria),
            randomness=randomness,
            streamer=streamer,
            scores=History(sequences.batch) if keep and config.output_scores else None,
            logits=History(sequences.batch) if keep and config.output_logits else None,
        )
        engine.run()
        engine.speculator.finish(sequences.lengths)
        request.finish(engine, time.perf_counter() - started)
    output = _output(engine, config, input_ids.device)
    drafter.release()
    engine.target.release()
    return output


def _sequences(
    input_ids: torch.Tensor,
    padding: Sequence[int],
    config: GenerationConfig,
    stopping_criteria: StoppingCriteriaList,
    assistant: OnlineAssistant,
) -> Sequences:
    eos: list[int] = []
    for criterion in stopping_criteria:
        if type(criterion) is EosTokenCriteria:
            eos.extend(torch.as_tensor(criterion.eos_token_id).flatten().tolist())
    pad = config._pad_token_tensor
    # The caller's own criterion takes the place of the config's; plain decoding takes a token before it asks.
    lengths = [criterion.max_length for criterion in stopping_criteria if type(criterion) is MaxLengthCriteria]
    return Sequences(
        input_ids,
        padding,
        max_length=max(min(lengths, default=config.max_length), input_ids.shape[1] + 1),
        slack=max(assistant.config.draft_length, LOOKUP_LENGTH),
        pad_token_id=int(pad) if pad is not None else 0,
        eos_token_ids=eos,
        pads=any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria),
    )


def _drafter(
    assistant: OnlineAssistant,
    request: Request,
    sequences: Sequences,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    vocab_size: int,
    randomness: Randomness | None,
) -> OnlineAssistedGenerator:
    return OnlineAssistedGenerator(
        sequences.ids[:, : sequences.prompt_length],
        assistant.draft,
        config,
        {},
        logits_processor=processors,
        draft_length=assistant.config.draft_length,
        draft_length_schedule=assistant.config.draft_length_schedule,
        confidence_threshold=assistant.config.confidence_threshold,
        padding=sequences.padding,
        vocab_size=vocab_size,
        randomness=randomness,
        recorder=request.recorder,
        weights=assistant.weights,
    )


def _speculator(assistant: OnlineAssistant, drafter: OnlineAssistedGenerator, sequences: Sequences) -> Speculator:
    config = assistant.config
    if config.draft_length_schedule != "measured" or config.draft_length == 0:
        return DraftSpeculator(drafter)
    return MeasuredSpeculator(drafter, assistant.experience, sequences, config.prompt_lookup)


def _target(model: PreTrainedModel, sequences: Sequences, cache: Cache | None) -> Decoder:
    """A cache of the caller's is gone on from and filled; the empty one that transformers prepares is not needed."""
    if cache is None or not getattr(cache, "_is_user_defined", False):
        return make_decoder(model, sequences.padding, sequences.ids.shape[1])
    check_cache(cache, sequences.padding)
    return make_decoder(model, sequences.padding, sequences.ids.shape[1], cache)


def _output(
    engine: Engine, config: GenerationConfig, device: torch.device
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    sequences = engine.sequences
    end = max(sequences.ends)
    ids = sequences.padded(end).to(device)
    if not config.return_dict_in_generate:
        return ids
    recorded: dict[str, Any] = {
        "scores": engine.scores.columns(sequences.lengths) if engine.scores is not None else None,
        "logits": engine.logits.columns(sequences.lengths) if engine.logits is not None else None,
    }
    return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=engine.target.export(), **recorded)  # type: ignore[arg-type]
