"""
Whether trees pay on a real model, row by row: batch size, precision, greedy or sampling; all contenders interleaved.

*chain* and *tree* answer every request, the others one of so many. Both are hf_osd with the same draft and settings;
for *chain* every round submits the best chain of what the lookup and the draft propose, as for a target that takes
no trees. Every row has prompts of its own, since the lookup remembers, and the first requests of a row do not count:
in these, both measure what passes of this batch cost. Rows are added to those in the output file.

    python -m benchmarks.rows --target HuggingFaceTB/SmolLM2-135M-Instruct --assistant hf_osd/demo/smollm2 \
        --prompts gsm8k.jsonl --prompts spider.jsonl --prompts python.jsonl --dtype bfloat16 --batch 1 2 4 8 \
        --output benchmarks/results/rows_smollm2.json
"""

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import stdev
from typing import Any
from unittest.mock import patch

import torch

from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.drafts.features import FeatureDraft
from hf_osd.evaluation.contenders import Assisted, Contender, Generate, Sample, stock
from hf_osd.evaluation.encoding import Inputs, join
from hf_osd.evaluation.machine import versions
from hf_osd.evaluation.models import Pair, generate_options, load_pair
from hf_osd.evaluation.output import command_line, write_json
from hf_osd.evaluation.race import Round, run_race, total
from hf_osd.serving.measured import MeasuredSpeculator

from .common import load_requests
from .suites.peers import PACKAGES, open_peers

PLAIN, STOCK, LOOKUP, CHAIN, TREE = "plain", "transformers lookup", "lookup alone", "chain", "tree"
INSIDE = ("draft", "verify")  # stages of a round that are passes of the two models


class Chains(Assisted):
    """hf_osd as over a target that takes no trees."""

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Sample]:
        """Generate by chains."""
        with patch.object(MeasuredSpeculator, "_may_branch", False):
            return super().answer(inputs, **options)


def ours(pair: Pair, stack: ExitStack) -> list[Contender]:
    """Make ours, which keep what they have measured from row to row."""

    def assistant(draft: Any) -> OnlineAssistant:
        return stack.enter_context(OnlineAssistant(draft, pair.target, OnlineConfig(learn=False)))

    return [
        Assisted(LOOKUP, pair.target, assistant(FeatureDraft.of(pair.target))),
        Chains(CHAIN, pair.target, assistant(pair.draft)),
        Assisted(TREE, pair.target, assistant(pair.draft)),
    ]


def others(pair: Pair, trial: Inputs, settings: dict[str, Any], length: int, stack: ExitStack) -> list[Contender]:
    """Make those of others that can serve a row: transformers' where it has one prompt, peers where it is greedy."""
    alone = [stock(STOCK, pair)] if len(trial["input_ids"]) == 1 else []
    if settings["do_sample"]:
        return alone
    found = open_peers(pair, trial, settings, stack, None)
    return [*alone, *(make(length) for make in found.makers.values())]


def measure(
    pair: Pair, racers: list[Contender], requests: list[Inputs], samples: bool, unmeasured: int, options: Any
) -> dict[str, Any]:
    """Measure one row on its requests: one warms up, so many do not count, the others do."""
    settings = generate_options(pair, options.max_new_tokens, sample=samples) | options.settings
    settings |= {"temperature": options.temperature, "top_k": 0} if samples else {}

    def takes_part(racer: Contender, index: int) -> bool:
        return racer.name in (CHAIN, TREE) or (index >= unmeasured and (index - unmeasured) % options.every == 0)

    warm_up, *measured = requests
    with ExitStack() as stack:
        guests = others(pair, warm_up, settings, options.peer_length, stack)
        field = [Generate(PLAIN, pair.target), *guests, *racers]
        race = run_race(field, measured, settings, warm_up=warm_up, takes_part=takes_part)
    del race.rounds[:unmeasured]
    names = list(race.rounds[0])
    return {
        "requests": {name: len(race.samples(name)) for name in names},
        "ms_per_token": {name: round(1e3 / total(race.rounds, name).tokens_per_second, 2) for name in names},
        "tree_over": {name: over(race.rounds, TREE, name) for name in names if name != TREE},
        "tree_over_chain_by_source": [
            over(race.rounds[start :: len(options.prompts)], TREE, CHAIN)
            for start in range(len(options.prompts) if len(warm_up["input_ids"]) == 1 else 0)
        ],
        "time_outside_of_the_models": {name: round(outside(race.samples(name)), 4) for name in (CHAIN, TREE)},
        "tokens_per_pass": {name: round(total(race.rounds, name).tokens_per_pass or 0, 3) for name in (CHAIN, TREE)},
        "outputs_that_differ_from_plain": dict(Counter(one.contender for one in race.differences)),
    }


