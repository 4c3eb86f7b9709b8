"""Decodes a request that transformers has prepared: checks it, sets it up, runs the loop, hands on what to learn."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.utils import logging

from ._caches import cache_argument, cache_of, is_callers_own
from ._compat import decode_plainly, decoder_prefix, execution_device, pad_token_of
from .assistant import OnlineAssistant
from .config import OnlineConfig
from .errors import InputError, UnsupportedError
from .learning_draft import LearningDraft
from .serving.choice import choose_decoder
from .serving.decoder import Decoder
from .serving.drafting import OnlineAssistedGenerator
from .serving.encoding import Encoded, reads_encoder, source_texts
from .serving.engine import Engine
from .serving.inputs import holds_cached_text, padding_of
from .serving.measured import MeasuredSpeculator
from .serving.preparation import Preparation, prepare
from .serving.probe import Trial
from .serving.processing import on_device
from .serving.randomness import Randomness, seeded
from .serving.scores import History
from .serving.sequences import Sequences
from .serving.speculation import DraftSpeculator, Speculator
from .serving.states import TargetStates
from .serving.stopping import StopCheck
from .serving.stopwatch import Stopwatch
from .serving.support import REQUESTS, SETTINGS, Asked, check_limits
from .serving.weights import eval_mode
from .team import Request, Team

logger = logging.get_logger(__name__)

Output = GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput | torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """
    What transformers prepared for a decoding method.

    Attributes:
        model (`PreTrainedModel`): The target.
        input_ids (`torch.LongTensor` of shape `(batch, prompt)`): The prompts.
        processors (`LogitsProcessorList`): Applied to the target's logits, and to the draft's.
        criteria (`StoppingCriteriaList`): What ends a row.
        config (`GenerationConfig`): This call's own copy.
        model_kwargs (`dict[str, Any]`): Inputs of the model.
        text (`int`): Columns of the prompt and of a cached text before it.
        keys (`str` or `Sequence[str]`, *optional*): The route of all prompts, or of each.
        generator (`torch.Generator`, *optional*): Source of randomness.
        streamer (`BaseStreamer`, *optional*): Gets tokens as soon as they are final.
        encoder_inputs (`Mapping[str, torch.Tensor]`, *optional*): What the target's encoder has read, where there is
            one and that is known.
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    text: int
    keys: str | Sequence[str] | None = None
    generator: torch.Generator | None = None
    streamer: BaseStreamer | None = None
    encoder_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def setting(self, name: str) -> Any:
        """Return the value of a generation setting or model input, `None` where it is not set."""
        return self.model_kwargs.get(name, getattr(self.config, name, None))

    def routes(self) -> list[str] | None:
        """
        Return the route that each row asks for: that of its prompt, of which there may be several outputs.

        Raises:
            InputError: There is not one for each prompt.
        """
        rows = len(self.input_ids)
        if self.keys is None:
            return None
        keys = list(self.keys) if isinstance(self.keys, Sequence) and not isinstance(self.keys, str) else [self.keys]
        counts = {1, rows, rows // (self.setting("num_return_sequences") or 1)}
        if len(keys) not in counts or not all(isinstance(key, str) and key for key in keys):
            raise InputError(f"osd_route must be the name of a route, or one for each of {rows} rows, got {keys!r}")
        return [key for key in keys for _ in range(rows // len(keys))]


@dataclass(frozen=True, slots=True)
class Setup:
    """
    How a request will be decoded.

    Attributes:
        sequences (`Sequences`): Its rows.
        team (`Team`): The drafts that serve them.
        make_target, make_draft (`Callable[[], Decoder]`): Make the decoders; without `make_draft` nothing is drafted.
        states (`TargetStates`, *optional*): Hidden states of the target, for a draft that reads them.
        records (`list[bool]`): By row, whether what learning would have to read is known; images, for one, are not
            recorded.
    """

    sequences: Sequences
    team: Team
    make_target: Callable[[], Decoder]
    make_draft: Callable[[], Decoder] | None
    states: TargetStates | None
    records: list[bool]


@torch.no_grad()
def decode(call: Call, assistant: OnlineAssistant, put_prompt: bool = False) -> Output:
    """
    Decode one request, by speculation where that is lossless, else as `generate` itself would.

    Args:
        call (`Call`): The request.
        assistant (`OnlineAssistant`): The draft.
        put_prompt (`bool`, defaults to `False`): Whether the streamer has still to be given the prompt.

    Raises:
        InputError: Padding that is not on the left, or a cache that does not fit.
        UnsupportedError: With `OnlineConfig(unsupported="error")`, what is not speculated on.
    """
    assistant.check_open()
    with eval_mode(call.model, *(one.draft for one in assistant.routes.values())):
        try:
            setup = _set_up(call, assistant)
        except UnsupportedError as error:
            assistant.fall_back(error, len(call.input_ids))
            setup = None
        if put_prompt and call.streamer is not None:
            call.streamer.put(call.input_ids.cpu())
        return _plain(call) if setup is None else _speculate(call, setup, assistant)


def _plain(call: Call) -> Output:
    with seeded(call.generator):
        output: Output = decode_plainly(
            call.model,
            call.input_ids,
            logits_processor=call.processors,
            stopping_criteria=call.criteria,
            generation_config=call.config,
            streamer=call.streamer,
            **call.model_kwargs,
        )
    return output


def _set_up(call: Call, assistant: OnlineAssistant) -> Setup:
    """Make all checks and choices, before anything is fed or streamed."""
    model, config, inputs = call.model, call.config, call.model_kwargs
    check_limits(SETTINGS, Asked(model, call.setting))
    mask = inputs.get(decoder_prefix(model) + "attention_mask")
    padding = padding_of(call.input_ids, mask)
    cache, rows, width = _callers_cache(inputs), *call.input_ids.shape
    is_prefix = holds_cached_text(cache, rows, width, call.text)
    sequences = _sequences(call, padding, assistant.config)
    preparation = prepare(model, call.input_ids, inputs, padding)
    new = sequences.limit - width
    length = max(width - min(padding) + (0 if is_prefix else call.text - width), preparation.next_position) + new
    is_padded = mask is not None and not bool(mask.bool().all())
    check_limits(REQUESTS, Asked(model, call.setting, call.processors, preparation, cache, is_padded, length))
    team = assistant.routes.team(model, sequences, call.routes())
    team.check_usable(model)
    trial = Trial(sequences.ids[:, :width], padding, preparation, config, bool(config.return_dict_in_generate))
    make_target = choose_decoder(model, trial, sequences.ids.shape[1], length=length, cache=cache, is_prefix=is_prefix)
    make_draft, states = _draft(call, assistant, team, sequences, preparation)
    if states is not None:
        make_target = partial(make_target, states=states)
    return Setup(sequences, team, make_target, make_draft, states, _records(team, preparation, sequences))


def _records(team: Team, preparation: Preparation, sequences: Sequences) -> list[bool]:
    """Say of each row whether learning could read all that its draft, and the target where it runs, have read."""
    known = {one: _is_kept(one, preparation, sequences.sources is not None) for one in team.groups}
    return [known[one] for one in team.by_row]


def _is_kept(one: LearningDraft, preparation: Preparation, has_source: bool) -> bool:
    """Whether what a draft has read is recorded: tokens are."""
    if (
        preparation.every_pass
        and reads_encoder(one.draft)
        and not (has_source and one.draft.config.is_encoder_decoder)
    ):
        if one.config.learn:
            logger.warning_once("The draft does not learn from these requests: what its encoder reads is not kept.")
        return False
    is_text = preparation.is_plain and (has_source or not preparation.every_pass)
    return is_text or not one.config.needs_target


def _callers_cache(inputs: dict[str, Any]) -> Any:
    """Return a cache of the caller's, which is continued in place; the empty one of transformers is not used."""
    cache = cache_of(inputs)
    return cache if cache is not None and is_callers_own(cache) else None


def _sequences(call: Call, padding: Sequence[int], settings: OnlineConfig) -> Sequences:
    eos: list[int] = []
    for criterion in call.criteria:
        if type(criterion) is EosTokenCriteria:
            eos.extend(torch.as_tensor(criterion.eos_token_id).flatten().tolist())
    pad = pad_token_of(call.config)
    # A criterion of the caller's replaces the config's length. Plain decoding always generates one token.
    lengths = [criterion.max_length for criterion in call.criteria if type(criterion) is MaxLengthCriteria]
    return Sequences(
        call.input_ids.to(execution_device(call.model)),
        padding,
        max_length=max(min(lengths, default=call.config.max_length), call.input_ids.shape[1] + 1),
        slack=max(settings.draft_length, settings.draft_nodes),
        pad_token_id=pad if pad is not None else 0,
        eos_token_ids=eos,
        pads=any(hasattr(criterion, "eos_token_id") for criterion in call.criteria),
        sources=source_texts(call.encoder_inputs),
    )


def _draft(
    call: Call, assistant: OnlineAssistant, team: Team, sequences: Sequences, preparation: Preparation
) -> tuple[Callable[[], Decoder] | None, TargetStates | None]:
    """Choose the drafts' decoder, and what they read; `None` leaves proposals to the lookup."""
    if assistant.config.draft_length == 0:
        return None, None
    try:
        return team.choose_decoder(
            call.model, sequences, Encoded(call.encoder_inputs, preparation.every_pass, call.config)
        )
    except UnsupportedError as error:
        assistant.fall_back(error, sequences.batch, without="the draft")
        return None, None


def _speculate(call: Call, setup: Setup, assistant: OnlineAssistant) -> Output:
    config, sequences, team = call.config, setup.sequences, setup.team
    config.max_length = sequences.limit
    started = time.perf_counter()
    recorded = assistant.chosen_rows(team, setup.records)
    with team.request(recorded, setup.states) as request:
        engine = _engine(call, setup, request)
        try:
            engine.run()
        except BaseException:
            engine.target.release(failed=True)
            raise
        engine.speculator.finish(sequences.lengths)
        request.finish(engine, time.perf_counter() - started)
    assistant.routes.note(team.names, [(one.accepted, one.judged) for one in engine.speculator.counts])
    output = _output(engine, call)
    engine.speculator.drafter.release()
    engine.target.release()
    return output


def _engine(call: Call, setup: Setup, request: Request) -> Engine:
    config, sequences, built_for = call.config, setup.sequences, call.input_ids.device
    device = sequences.ids.device
    randomness = Randomness(call.generator) if config.do_sample else None
    drafter = _drafter(call, setup, request, randomness)
    target, processors = setup.make_target(), on_device(call.processors, device, built_for)
    keep = bool(config.return_dict_in_generate)
    return Engine(
        sequences=sequences,
        target=target,
        speculator=_speculator(setup.team, drafter, sequences, target.takes_trees),
        watch=Stopwatch(device, drafter.device),
        processors=processors,
        stop_check=StopCheck(call.criteria),
        randomness=randomness,
        streamer=call.streamer,
        scores=History(sequences.batch) if keep and config.output_scores else None,
        logits=History(sequences.batch) if keep and config.output_logits else None,
    )


def _drafter(call: Call, setup: Setup, request: Request, randomness: Randomness | None) -> OnlineAssistedGenerator:
    sequences, team, settings = setup.sequences, setup.team, setup.team.config
    return OnlineAssistedGenerator(
        sequences.ids[:, : sequences.prompt_length],
        team.draft,
        call.config,
        {},
        logits_processor=on_device(call.processors, execution_device(team.draft), call.input_ids.device),
        draft_length=settings.draft_length if setup.make_draft is not None else 0,
        draft_length_schedule=settings.draft_length_schedule,
        confidence_threshold=settings.confidence_threshold,
        padding=sequences.padding,
        vocab_size=call.model.config.get_text_config(decoder=True).vocab_size,
        randomness=randomness,
        recorder=request.recorder,
        weights=team.weights,
        make_decoder=setup.make_draft,
        states=setup.states,
        translates=team.translates,
    )


def _speculator(team: Team, drafter: OnlineAssistedGenerator, sequences: Sequences, branches: bool) -> Speculator:
    config = team.config
    if config.draft_length_schedule != "measured" or config.draft_length == 0:
        return DraftSpeculator(drafter)
    nodes = config.draft_nodes
    return MeasuredSpeculator(drafter, team.experience, sequences, config.prompt_lookup, nodes, branches)


def _output(engine: Engine, call: Call) -> Output:
    sequences, config = engine.sequences, call.config
    ids = sequences.padded(max(sequences.ends)).to(call.input_ids.device)
    if not config.return_dict_in_generate:
        return ids
    recorded: dict[str, Any] = {
        "scores": engine.scores.columns(sequences.lengths) if engine.scores is not None else None,
        "logits": engine.logits.columns(sequences.lengths) if engine.logits is not None else None,
    }
    recorded |= cache_argument((), engine.target.export())
    kind = GenerateEncoderDecoderOutput if call.model.config.is_encoder_decoder else GenerateDecoderOnlyOutput
    return kind(sequences=ids, **recorded)  # type: ignore[arg-type]
