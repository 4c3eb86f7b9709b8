"""
Serve a stream of prompts live with several settings of the learner, and report acceptance by quarter of the stream.

Shows that the defaults learn fast where the draft is cold and do no harm where it is good already.

    python benchmarks/adaptation.py --prompts spider.jsonl --requests 200 --output benchmarks/results/spider.json
"""

import argparse
import copy
import time
from itertools import pairwise
from typing import Any

import torch
from common import encode, load_pair, read_prompts, write_result
from rich.progress import track

import hf_osd

RECIPES: dict[str, dict[str, Any]] = {
    "static": {"learn": False},
    "defaults": {},
    "Algorithm 1, 1e-3": {
        "positions": "rejected", "replay_size": 8, "steps_per_update": 1, "adaptive_learning_rate": False,
        "learning_rate": 1e-3,
    },
    "Algorithm 1, 1e-4": {
        "positions": "rejected", "replay_size": 8, "steps_per_update": 1, "adaptive_learning_rate": False,
        "learning_rate": 1e-4,
    },
}  # fmt: skip

# Every round drafts: measured lengths would leave a cold draft alone, and its acceptance unknown.
ALWAYS = {"draft_length": 5, "draft_length_schedule": "heuristic"}


def serve(target: Any, draft: Any, stream: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Serve the stream once; each request is counted before the draft learns from it."""
    counts, started = [], time.perf_counter()
    with hf_osd.OnlineAssistant(copy.deepcopy(draft), target, hf_osd.OnlineConfig(**ALWAYS, **settings)) as assistant:
        for inputs in track(stream, description="serving", transient=True):
            hf_osd.generate(target, **inputs, online_assistant=assistant)
            stats = assistant.stats()
            counts.append((stats.accepted_tokens, stats.draft_tokens))
        quarter = len(stream) // 4
        marks = [(0, 0), *(counts[(index + 1) * quarter - 1] for index in range(4))]
        return {
            "acceptance_by_quarter": [round((b[0] - a[0]) / max(b[1] - a[1], 1), 3) for a, b in pairwise(marks)],
            "updates": stats.updates,
            "learn_seconds": round(stats.learn_seconds, 1),
            "seconds": round(time.perf_counter() - started, 1),
        }


def main() -> None:
    """Parse options, serve with each recipe, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--prompts", help=".jsonl with a prompt column")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target, draft, tokenizer = load_pair(options.target, options.draft)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    stream = [encode(tokenizer, [prompt]) | settings for prompt in read_prompts(options.prompts, options.requests)]
    write_result({name: serve(target, draft, stream, RECIPES[name]) for name in options.recipes}, options.output)


if __name__ == "__main__":
    main()
