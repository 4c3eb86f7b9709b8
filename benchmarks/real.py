"""
Seconds on a real model: plain decoding, the lookup alone, a static draft and an online draft, interleaved.

Every request goes to every contender, and who goes first changes with each. Learning counts: an update runs inline,
and the request that waits for it pays. A draft that has learned nothing stands for the lookup alone: it is never worth
a proposal.

Without `--assistant` the online draft begins with nothing, and the lookup alone is what it has to beat.

    python -m benchmarks.real --target HuggingFaceTB/SmolLM2-135M-Instruct --assistant hf_osd/demo/smollm2 \
        --prompts gsm8k.jsonl --prompts spider.jsonl --prompts python.jsonl --requests 200 --output real.json
"""

import argparse
import copy
import math
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.bench.session import open_steps
from hf_osd.drafts.features import FeatureDraft
from hf_osd.evaluation.contenders import Assisted, Contender, Generate, stock
from hf_osd.evaluation.models import Pair, generate_options, load_pair
from hf_osd.evaluation.race import Race, Round, run_race, total

from .common import load_requests, write_result

PLAIN, STOCK, LOOKUP, STATIC, ONLINE = "plain", "transformers lookup", "lookup alone", "static", "online"
COLD = "cold online"
OVER = ((ONLINE, PLAIN), (ONLINE, STATIC), (ONLINE, LOOKUP), (STATIC, PLAIN), (LOOKUP, PLAIN), (STOCK, PLAIN))


def contenders(pair: Pair, options: argparse.Namespace, stack: ExitStack) -> list[Contender]:
    """Make the contenders; each has a draft of its own."""
    fixed = OnlineConfig(learn=False)
    static, learner, cold = copy.deepcopy(pair.draft), copy.deepcopy(pair.draft), FeatureDraft.of(pair.target)
    ours = {LOOKUP: (FeatureDraft.of(pair.target), fixed)}
    if options.assistant is not None:
        ours[STATIC] = static, fixed
    ours[ONLINE] = learner, OnlineConfig.for_draft(learner, **options.online)
    if options.cold:
        ours[COLD] = cold, OnlineConfig.for_draft(cold, **options.online)
    return [
        Generate(PLAIN, pair.target),
        stock(STOCK, pair),
        *(
            Assisted(name, pair.target, stack.enter_context(OnlineAssistant(draft, pair.target, config)))
            for name, (draft, config) in ours.items()
        ),
    ]


