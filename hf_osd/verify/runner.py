"""Runs a verification: each prompt is decoded by plain `generate`, then in every other way."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ..assistant import OnlineAssistant
from ..config import OnlineConfig
from ..evaluation.contenders import Assisted, Contender, assistant_of, stock, takes_draft
from ..evaluation.encoding import Inputs, end_tokens, join, until_end
from ..evaluation.exactness import Answer, Difference, find_difference, measure_rounding, plain_answers
from ..evaluation.models import Pair, generate_options
from .results import Outcome, Verification

BATCH = 4
GENERATE = f"generate, batches of {BATCH}"
ASSISTED = "transformers assisted"
LOOKUP = "transformers prompt lookup"
OURS = "hf_osd"
OURS_IN_BATCHES = f"hf_osd, batches of {BATCH}"


def verify(
    pair: Pair,
    requests: Sequence[Inputs],
    *,
    max_new_tokens: int = 64,
    observer: Callable[[], None] = lambda: None,
) -> Verification:
    """
    Decode prompts greedily in four ways, and compare each output with that of plain `generate`.

    These are `generate` in batches of four, transformers' assisted generation (or its prompt lookup, where it cannot
    take the draft), and hf_osd, one prompt at a time and in batches of four. The draft does not learn: what it knows
    decides what is proposed, not what is written.

    Args:
        pair (`Pair`): The models.
        requests (`Sequence[Inputs]`): Prompts, as [`~hf_osd.evaluation.encoding.encode_prompts`] returns them.
        max_new_tokens (`int`, defaults to 64): Longest answer.
        observer (`Callable[[], None]`, *optional*): Called after every four prompts.

    Returns:
        `Verification`: What differs, by way to decode, and what rounding explains.
    """
    options = generate_options(pair, max_new_tokens)
    with ExitStack() as stack:
        decoders = _open_decoders(pair, stack)
        outcomes = {GENERATE: Outcome()} | {name: Outcome(one.assistant is not None) for name, one in decoders.items()}
        found = Verification(str(pair.target.dtype).removeprefix("torch."), outcomes)
        for start in range(0, len(requests), BATCH):
            _decode_group(found, pair.target, decoders, requests[start : start + BATCH], options)
            observer()
        for name, decoder in decoders.items():
            decoder.report(outcomes[name])
    return found


@dataclass(frozen=True, slots=True)
class _Decoder:
    """A way to decode: one prompt after the other, or a group at once."""

    contender: Contender
    in_batches: bool = False
    assistant: OnlineAssistant | None = None

    def write(self, group: Sequence[Inputs], options: dict[str, Any]) -> list[torch.Tensor]:
        """Return the new tokens of each prompt, `(new,)`, padding included."""
        calls = [_joined(self.contender.target, group, options)] if self.in_batches else group
        return [row for inputs in calls for row in self.contender.answer(inputs, **options)[0]]

    def report(self, outcome: Outcome) -> None:
        """Note how much of the work was speculation."""
        if self.assistant is not None:
            stats = self.assistant.stats()
            outcome.tokens_per_pass = stats.tokens_per_target_pass
            outcome.fallbacks = dict(stats.fallback_reasons)


def _open_decoders(pair: Pair, stack: ExitStack) -> dict[str, _Decoder]:
    """Make the ways to decode. Each of hf_osd's has its own assistant, since lookups remember outputs."""
    target, config = pair.target, OnlineConfig(learn=False)
    alone, batched = (stack.enter_context(assistant_of(pair, config)) for _ in range(2))
    stocks = ASSISTED if takes_draft(pair) else LOOKUP
    return {
        stocks: _Decoder(stock(stocks, pair)),
        OURS: _Decoder(Assisted(OURS, target, alone), assistant=alone),
        OURS_IN_BATCHES: _Decoder(Assisted(OURS_IN_BATCHES, target, batched), in_batches=True, assistant=batched),
    }


def _decode_group(
    found: Verification,
    target: Any,
    decoders: dict[str, _Decoder],
    group: Sequence[Inputs],
    options: dict[str, Any],
) -> None:
    """Decode a few prompts in every way, and compare; their logits are then dropped."""
    answers = [plain_answers(target, one, options)[0] for one in group]
    batch = plain_answers(target, _joined(target, group, options), options)
    outputs = {GENERATE: [one.tokens for one in batch]}
    outputs |= {name: decoder.write(group, options) for name, decoder in decoders.items()}
    for name, rows in outputs.items():
        same = batch if name == GENERATE or decoders[name].in_batches else None
        found.outcomes[name].differences += _compare(target, found.requests, answers, rows, same)
    for prompt, answer, other in zip(group, answers, batch, strict=True):
        found.rounding = max(found.rounding, measure_rounding(target, prompt["input_ids"][0], answer, other))
    found.requests += len(group)
    found.tokens += sum(len(answer.tokens) for answer in answers)


def _joined(target: Any, group: Sequence[Inputs], options: dict[str, Any]) -> Inputs:
    return join(group, options["pad_token_id"], right=target.config.is_encoder_decoder)


def _compare(
    target: Any, first: int, answers: Sequence[Answer], rows: Sequence[torch.Tensor], batch: Sequence[Answer] | None
) -> list[Difference]:
    """Compare the outputs of a group; `batch` has those of `generate` where they were written in a batch."""
    found, ends = [], end_tokens(target)
    for row, (answer, tokens) in enumerate(zip(answers, rows, strict=True)):
        tokens = until_end(tokens.to(answer.tokens.device), ends)
        in_batch = None if batch is None else batch[row].tokens
        found.append(find_difference(first + row, answer, tokens, target.dtype, in_batch))
    return [one for one in found if one is not None]
