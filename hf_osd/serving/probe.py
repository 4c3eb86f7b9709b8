"""
Tries a decoder on a model: does it give the logits that `generate` would?

The architecture alone does not tell: a model may bring its own forward, `generate` and preparation of inputs, and
users add hooks and adapters. So a few tokens are decoded by the calls that `generate` makes, one token at a time, and
then the decoder is fed the same tokens in pieces, with a rollback. This is done once for each state of a model (its
code, hooks, adapters and dtype), and costs a dozen forwards of a few tokens.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn.modules import module as global_hooks
from transformers import PreTrainedModel
from transformers.utils import logging

from .._compat import attention_implementation, plain_logits
from .preparation import Preparation, prepare
from .transfer import autocast_dtype
from .weights import describe

logger = logging.get_logger(__name__)

_MOST_FINDINGS = 256  # findings kept for one model; beyond that all are forgotten
_NEW = 5  # tokens that a trial decodes
_PROMPT = 3  # tokens of a trial's prompts; with `_NEW` 8, less than the windows of real models
_SETTINGS = {"max_new_tokens": _NEW, "do_sample": False, "num_beams": 1, "num_return_sequences": 1} | {
    "stop_strings": None,  # overrides a model's own generation config
    "cache_implementation": None,
}
_TOLERANCE = 1e-3  # standard deviations of the logits: largest difference that counts as rounding, in float32
# Likewise, in half precision: rounding moves SmolLM2's by up to .16, a shift of two tokens by one position by .33.
_HALF_TOLERANCE = 0.25
_DRAFT_TOLERANCE = 1.0  # likewise, for drafts, whose errors cost speed alone


class Feeds(Protocol):
    """The part of a decoder that a trial uses."""

    @property
    def takes_trees(self) -> bool:
        """See [`~hf_osd.serving.decoder.Decoder.takes_trees`]."""
        ...

    def feed(
        self, ids: torch.Tensor, ends: Sequence[int], keep: int, parents: Sequence[Sequence[int]] | None = None
    ) -> torch.Tensor:
        """See [`~hf_osd.serving.decoder.Decoder.feed`]."""
        ...

    def select(self, starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """See [`~hf_osd.serving.decoder.Decoder.select`]."""
        ...

    def rollback(self, ends: Sequence[int]) -> None:
        """See [`~hf_osd.serving.decoder.Decoder.rollback`]."""
        ...

    def release(self, failed: bool = False) -> None:
        """See [`~hf_osd.serving.decoder.Decoder.release`]."""
        ...


MakeDecoder = Callable[[Sequence[int], int, Preparation], Feeds]


@dataclass(frozen=True, slots=True)
class Trial:
    """
    A request to try a decoder for.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(batch, prompt)`): Its prompts.
        padding (`Sequence[int]`): Padding columns of each row.
        preparation (`Preparation`, *optional*): The inputs of its passes; `None` for tokens alone.
        generation_config (`Any`): As `generate` prepared it.
        returns_cache (`bool`): Whether the caller gets the cache.
        is_draft (`bool`): Whether the model drafts: it is fed chains, and need not be exact.
    """

    input_ids: torch.Tensor
    padding: Sequence[int]
    preparation: Preparation | None = None
    generation_config: Any = None
    returns_cache: bool = False
    is_draft: bool = False

    @property
    def has_extras(self) -> bool:
        """Whether passes get more than tokens, so that only the request itself can be tried."""
        return self.preparation is not None and bool(self.preparation.extras or self.preparation.every_pass)


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether a decoder suits a model, and if not, why; whether it takes trees on it."""

    suits: bool
    why: str = ""
    takes_trees: bool = False


@dataclass(slots=True)
class _Failures:
    """Trials that ended in an exception, which decides nothing: 0, 1, 3, 7 ... requests go by before the next."""

    count: int = 0
    waiting: int = 0  # requests until the next trial
    why: str = ""


_findings: "weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, Finding | _Failures]]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def probe(model: PreTrainedModel, kind: str, make: MakeDecoder, trial: Trial) -> Finding:
    """
    Say whether a decoder gives a model's own logits for requests like this one.

    Args:
        model (`PreTrainedModel`): The model.
        kind (`str`): Name of the decoder.
        make (`Callable`): Makes one from padding, columns and preparation.
        trial (`Trial`): The request. Its rows and its first-pass inputs are tried; of text alone, a few tokens.
    """
    known = _findings.setdefault(model, {})
    if len(known) > _MOST_FINDINGS:
        known.clear()
    key = _key(model, kind, trial)
    found = known.get(key)
    if isinstance(found, Finding):
        return found
    failures = found or _Failures()
    if failures.waiting:
        failures.waiting -= 1
        return Finding(False, failures.why)
    try:
        known[key] = result = _try(model, make, trial)
    except Exception as error:  # of any model, or a lack of memory: said, and tried again
        known[key] = failures
        result = _note_failure(model, kind, failures, error)
    return result


def _note_failure(model: PreTrainedModel, kind: str, failures: _Failures, error: Exception) -> Finding:
    failures.count += 1
    failures.waiting = 2 ** (failures.count - 1) - 1
    failures.why = f"its check failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    log = logger.info if failures.count > 1 else logger.warning
    log("%s does not go on the %s cache for now, %s", describe(model), kind, failures.why)
    return Finding(False, failures.why)


def _key(model: PreTrainedModel, kind: str, trial: Trial) -> tuple[Any, ...]:
    extras = trial.preparation.kind if trial.preparation is not None else None
    return kind, trial.is_draft, len(trial.padding) > 1, extras, autocast_dtype(trial.input_ids.device), _state(model)


def _state(model: PreTrainedModel) -> int:
    """Return a number that changes where the model may compute something else than before."""
    preparation = model.prepare_inputs_for_generation
    owner: Any = getattr(preparation, "__self__", model)  # a PEFT model puts its own in the place of its base's
    adapters = (str(getattr(owner, "active_adapter", "")), str(getattr(owner, "peft_type", "")))
    named = (getattr(preparation, "__qualname__", ""), *adapters, attention_implementation(model), str(model.dtype))
    everywhere = (*global_hooks._global_forward_hooks.values(), *global_hooks._global_forward_pre_hooks.values())
    state = tuple(map(_module_state, model.modules())), tuple(map(_code, everywhere)), named
    return hash((*state, str(model.device)))


def _module_state(module: torch.nn.Module) -> tuple[Any, ...]:
    weight = module._parameters.get("weight")  # quantisation in place changes its type
    hooks = map(_code, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
    return id(type(module)), id(type(weight)), tuple(hooks), _code(module.__dict__.get("forward"))


def _code(function: Any) -> int:
    """Identify a function by its code, since PEFT makes new hooks of the same code for every request."""
    while isinstance(function, partial):
        function = function.func
    return id(getattr(function, "__code__", type(function) if callable(function) else None))


def _try(model: PreTrainedModel, make: MakeDecoder, trial: Trial) -> Finding:
    found: list[Finding] = []
    if trial.has_extras:
        assert trial.preparation is not None
        return _compare(model, make, trial, trial.input_ids, trial.generation_config, trial.preparation.model_kwargs)

    def decode(target: Any, input_ids: torch.Tensor, generation_config: Any, **prepared: Any) -> torch.Tensor:
        for unused in ("logits_processor", "stopping_criteria"):
            prepared.pop(unused, None)
        found.append(_compare(target, make, trial, input_ids, generation_config, prepared))
        return input_ids

    call: Any = model.generate
    call(**_short_prompts(trial), custom_generate=decode, **_SETTINGS)
    return found[0]


def _short_prompts(trial: Trial) -> dict[str, torch.Tensor]:
    """Prompts of two lengths, made of the request's own tokens, since others may be placeholders of images."""
    rows = []
    for row, pad in enumerate(trial.padding):
        text = trial.input_ids[row, pad:]
        rows.append(text[torch.arange(_PROMPT, device=text.device).mul(7919).add(row) % len(text)])
    mask = torch.ones(len(rows), _PROMPT, dtype=torch.long, device=trial.input_ids.device)
    mask[1::2, 0] = 0
    return {"input_ids": torch.stack(rows), "attention_mask": mask}


def _compare(
    model: PreTrainedModel,
    make: MakeDecoder,
    trial: Trial,
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> Finding:
    text, expected = plain_logits(model, input_ids, generation_config, model_kwargs, _NEW)
    width = input_ids.shape[1]
    padding = list(trial.padding) if trial.has_extras else [row % 2 for row in range(len(input_ids))]
    decoder = make(padding, width + _NEW, prepare(model, input_ids, model_kwargs, padding))
    difference = _largest_difference(decoder, text, width, expected)
    allowed = _tolerance(model, trial) * float(expected.std())
    if difference > allowed:
        return Finding(False, f"its logits depend on how many tokens it is fed at once, by up to {difference:.2g}")
    may_branch = decoder.takes_trees and not trial.is_draft
    takes_trees = may_branch and _tree_difference(decoder, text, width, expected) <= allowed
    decoder.release()
    return Finding(True, takes_trees=takes_trees)


def _tolerance(model: PreTrainedModel, trial: Trial) -> float:
    if trial.is_draft:
        return _DRAFT_TOLERANCE
    exact = model.dtype in (torch.float32, torch.float64) and autocast_dtype(trial.input_ids.device) is None
    return _TOLERANCE if exact else _HALF_TOLERANCE


def _largest_difference(decoder: Feeds, text: torch.Tensor, width: int, expected: torch.Tensor) -> float:
    """Feed the prompt, several tokens of which some are taken back, one behind a cache, and several again."""
    rows = len(text)
    worst = 0.0
    for end, lag, keep in ((width, 0, 1), (width + 3, 1, 2), (width + 2, 1, 1), (width + 4, 2, 2)):
        ends = [end - lag * (row % 2) for row in range(rows)]  # every second row lags behind
        logits = decoder.feed(text, ends, keep)
        for row, last in enumerate(ends):
            worst = max(worst, _distance(logits[row], expected[row, last - width + 1 - keep : last - width + 1]))
        decoder.rollback([min(last, width + 1) for last in ends])
    return worst


def _tree_difference(decoder: Feeds, text: torch.Tensor, width: int, expected: torch.Tensor) -> float:
    """Feed two tokens of the text beside a wrong one, and another behind them once they have been moved."""
    rows, start, tree = len(text), width + 1, text.clone()
    tree[:, start] = text[:, 0]
    tree[:, start + 1 : start + 3] = text[:, start : start + 2]
    logits = decoder.feed(tree, [start + 3] * rows, 4, [[-1, -1, 1]] * rows)
    worst = _distance(logits[:, [0, 2, 3]], expected[:, 1:4])
    decoder.select([start] * rows, [[1, 2]] * rows)
    decoder.rollback([start + 2] * rows)
    return max(worst, _distance(decoder.feed(text, [start + 3] * rows, 1), expected[:, 4:5]))


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max().nan_to_num(nan=torch.inf))