def over(rounds: Sequence[Round], one: str, other: str) -> dict[str, float | None]:
    """
    Return how many times as fast one contender is as another, on the requests that both answered.

    `error` is the standard error of this ratio, from the ratios of the single requests.
    """
    both = [samples for samples in rounds if one in samples and other in samples]
    logs = [math.log(each[one].tokens_per_second / each[other].tokens_per_second) for each in both]
    ratio = total(both, one).tokens_per_second / total(both, other).tokens_per_second
    error = round(ratio * stdev(logs) / math.sqrt(len(logs)), 3) if len(logs) > 1 else None
    return {"ratio": round(ratio, 3), "error": error}


def outside(samples: Sequence[Sample]) -> float:
    """Return the share of time that no model's pass takes."""
    inside = sum(one.stages[stage] for one in samples for stage in INSIDE)
    return 1 - inside / sum(one.seconds for one in samples)


def prompts_by_turns(pair: Pair, options: Any) -> Iterator[Inputs]:
    """Yield prompts, which take turns among the sources."""
    sources = [load_requests(pair, [path], options.prompts_each, options.max_new_tokens) for path in options.prompts]
    for turn in zip(*sources, strict=False):
        yield from turn


def measure_all(pair: Pair, options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the rows of one precision, and yield each with its name."""
    prompts, pad = prompts_by_turns(pair, options), generate_options(pair, 1)["pad_token_id"]
    with ExitStack() as stack:
        racers = ours(pair, stack)
        for size, how in itertools.product(options.batch, options.how):
            name = f"{str(pair.target.dtype).removeprefix('torch.')}, batch {size}, {how}"
            unmeasured = math.ceil(options.unmeasured / size)
            batches = [join([*itertools.islice(prompts, size)], pad) for _ in range(1 + unmeasured + options.requests)]
            yield name, measure(pair, racers, batches, how == "sampling", unmeasured, options)


def main() -> None:
    """Parse options, measure, write after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--assistant", required=True)
    parser.add_argument("--prompts", action="append", required=True, help=".jsonl with a prompt column; repeat it")
    parser.add_argument("--prompts-each", type=int, default=600, help="prompts of each file to read")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--how", nargs="+", default=["greedy", "sampling"], choices=["greedy", "sampling"])
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--settings", type=json.loads, default={}, help="more of generate, as JSON")
    parser.add_argument("--requests", type=int, default=12, help="batches of a row that count")
    parser.add_argument("--unmeasured", type=int, default=6, help="prompts of a row that do not")
    parser.add_argument("--every", type=int, default=4, help="all but chain and tree answer one request of so many")
    parser.add_argument("--peer-length", type=int, default=4, help="tokens that peers propose in each round")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = Path(options.output) if options.output else None
    pair = load_pair(options.target, options.assistant, "cpu", options.dtype)
    for name, row in measure_all(pair, options):
        row |= {"command": command_line(), "versions": versions(*PACKAGES), "threads": options.threads}
        print(json.dumps({name: row}, indent=1), flush=True)
        if path is not None:
            rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            write_json(path, rows | {name: row})


if __name__ == "__main__":
    main()
