"""
Suite `promise`: never more than 3% slower than our own plain decoding over a stream, where that is hard to keep.

Every case is decoded by an assistant with its default settings and by one with draft_length=0, request by request, in
turns. A third assistant, with draft_length=0 too, shows how far two equal ones are apart on this machine.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_osd.bench.figures import ratios, report
from hf_osd.config import OnlineConfig
from hf_osd.evaluation.contenders import Contender, Generate
from hf_osd.evaluation.encoding import Inputs
from hf_osd.evaluation.prompts import Prompt, is_held_out, stdlib_functions
from hf_osd.evaluation.race import Race
from hf_osd.evaluation.streams import batches

from .session import Session

LIMIT = 1.03
PLAIN = "hf_osd, plain"
CONTROL = "hf_osd, plain again"
CASE = "hf_osd"
GENERATE = "transformers plain"
BATCH, BATCHES = 32, 4

_SOURCE_INSTRUCTION = "Please write the doc of the following code:\n"


@dataclass(frozen=True, slots=True)
class Case:
    """One stream, one draft, one configuration; requests may be batches, and the one that warms up is none of them."""

    name: str
    draft: PreTrainedModel
    config: OnlineConfig
    requests: Sequence[Inputs]
    warm_up: Inputs


def run(session: Session) -> dict[str, Any]:
    """
    Measure every case.

    Returns:
        `dict[str, Any]`: By case: `ratio`, its total time over that of our plain decoding, without time of learning;
        `ratio_with_learning`; `control`, the ratio of two equal plain decodings; `plain_over_generate`, that of our
        plain decoding over transformers'; and whether the promise was `kept`.
    """
    return {"limit": LIMIT, "cases": {case.name: _measure(session, case) for case in cases(session)}}


def cases(session: Session) -> list[Case]:
    """
    Return the hard cases, and the stream as it is for comparison.

    Bad drafts go without prompt lookup, whose gains would hide what they cost.
    """
    pair, stream = session.pair, session.streams[0]
    static, draft_only = session.static(), session.static(prompt_lookup=False)
    assert session.next_topic is not None, "the promise is tested with a change of topic"
    half = max(len(stream.requests) // 2, 1)
    shifted = [*stream.requests[:half], *session.next_topic.requests[:half]]
    pad = session.options["pad_token_id"]
    batched, other = (
        batches([*one.requests, *one.spare], BATCH, pad)[:BATCHES] for one in (stream, session.next_topic)
    )
    one = stream.warm_up
    return [
        Case("the stream as it is", pair.draft, static, stream.requests, one),
        Case("a random draft", random_like(pair.draft, session.seed), draft_only, stream.requests, one),
        Case("a draft as slow as the target", copy.deepcopy(pair.target), draft_only, stream.requests, one),
        Case("a sudden change of topic", pair.draft, static, shifted, one),
        Case("a sudden change of topic, learning", copy.deepcopy(pair.draft), session.online(), shifted, one),
        Case(f"batch {len(batched[0]['input_ids'])}", pair.draft, static, batched, other[0]),
    ]


def other_topic(count: int) -> list[Prompt]:
    """Return prompts of another topic than docstrings and than most files: source code to be documented."""
    sources = [source for _, source in stdlib_functions(keep=is_held_out)]
    return [_SOURCE_INSTRUCTION + source for source in sources[:count]]


def random_like(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a model of the same architecture with random weights."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    drawn: PreTrainedModel = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).to(model.device).eval()
    torch.set_rng_state(state)
    return drawn


def _measure(session: Session, case: Case) -> dict[str, Any]:
    figures = report(_race(session, case))
    found = figures["contenders"]
    plain = ratios(found, PLAIN)
    return figures | {
        "ratio": plain[CASE],
        "ratio_with_learning": plain[CASE] + found[CASE]["learning_seconds"] / found[PLAIN]["total_seconds"],
        "control": plain[CONTROL],
        "plain_over_generate": 1 / plain[GENERATE],
        "kept": plain[CASE] <= LIMIT,
        "batch": len(case.requests[0]["input_ids"]),
    }


def _race(session: Session, case: Case) -> Race:
    nothing = session.static(draft_length=0)
    with ExitStack() as stack:
        contenders: list[Contender] = [
            Generate(GENERATE, session.pair.target),
            session.assisted(stack, PLAIN, nothing),
            session.assisted(stack, CASE, case.config, case.draft),
            session.assisted(stack, CONTROL, nothing),
        ]
        return session.race(contenders, case.requests, case.name, warm_up=case.warm_up)
