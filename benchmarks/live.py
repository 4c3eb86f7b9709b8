"""
Serve streams of prompts live, one after another, and watch the draft follow them; every output is checked.

The laboratory (learning) replays recorded answers; this confirms its figures on requests that are served, where
acceptance is what the target said of drafted tokens while decoding.

    python -m benchmarks.live --prompts spider.jsonl --prompts python.jsonl --requests 200 \
        --output benchmarks/results/live.json
"""

import argparse
import copy
import time
from typing import Any

import torch
from rich.progress import track

import hf_osd
from hf_osd.evaluation.contenders import Assisted, Generate, Sample
from hf_osd.evaluation.encoding import Inputs
from hf_osd.evaluation.models import Pair, generate_options, load_pair

from .common import load_requests, write_result

ALGORITHM_1 = {"positions": "rejected", "replay_size": 8, "steps_per_update": 1, "gate": False}
RECIPES: dict[str, dict[str, Any]] = {
    "static": {"learn": False},
    "defaults": {},
    "Algorithm 1, 1e-3": {**ALGORITHM_1, "learning_rate": 1e-3},
}

# Every round drafts: measured lengths would leave a cold draft alone, and its acceptance unknown.
ALWAYS = {"draft_length": 5, "draft_length_schedule": "constant"}
WINDOW = 50


def serve(
    pair: Pair, stream: list[Inputs], expected: list[torch.Tensor], options: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Serve the streams once; each request is counted before the draft learns from it."""
    samples, different, started = [], 0, time.perf_counter()
    config = hf_osd.OnlineConfig(**ALWAYS, **settings)
    with hf_osd.OnlineAssistant(copy.deepcopy(pair.draft), pair.target, config) as assistant:
        ours = Assisted("ours", pair.target, assistant)
        for inputs, answer in zip(track(stream, description="serving", transient=True), expected, strict=True):
            output, sample = ours.answer(inputs, **options)
            different += not torch.equal(output, answer)
            samples.append(sample)
        decisions = [update.decision for update in assistant.journal.updates]
        windows = [Sample.total(samples[start : start + WINDOW]) for start in range(0, len(samples), WINDOW)]
        return {
            "acceptance_by_window": [round(one.acceptance or 0.0, 3) for one in windows],
            "outputs_that_differ": different,
            "decisions": {name: decisions.count(name) for name in sorted(set(decisions))},
            "changes_of_traffic": [drift.request for drift in assistant.journal.drifts],
            "learn_seconds": round(assistant.stats().learn_seconds, 1),
            "seconds": round(time.perf_counter() - started, 1),
        }


def main() -> None:
    """Parse options, decode plainly, serve with each recipe, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--prompts", action="append", help=".jsonl with a prompt column; repeat for a shift")
    parser.add_argument("--requests", type=int, default=200, help="of each stream")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = load_pair(options.target, options.draft, "cpu", "float32")
    settings = generate_options(pair, options.max_new_tokens)
    stream = load_requests(pair, options.prompts, options.requests, options.max_new_tokens)
    plain = Generate("plain", pair.target)
    expected = [plain.answer(one, **settings)[0] for one in track(stream, description="plain", transient=True)]
    recipes = {name: serve(pair, stream, expected, settings, RECIPES[name]) for name in options.recipes}
    write_result({"window": WINDOW, "recipes": recipes}, options.output)


if __name__ == "__main__":
    main()
