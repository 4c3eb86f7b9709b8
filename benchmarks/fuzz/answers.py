"""A request served either way, and whether the two answers are the same."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import hf_osd

from ..families.checks import first_words
from .requests import Request

NEAR_TIE = 1e-3  # between the scores of two tokens; below, float32 does not tell which is larger
CLOSE = 1e-3  # largest difference of scores, relative to the largest of them, that counts as rounding
MARK, MORE = 9, 4  # a token behind an output, from where another call goes on, and how many tokens it generates


class Collector:
    """A streamer that keeps what it is given; an empty list marks the end."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        """Keep it."""
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        """Mark the end."""
        self.values.append([])


@dataclass(frozen=True)
class Answer:
    """
    What a call gave.

    Attributes:
        output (`torch.LongTensor` or `ModelOutput`, *optional*): As returned.
        error (`Exception`, *optional*): What was raised in its place.
        streamed (`list[list[int]]`): What a streamer got, call by call.
    """

    output: Any = None
    error: Exception | None = None
    streamed: list[list[int]] = field(default_factory=list)

    @property
    def sequences(self) -> torch.Tensor:
        """All tokens, `(batch, length)`."""
        return self.output if isinstance(self.output, torch.Tensor) else self.output.sequences


def plain(target: Any, request: Request, **more: Any) -> Answer:
    """Serve a request by the target alone."""
    return _answer(target.generate, request, more)


def ours(target: Any, request: Request, assistant: hf_osd.OnlineAssistant) -> Answer:
    """Serve a request with an assistant, by either entry point."""
    own = {**request.own, "online_assistant": assistant}
    if request.through_transformers:
        return _answer(target.generate, request, {**own, "custom_generate": hf_osd.online_decoding})
    return _answer(lambda **given: hf_osd.generate(target, **given), request, own)


def _answer(call: Callable[..., Any], request: Request, more: dict[str, Any]) -> Answer:
    streamer = Collector()
    given = {**request.inputs(), **copy.copy(request.settings), **more}
    try:
        output = call(**given, **({"streamer": streamer} if request.streams else {}))
    except Exception as error:
        return Answer(error=error)
    return Answer(output, None, streamer.values)


def difference(target: Any, request: Request, expected: Answer, actual: Answer) -> str | None:
    """
    Say how two answers differ, if they do. Where a near tie parts them, what follows is not compared.

    Args:
        target (`PreTrainedModel`): Is asked for the scores where tokens differ.
        request (`Request`): Of both.
        expected, actual (`Answer`): That of the target alone, and ours.
    """
    if expected.error is not None or actual.error is not None:
        return _errors(expected, actual)
    theirs, own = expected.sequences, actual.sequences
    if not torch.equal(theirs, own):
        is_tie = _is_near_tie(target, request, theirs, own)
        return None if is_tie else f"tokens {own.tolist()} and not {theirs.tolist()}"
    if expected.streamed != actual.streamed:
        return f"streamed {actual.streamed} and not {expected.streamed}"
    return _returned(expected.output, actual.output)


def _errors(expected: Answer, actual: Answer) -> str | None:
    if expected.error is not None and actual.error is not None:
        return None
    who = "generate alone" if expected.error is not None else "hf_osd alone"
    return f"{who} raises {first_words(expected.error or actual.error)}"


def _is_near_tie(target: Any, request: Request, theirs: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether, where each row that differs parts, both tokens have the same score up to rounding."""
    scores = plain(target, request, return_dict_in_generate=True, output_scores=True).output.scores
    prompt, width = theirs.shape[1] - len(scores), min(theirs.shape[1], own.shape[1])
    parted = theirs[:, :width] != own[:, :width]
    gaps = []
    for row in parted.any(dim=1).nonzero().flatten().tolist():
        column = int(parted[row].nonzero()[0])
        here = scores[column - prompt][row] if column >= prompt else torch.empty(0)
        gaps.append(float((here[theirs[row, column]] - here[own[row, column]]).abs()) if len(here) else math.inf)
    return bool(gaps) and all(gap <= NEAR_TIE for gap in gaps)


def _returned(expected: Any, actual: Any) -> str | None:
    """Compare scores and logits, where they are returned; ours are zero behind the end of a row."""
    if isinstance(expected, torch.Tensor) or isinstance(actual, torch.Tensor):
        is_same = isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor)
        return None if is_same else f"a {type(actual).__name__} and not a {type(expected).__name__}"
    for name in ("scores", "logits"):
        theirs, own = getattr(expected, name), getattr(actual, name)
        if (theirs is None) != (own is None) or len(theirs or ()) != len(own or ()):
            return f"{name} of {len(own or ())} columns and not {len(theirs or ())}"
        worst = max(itertools.starmap(_distance, zip(theirs or (), own or (), strict=True)), default=0.0)
        if worst > CLOSE:
            return f"{name} differ by {worst:.2g} of the largest"
    return None


def _distance(theirs: torch.Tensor, own: torch.Tensor) -> float:
    served = (own != 0).any(dim=1)
    theirs, own = theirs[served], own[served]
    finite = theirs.isfinite()
    if not torch.equal(finite, own.isfinite()):
        return math.inf
    if not finite.any():
        return 0.0
    return float((theirs - own)[finite].abs().max() / theirs[finite].abs().max().clamp(min=1.0))


def going_on(request: Request, answer: Answer) -> Request | None:
    """Return a request that goes on for a few tokens from the cache that a call returned for one prompt, if it did."""
    inputs, output = request.inputs(), answer.output
    if isinstance(output, torch.Tensor) or output.past_key_values is None:
        return None
    if len(output.sequences) > 1 or "input_ids" not in inputs:
        return None
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    more = torch.nn.functional.pad(output.sequences, (0, 1), value=MARK)
    seen = torch.nn.functional.pad(mask, (0, more.shape[1] - mask.shape[1]), value=1)
    given = {"input_ids": more, "attention_mask": seen}

    def made() -> dict[str, Any]:
        """A call fills the cache."""
        return {**given, "past_key_values": copy.deepcopy(output.past_key_values)}

    return Request(made, 1, {"max_new_tokens": MORE, "do_sample": False, "pad_token_id": 0}, kind=request.kind)
