"""
Time requests beside background learning, paced and flat out, and without any.

Contenders take turns, in blocks, on the same prompts in one process, and something to learn is always due. The
learning rate is next to nothing: a better draft would hide what learning costs. At saturated load a request follows
the last one at once; at partial load after a random wait, the same for all, on average as long as a request.

    python -m benchmarks.background --output benchmarks/results/background.json
"""

import argparse
import copy
import random
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track

import hf_osd
from hf_osd.evaluation.models import generate_options, load_pair

from .common import load_requests, write_result

LEARNING: dict[str, Any] = {
    "background": True, "steps_per_update": 2, "adaptive_learning_rate": False, "learning_rate": 1e-9,
}  # fmt: skip
CONTENDERS: dict[str, dict[str, Any]] = {
    "not learning": {"update_every": 2**31},
    "paced": {"update_every": 1},
    "flat out": {"update_every": 1, "duty_cycle": 1.0},
    "not learning, again": {"update_every": 2**31},
}
LOADS = {"saturated": 0.0, "half busy": 1.0}  # waits between requests, by length of a request


@dataclass
class Measured:
    """What one contender did under one load."""

    latencies: list[float] = field(default_factory=list)  # seconds
    seconds: float = 0.0
    steps: int = 0
    positions: int = 0
    updates: int = 0

    def summary(self) -> dict[str, float]:
        """Return percentiles in milliseconds and rates of learning."""
        cuts = statistics.quantiles(self.latencies, n=100, method="inclusive")
        return {
            "p50_ms": round(1e3 * cuts[49], 1),
            "p95_ms": round(1e3 * cuts[94], 1),
            "steps_per_second": round(self.steps / self.seconds, 2),
            "positions_per_second": round(self.positions / self.seconds, 1),
            "updates": self.updates,
        }


def serve(target: Any, assistant: Any, stream: list[Any], waits: list[float], measured: Measured) -> None:
    """Serve a block of requests, one after another."""
    before, start = assistant.stats(), time.perf_counter()
    for inputs, wait in zip(stream, waits, strict=True):
        time.sleep(wait)
        began = time.perf_counter()
        hf_osd.generate(target, **inputs, online_assistant=assistant)
        measured.latencies.append(time.perf_counter() - began)
    after = assistant.stats()
    measured.seconds += time.perf_counter() - start
    measured.steps += after.learned_steps - before.learned_steps
    measured.positions += after.learned_positions - before.learned_positions
    measured.updates += after.updates - before.updates


def measure(target: Any, draft: Any, stream: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Serve block after block by every contender, under every load, rotating who goes first."""
    results = {load: {name: Measured() for name in CONTENDERS} for load in LOADS}
    size = options.block * len(LOADS)
    blocks = [stream[start : start + size] for start in range(0, len(stream), size)]
    with ExitStack() as stack:
        assistants = {}
        for name, settings in CONTENDERS.items():
            config = hf_osd.OnlineConfig(**(LEARNING | {"duty_cycle": options.duty_cycle} | settings))
            assistants[name] = stack.enter_context(hf_osd.OnlineAssistant(copy.deepcopy(draft), target, config))
            serve(target, assistants[name], blocks[0], [0.0] * len(blocks[0]), warm_up := Measured())
            settle(assistants[name])
        typical, generator, names = statistics.median(warm_up.latencies), random.Random(0), list(CONTENDERS)
        for index, block in enumerate(track(blocks, description="serving", transient=True)):
            waits = [typical * generator.expovariate(1.0) for _ in block[:: len(LOADS)]]
            for name in names[index % len(names) :] + names[: index % len(names)]:
                for number, (load, share) in enumerate(LOADS.items()):
                    part = block[number :: len(LOADS)]  # prompts of its own: some drafts remember those of before
                    serve(target, assistants[name], part, [share * wait for wait in waits], results[load][name])
                settle(assistants[name])
    return {load: compare(contenders) for load, contenders in results.items()}


def settle(assistant: Any) -> None:
    """Leave nothing to learn while others serve."""
    if assistant.config.update_every == 1:
        assistant.update()


def compare(contenders: dict[str, Measured]) -> dict[str, Any]:
    """Add the ratios of each contender to the one that does not learn."""
    summaries = {name: measured.summary() for name, measured in contenders.items()}
    floor = summaries["not learning"]
    for summary in summaries.values():
        summary |= {f"{p}_ratio": round(summary[f"{p}_ms"] / floor[f"{p}_ms"], 3) for p in ("p50", "p95")}
    return summaries


def main() -> None:
    """Parse options, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--prompts", help=".jsonl with a prompt column")
    parser.add_argument("--requests", type=int, default=100, help="by each contender under each load")
    parser.add_argument("--block", type=int, default=20, help="requests in a turn")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--duty-cycle", type=float, default=hf_osd.OnlineConfig().duty_cycle)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = load_pair(options.target, options.draft, "cpu", "float32")
    sources = [options.prompts] if options.prompts else None
    settings = generate_options(pair, options.max_new_tokens)
    requests = load_requests(pair, sources, options.requests * len(LOADS), options.max_new_tokens)
    result = {"requests": options.requests, "duty_cycle": options.duty_cycle}
    stream = [request | settings for request in requests]
    write_result(result | measure(pair.target, pair.draft, stream, options), options.output)


if __name__ == "__main__":
    main()
