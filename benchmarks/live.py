"""
Serve streams of prompts live, one after another, and watch the draft follow them; every output is checked.

The laboratory (learning.py) replays recorded answers; this confirms its figures on requests that are served, where
acceptance is what the target said of drafted tokens while decoding.

    python benchmarks/live.py --prompts spider.jsonl --prompts python.jsonl --requests 200 \
        --output benchmarks/results/live.json
"""

import argparse
import copy
import time
from typing import Any

import torch
from common import encode, load_pair, read_prompts, write_result
from rich.progress import track

import hf_osd

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
    target: Any, draft: Any, stream: list[dict[str, Any]], expected: list[torch.Tensor], settings: dict[str, Any]
) -> dict[str, Any]:
    """Serve the streams once; each request is counted before the draft learns from it."""
    spent, different, started = [], 0, time.perf_counter()
    config = hf_osd.OnlineConfig(**ALWAYS, **settings)
    with hf_osd.OnlineAssistant(copy.deepcopy(draft), target, config) as assistant:
        before = assistant.stats()
        for inputs, answer in zip(track(stream, description="serving", transient=True), expected, strict=True):
            output = hf_osd.generate(target, **inputs, online_assistant=assistant)
            different += not torch.equal(output, answer)
            after = assistant.stats()
            spent.append(after - before)
            before = after
        decisions = [update.decision for update in assistant.journal.updates]
        return {
            "acceptance_by_window": [
                round(sum(one.accepted_tokens for one in window) / max(sum(one.draft_tokens for one in window), 1), 3)
                for window in (spent[start : start + WINDOW] for start in range(0, len(spent), WINDOW))
            ],
            "outputs_that_differ": different,
            "decisions": {name: decisions.count(name) for name in sorted(set(decisions))},
            "changes_of_traffic": [drift.request for drift in assistant.journal.drifts],
            "learn_seconds": round(after.learn_seconds, 1),
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
    target, draft, tokenizer = load_pair(options.target, options.draft)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    prompts = [text for path in options.prompts or [None] for text in read_prompts(path, options.requests)]
    stream = [encode(tokenizer, [prompt]) | settings for prompt in prompts]
    expected = [target.generate(**inputs) for inputs in track(stream, description="plain", transient=True)]
    recipes = {name: serve(target, draft, stream, expected, RECIPES[name]) for name in options.recipes}
    write_result({"window": WINDOW, "recipes": recipes}, options.output)


if __name__ == "__main__":
    main()
