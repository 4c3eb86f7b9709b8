"""The checks of one row. What plain `generate` gives is the truth."""

import hashlib
import io
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

import hf_osd

from .cases import Case

NEW_TOKENS = 32  # of an output
NEW_TOKENS_LEARNING = 12  # of an output where the draft learns
REQUESTS_LEARNING, UPDATE_EVERY = 6, 2  # requests while the draft learns, and between two updates
DRAFT_LENGTH = 5  # tokens of each proposal; constant, so that what is verified does not depend on the clock
ROUNDINGS = 8  # units in the last place of the largest logit, within which two logits may change places
BATCHES = (1, 4)
LONGEST_WHY = 160  # characters of an error that are kept

# Verdicts, the worst first.
WRONG = "WRONG"
CRASH = "crash"
FAILED_UPDATE = "update failed"
UNCOUNTED = "equal, nothing counted"
ALONE = "as each row alone"
REFUSED = "refused"
NOT_SERVED = "not served by generate either"
STATIC = "does not learn"
PLAIN = "plain"
LEARNS = "learns"
SPECULATIVE = "speculative"
VERDICTS = (
    WRONG, CRASH, FAILED_UPDATE, UNCOUNTED, ALONE, REFUSED, NOT_SERVED, STATIC, PLAIN, LEARNS, SPECULATIVE,
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """
    What one check found.

    Attributes:
        verdict (`str`): One of `VERDICTS`.
        why (`str`): The reasons of a fallback, the first words of an error, or how large a difference is.
        verified (`int`): Guesses of the draft, or of the lookup in the text, that the target judged.
        accepted (`int`): Those that were right.
    """

    verdict: str
    why: str = ""
    verified: int = 0
    accepted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return what is not empty, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value or name == "verdict"}


@dataclass(frozen=True)
class Request:
    """What the inputs of a request are made from."""

    batch: int
    seed: int
    new_tokens: int


@dataclass(frozen=True)
class Truth:
    """
    What plain `generate` gave.

    Attributes:
        sequences (`torch.LongTensor` of shape `(batch, length)`): Its output.
        steps (`Callable[[], Sequence[torch.FloatTensor]]`): Gives the logits of each generated column, of shape
            `(batch, vocab)`, from another call: some models return other sequences where they are asked for more.
        request (`Request`): What it was asked for.
    """

    sequences: torch.Tensor
    steps: Callable[[], Sequence[torch.Tensor]]
    request: Request


@dataclass(frozen=True)
class Difference:
    """How an output differs from the truth: see [`largest_gap`]; whether each row is what it would be alone."""

    gap: float
    is_as_alone: bool = False


class NotServedError(Exception):
    """Plain `generate` does not serve this either."""


def check(case: Case) -> dict[str, Cell]:
    """Return what every check of a row found, by its name."""
    found: dict[str, Cell] = {}
    if case.target is not None:
        found.update(_as_target(case))
    if case.draft is not None:
        found.update(_as_draft(case))
    return found


def _as_target(case: Case) -> Iterator[tuple[str, Cell]]:
    several, usable = len(case.drafts) > 1, list(case.drafts.values())[-1]
    for batch in BATCHES:
        for name, draft in case.drafts.items():
            cell = decoding(case, draft, batch)
            yield f"batch {batch}, {name} draft" if several else f"batch {batch}", cell
            usable = draft if cell.verdict == SPECULATIVE else usable
    if case.samples:
        for batch in BATCHES:
            yield f"sampling, batch {batch}", sampling(case, usable, batch)
    if case.learns:
        yield "learning with the gate", learning(case, usable, gate=True)
        yield "learning without the gate", learning(case, usable, gate=False)


def _as_draft(case: Case) -> Iterator[tuple[str, Cell]]:
    case = replace(case, target=case.host, inputs=case.host_inputs, truths={})
    for batch in BATCHES:
        yield f"as draft, batch {batch}", decoding(case, case.draft, batch)
    if case.learns:
        yield "as draft, learning without the gate", learning(case, case.draft, gate=False)


def decoding(case: Case, draft: Any, batch: int) -> Cell:
    """Compare greedy outputs with plain `generate`, for a few prompts."""
    return _guarded(_decoding, case, draft, batch, {"do_sample": False})


def sampling(case: Case, draft: Any, batch: int) -> Cell:
    """Sample: from the most likely token alone, which is greedy decoding, then freely, which has to run at least."""
    return _guarded(_sampling, case, draft, batch)