def serve(pair: Pair, path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Serve one stream; ours answer every request, transformers one of so many."""
    *requests, warm_up = load_requests(pair, [path], options.requests + 1, options.max_new_tokens)
    settings = generate_options(pair, options.max_new_tokens)
    with ExitStack() as stack:
        racers = contenders(pair, options, stack)
        done = stack.enter_context(open_steps(Console(stderr=True)))(Path(path).stem, len(requests))
        race = run_race(
            racers,
            requests,
            settings,
            lambda race: done(),
            warm_up=warm_up,
            takes_part=lambda racer, index: index % options.every == 0 or isinstance(racer, Assisted),
        )
        assistants = {racer.name: racer.assistant for racer in racers if isinstance(racer, Assisted)}
        found = figures(race, assistants[ONLINE]) | {"outputs_that_differ_from_plain": different(race)}
        return found | ({COLD: cold_figures(race, assistants[COLD])} if options.cold else {})


def different(race: Race) -> dict[str, int]:
    """Count the outputs of each contender that are not those of `generate`."""
    return {name: sum(one.contender == name for one in race.differences) for name in race.rounds[0]}


def figures(race: Race, online: OnlineAssistant) -> dict[str, Any]:
    """Say what a stream took and gave."""
    rounds = race.rounds
    last = rounds[-(len(rounds) // 4) :]
    accepted = {name: total(rounds, name).acceptance or 0.0 for name in (STATIC, ONLINE) if name in rounds[0]}
    return {
        "requests": len(rounds),
        "last_quarter": ratios(last),
        "last_quarter_serving_alone": ratios(last, learning=False),
        "whole_run": ratios(rounds),
        "tokens_per_second_last_quarter": {
            name: round(total(last, name).tokens_per_second_with_learning, 1) for name in rounds[0]
        },
        **{f"{name}_acceptance_of_drafted": round(value, 3) for name, value in accepted.items()},
        **learned(race, ONLINE, online),
    }


def cold_figures(race: Race, cold: OnlineAssistant) -> dict[str, Any]:
    """Say what a stream took and gave with a draft that had learned nothing before it."""
    rounds = race.rounds
    parts = {"last_quarter": rounds[-(len(rounds) // 4) :], "whole_run": rounds}
    over = {part: {f"{COLD} over {LOOKUP}": ratio(some, COLD, LOOKUP)} for part, some in parts.items()}
    return over | learned(race, COLD, cold)


def learned(race: Race, name: str, assistant: OnlineAssistant) -> dict[str, Any]:
    """Say what a contender has learned, and what that cost."""
    stats, judged = assistant.stats(), assistant.journal.requests
    quarter = max(len(judged) // 4, 1)
    published = [one.request for one in assistant.journal.updates if one.decision == "published"]
    return {
        "acceptance_first_and_last_quarter": [
            round(fmean(one.acceptance for one in part), 3) for part in (judged[:quarter], judged[-quarter:])
        ],
        "first_live_after_requests": min(published, default=None),
        "learning_over_serving": round(stats.learn_seconds / stats.decode_seconds, 3),
        "learn_seconds": round(stats.learn_seconds, 1),
        "saved_seconds": round(stats.saved_seconds, 1),
        "learned_steps": stats.learned_steps,
        "updates": stats.updates,
        "failed_updates": stats.failed_updates,
        "longest_wait_for_an_update_over_own_time": round(
            max(one[name].learning_seconds / one[name].seconds for one in race.rounds), 2
        ),
    }


def ratios(rounds: list[Round], *, learning: bool = True) -> dict[str, float]:
    """
    Return how many times as fast some contenders are as others.

    Online over plain is by way of what serves every request: updates would fall by chance on some of those that plain
    answers.
    """
    served = {name for samples in rounds for name in samples}
    pairs = [(one, other) for one, other in OVER if {one, other} <= served]
    found = {f"{one} over {other}": ratio(rounds, one, other, learning=learning) for one, other in pairs}
    between = STATIC if STATIC in served else LOOKUP
    return found | {
        f"{ONLINE} over {PLAIN}": round(found[f"{between} over {PLAIN}"] * found[f"{ONLINE} over {between}"], 3)
    }


def ratio(rounds: list[Round], one: str, other: str, *, learning: bool = True) -> float:
    """Return how many times as fast one contender is as another, on requests that both answered."""
    both = [samples for samples in rounds if one in samples and other in samples]
    speed = "tokens_per_second_with_learning" if learning else "tokens_per_second"
    return round(getattr(total(both, one), speed) / getattr(total(both, other), speed), 3)


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
    parser.add_argument("--cold", action="store_true", help="also an online draft that begins with nothing")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--online", type=_settings, default={}, metavar="NAME=VALUE,...", help="of OnlineConfig")
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = load_pair(options.target, options.assistant, options.device, options.dtype)
    streams = {Path(path).stem: serve(pair, path, options) for path in options.prompts}
    parts = ("last_quarter", "last_quarter_serving_alone", "whole_run")
    result = {"dtype": str(pair.target.dtype), "geometric_means": {part: means(streams, part) for part in parts}}
    write_result(result | {"streams": streams}, options.output)


def _settings(text: str) -> dict[str, Any]:
    pairs = (part.split("=") for part in text.split(","))
    return {name: float(value) if "." in value or "e" in value else int(value) for name, value in pairs}


if __name__ == "__main__":
    main()
