"""
Seconds on a real model: plain decoding, the lookup alone, a static draft and an online draft, interleaved.

Every request goes to every contender, and who goes first changes with each. Learning counts: an update runs inline,
and the request that waits for it pays. A draft that has learned nothing stands for the lookup alone: it is never worth
a proposal.

    python benchmarks/real.py --target HuggingFaceTB/SmolLM2-135M-Instruct --assistant hf_osd/demo/smollm2 \
        --prompts gsm8k.jsonl --prompts spider.jsonl --prompts python.jsonl --requests 200 --output real.json
"""

import argparse
import copy
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import read_prompts, write_result
from rich.progress import track

from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.bench.contenders import Assisted, Contender, Generate, Sample
from hf_osd.demo.models import Pair, encode_prompts, generate_options, load_pair, stock_helper
from hf_osd.drafts.features import FeatureDraft

PLAIN, STOCK, LOOKUP, STATIC, ONLINE = "plain", "transformers lookup", "lookup alone", "static", "online"
OVER = ((ONLINE, PLAIN), (ONLINE, STATIC), (ONLINE, LOOKUP), (STATIC, PLAIN), (LOOKUP, PLAIN), (STOCK, PLAIN))


def contenders(pair: Pair, online: dict[str, Any]) -> list[Contender]:
    """Make the contenders; each has a draft of its own."""
    fixed = OnlineConfig(learn=False)
    static, learner = copy.deepcopy(pair.draft), copy.deepcopy(pair.draft)
    cold = FeatureDraft.of(pair.target)
    return [
        Generate(PLAIN, pair.target),
        Generate(STOCK, pair.target, settings=stock_helper(pair.draft)),
        Assisted(LOOKUP, pair.target, OnlineAssistant(cold, pair.target, fixed)),
        Assisted(STATIC, pair.target, OnlineAssistant(static, pair.target, fixed)),
        Assisted(
            ONLINE, pair.target, OnlineAssistant(learner, pair.target, OnlineConfig.for_draft(learner, **online))
        ),
    ]


def serve(pair: Pair, path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Serve one stream."""
    prompts = read_prompts(path, options.requests + 1)
    requests = encode_prompts(pair, prompts, options.max_new_tokens)
    settings = generate_options(pair, options.max_new_tokens)
    racers = contenders(pair, options.online)
    for racer in racers:  # first calls pay for allocations that later ones do not
        racer.answer(requests[-1], **settings)
    rounds, different = [], dict.fromkeys((racer.name for racer in racers), 0)
    for index, request in enumerate(track(requests[:-1], description=Path(path).stem, transient=True)):
        turn = index % len(racers)
        taking_part = [
            racer for racer in (*racers[turn:], *racers[:turn]) if index % options.every == 0 or ours(racer)
        ]
        answers = {racer.name: racer.answer(request, **settings) for racer in taking_part}
        rounds.append({name: sample for name, (_, sample) in answers.items()})
        for name, (tokens, _) in answers.items() if PLAIN in answers else ():
            different[name] += not torch.equal(tokens, answers[PLAIN][0])
    online = racers[-1]
    assert isinstance(online, Assisted)
    return figures(rounds, online.assistant) | {"outputs_that_differ_from_plain": different}


def ours(racer: Contender) -> bool:
    """Whether a contender is served by an assistant, which has to see every request."""
    return isinstance(racer, Assisted)


def figures(rounds: list[dict[str, Sample]], online: OnlineAssistant) -> dict[str, Any]:
    """Say what a stream took and gave."""
    last, stats = rounds[-(len(rounds) // 4) :], online.stats()
    judged = online.journal.requests
    quarter = max(len(judged) // 4, 1)
    return {
        "requests": len(rounds),
        "last_quarter": {f"{one} over {other}": ratio(last, one, other) for one, other in OVER},
        "last_quarter_serving_alone": {
            f"{one} over {other}": ratio(last, one, other, learning=False) for one, other in OVER
        },
        "whole_run": {f"{one} over {other}": ratio(rounds, one, other) for one, other in OVER},
        "tokens_per_second_last_quarter": {name: round(1 / per_token(last, name), 1) for name in rounds[0]},
        "acceptance_first_and_last_quarter": [
            round(fmean(one.acceptance for one in part), 3) for part in (judged[:quarter], judged[-quarter:])
        ],
        "static_acceptance_of_drafted": acceptance(rounds, STATIC),
        "online_acceptance_of_drafted": acceptance(rounds, ONLINE),
        "learning_over_serving": round(stats.learn_seconds / stats.decode_seconds, 3),
        "learn_seconds": round(stats.learn_seconds, 1),
        "saved_seconds": round(stats.saved_seconds, 1),
        "learned_steps": stats.learned_steps,
        "updates": stats.updates,
        "failed_updates": stats.failed_updates,
        "longest_wait_for_an_update_over_own_time": round(
            max(one[ONLINE].learning_seconds / one[ONLINE].seconds for one in rounds), 2
        ),
    }


def per_token(rounds: list[dict[str, Sample]], name: str, *, learning: bool = True) -> float:
    """Return seconds a token, with the waiting for updates."""
    samples = [one[name] for one in rounds if name in one]
    seconds = sum(one.seconds + (one.learning_seconds if learning else 0.0) for one in samples)
    return seconds / sum(one.tokens for one in samples)


def ratio(rounds: list[dict[str, Sample]], one: str, other: str, *, learning: bool = True) -> float:
    """Return how many times as fast one contender is as another."""
    both = [samples for samples in rounds if one in samples and other in samples]
    return round(per_token(both, other, learning=learning) / per_token(both, one, learning=learning), 3)


def acceptance(rounds: list[dict[str, Sample]], name: str) -> float:
    """Return the share of a draft's judged tokens that the target took."""
    drafted = sum(one[name].drafted for one in rounds)
    return round(sum(one[name].accepted for one in rounds) / max(drafted, 1), 3)


def means(streams: dict[str, dict[str, Any]], part: str) -> dict[str, float]:
    """Return geometric means over the streams."""
    names = next(iter(streams.values()))[part]
    logs = {name: fmean(math.log(stream[part][name]) for stream in streams.values()) for name in names}
    return {name: round(math.exp(value), 3) for name, value in logs.items()}


def main() -> None:
    """Parse options, serve every stream, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--assistant", help="made of the target if left out")
    parser.add_argument("--prompts", action="append", required=True, help=".jsonl with a prompt column; repeat it")
    parser.add_argument("--requests", type=int, default=200, help="of each stream")
    parser.add_argument("--every", type=int, default=1, help="transformers answers one request of so many")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--online", type=_settings, default={}, metavar="NAME=VALUE,...", help="of OnlineConfig")
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = load_pair(options.target, options.assistant, "cpu", options.dtype)
    streams = {Path(path).stem: serve(pair, path, options) for path in options.prompts}
    parts = ("last_quarter", "last_quarter_serving_alone", "whole_run")
    result = {"dtype": str(pair.target.dtype), "geometric_means": {part: means(streams, part) for part in parts}}
    write_result(result | {"streams": streams}, options.output)


def _settings(text: str) -> dict[str, Any]:
    pairs = (part.split("=") for part in text.split(","))
    return {name: float(value) if "." in value or "e" in value else int(value) for name, value in pairs}


if __name__ == "__main__":
    main()