def learning(case: Case, draft: Any, gate: bool) -> Cell:
    """Compare outputs while the draft learns, and the target's weights before and after, bit by bit."""
    return _guarded(_learning, case, draft, gate)


def _guarded(run: Any, *arguments: Any) -> Cell:
    """Turn whatever is raised into a verdict."""
    try:
        return run(*arguments)
    except NotServedError as error:
        return Cell(NOT_SERVED, first_words(error.__cause__))
    except hf_osd.HfOsdError as error:
        return Cell(REFUSED, first_words(error))
    except Exception as error:
        return Cell(CRASH, first_words(error))


def first_words(error: Any) -> str:
    """Return the type and some words of an error, without paths of this machine."""
    words = re.sub(r"(/[\w.+-]+){2,}", "...", " ".join(str(error).split()))
    shown = words if len(words) <= LONGEST_WHY else words[:LONGEST_WHY].rsplit(" ", 1)[0] + " ..."
    return f"{type(error).__name__}: {shown}"


def _decoding(case: Case, draft: Any, batch: int, settings: Mapping[str, Any]) -> Cell:
    truths = [_truth(case, batch, seed, NEW_TOKENS) for seed in range(max(case.tries // batch, 1))]
    with _assistant(case, draft, learn=False) as assistant:
        found = [_compare(case, assistant, truth, settings) for truth in truths]
        return judge(found, assistant.stats())


def _sampling(case: Case, draft: Any, batch: int) -> Cell:
    cell = _decoding(case, draft, batch, {"do_sample": True, "top_k": 1})
    truth = _truth(case, batch, 0, NEW_TOKENS)
    with _assistant(case, draft, learn=False) as assistant:
        ours, expected = _ours(case, assistant, truth, {"do_sample": True, "top_k": 50}).shape, truth.sequences.shape
    return cell if ours == expected else Cell(WRONG, f"shape {tuple(ours)}, not {tuple(expected)}")


def _learning(case: Case, draft: Any, gate: bool) -> Cell:
    truths = [_truth(case, 1, seed, NEW_TOKENS_LEARNING) for seed in range(REQUESTS_LEARNING)]
    before = _fingerprint(case.target)
    small = dict(update_every=UPDATE_EVERY, steps_per_update=2, batch_size=2, gate=gate)
    if gate:
        small["draft_length_schedule"] = "measured"  # the default: the clock decides what is verified, and no output
    with _LastFailure() as failure, _assistant(case, draft, **small) as assistant:
        found = [_compare(case, assistant, truth, {"do_sample": False}) for truth in truths]
        stats = assistant.stats()
    if _fingerprint(case.target) != before:
        return Cell(WRONG, "the target's weights have changed")
    cell = judge(found, stats)
    if cell.verdict == WRONG:
        return cell
    if stats.failed_updates:
        return Cell(FAILED_UPDATE, failure.why)
    return Cell(LEARNS if stats.learned_steps else STATIC, cell.why)


def _assistant(case: Case, draft: Any, **settings: Any) -> hf_osd.OnlineAssistant:
    constant = dict(draft_length=DRAFT_LENGTH, draft_length_schedule="constant")
    config = hf_osd.OnlineConfig(**{**constant, **settings})
    if isinstance(draft, str):
        return hf_osd.OnlineAssistant.from_pretrained(draft, case.target, config)
    return hf_osd.OnlineAssistant(draft, case.target, config)


def _compare(case: Case, assistant: Any, truth: Truth, settings: Mapping[str, Any]) -> Difference:
    ours = _ours(case, assistant, truth, settings)
    gap = largest_gap(truth, ours, case.precision)
    return Difference(gap, bool(gap) and truth.request.batch > 1 and _are_alone(case, truth.request, ours))


def _truth(case: Case, batch: int, seed: int, new_tokens: int) -> Truth:
    """Return what plain greedy decoding gives; asked for once, since the target does not change."""
    request = Request(batch, seed, new_tokens)
    if request not in case.truths:
        sequences = _plain(case, case.inputs(batch, seed), new_tokens)
        case.truths[request] = Truth(sequences, partial(_steps, case, request), request)
    return case.truths[request]


def _steps(case: Case, request: Request) -> Sequence[torch.Tensor]:
    more = {"return_dict_in_generate": True, "output_logits": True}
    settings = {"max_new_tokens": request.new_tokens, "do_sample": False, **case.settings, **more}
    with case.around():
        return case.target.generate(**case.inputs(request.batch, request.seed), **settings).logits


def _plain(case: Case, inputs: Mapping[str, Any], new_tokens: int) -> torch.Tensor:
    settings = {"max_new_tokens": new_tokens, "do_sample": False, **case.settings}
    try:
        with case.around():
            output = case.target.generate(**inputs, **settings)
    except Exception as error:
        raise NotServedError from error
    return _ids(output)


def _ours(case: Case, assistant: Any, truth: Truth, settings: Mapping[str, Any]) -> torch.Tensor:
    request = truth.request
    settings = {"max_new_tokens": request.new_tokens, **settings, **case.settings}
    inputs = case.inputs(request.batch, request.seed)
    with case.around():
        return _ids(hf_osd.generate(case.target, **inputs, online_assistant=assistant, **settings))


def _ids(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.sequences


def largest_gap(truth: Truth, ours: torch.Tensor, precision: torch.dtype = torch.float32) -> float:
    """
    Return the largest gap, over the rows, between the logits of the two tokens at the row's first difference.

    Gaps within rounding count as none. What differs in length, or in the prompt, is infinitely far apart.

    Args:
        truth (`Truth`): Plain output.
        ours (`torch.LongTensor` of shape `(batch, length)`): Output to judge.
        precision (`torch.dtype`, defaults to `torch.float32`): What the logits were computed in.
    """
    expected = truth.sequences
    if expected.shape != ours.shape:
        return math.inf
    rows = (expected != ours).any(dim=1).nonzero().flatten().tolist()
    steps = truth.steps() if rows else []
    return max((_gap(expected[row], ours[row], [step[row] for step in steps], precision) for row in rows), default=0.0)


def _gap(expected: torch.Tensor, ours: torch.Tensor, steps: Sequence[torch.Tensor], precision: torch.dtype) -> float:
    column = int((expected != ours).nonzero()[0])
    step = column - (len(expected) - len(steps))  # the last columns are the generated ones
    if step < 0:
        return math.inf
    logits = steps[step].double()
    gap = float((logits[expected[column]] - logits[ours[column]]).abs())
    rounding = ROUNDINGS * torch.finfo(precision).eps * float(logits[logits.isfinite()].abs().max())
    return gap if gap > rounding else 0.0


def _are_alone(case: Case, request: Request, ours: torch.Tensor) -> bool:
    """Whether each row of a padded batch is what the target gives for it alone, which its own batch does not."""
    inputs = case.inputs(request.batch, request.seed)
    if set(inputs) != {"input_ids", "attention_mask"} or case.target.config.is_encoder_decoder:
        return False
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        kept = mask.bool()
        alone = {"input_ids": ids[kept][None], "attention_mask": mask[kept][None]}
        expected = _plain(case, alone, request.new_tokens)[0, int(kept.sum()) :]
        if not torch.equal(expected, ours[row, len(ids) :]):
            return False
    return True


def judge(found: Sequence[Difference], stats: Any) -> Cell:
    """
    Return the verdict on some requests.

    Args:
        found (`Sequence[Difference]`): How each output differs from the truth.
        stats (`OnlineStats`): Counters of the assistant that served them, and nothing else.
    """
    reasons = "; ".join(getattr(stats, "fallback_reasons", {}))
    verified, accepted = _guesses(stats)
    if gaps := [one.gap for one in found if one.gap and not one.is_as_alone]:
        wrong = f"{len(gaps)} of {len(found)} outputs, by {max(gaps):.2g} between two logits"
        return Cell(WRONG, wrong, verified, accepted)
    if any(one.gap for one in found):
        return Cell(ALONE, reasons, verified, accepted)
    if verified:
        return Cell(SPECULATIVE, reasons, verified, accepted)
    return Cell(PLAIN if getattr(stats, "fallbacks", 0) else UNCOUNTED, reasons)


def _guesses(stats: Any) -> tuple[int, int]:
    return stats.draft_tokens + stats.lookup_tokens, stats.accepted_tokens + stats.accepted_lookup_tokens


def _fingerprint(model: Any) -> str:
    """Return a digest of every bit of a model's weights. Not of its `state_dict`, which bitsandbytes makes anew."""
    buffer = io.BytesIO()
    torch.save({**dict(model.named_parameters()), **dict(model.named_buffers())}, buffer)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


class _LastFailure(logging.Handler):
    """Keeps the last error that learning has logged: serving goes on, and the error is nowhere else."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.why = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the error of a record that has one."""
        if record.exc_info and record.exc_info[1]:
            self.why = first_words(record.exc_info[1])

    def __enter__(self) -> "_LastFailure":
        logging.getLogger("hf_osd").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("hf_osd").removeHandler(self)
