"""
Time a token of plain, assisted and our decoding against the floor: the raw forwards of the two models.

Contenders take turns on the same prompts in one process; figures are medians of milliseconds a token over requests.

    python benchmarks/serving.py --output benchmarks/results/serving.json
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import encode, load_pair, read_prompts, write_result
from rich.progress import track
from transformers import DynamicCache

import hf_osd


def contenders(target: Any, draft: Any, options: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    """Return what is timed, by name."""
    static, recording = (
        hf_osd.OnlineAssistant(draft, target, hf_osd.OnlineConfig(draft_length=options.draft_length, **settings))
        for settings in (
            {"learn": False, "draft_length_schedule": "constant"},  # so that every round has the floor's k forwards
            {"update_every": 2**31, "draft_length_schedule": "constant"},
        )
    )

    def assisted(schedule: str, count: int, threshold: float) -> Callable[..., Any]:
        def run(**inputs: Any) -> Any:
            config = draft.generation_config
            config.num_assistant_tokens_schedule, config.num_assistant_tokens = schedule, count
            config.assistant_confidence_threshold = threshold
            return target.generate(**inputs, assistant_model=draft)

        return run

    return {
        "plain": lambda **inputs: target.generate(**inputs),
        "assisted, defaults": assisted("constant", 20, 0.4),
        f"assisted, {options.draft_length} tokens": assisted("constant", options.draft_length, 0.0),
        "hf_osd, static draft": lambda **inputs: hf_osd.generate(target, **inputs, online_assistant=static),
        "hf_osd, recording": lambda **inputs: hf_osd.generate(target, **inputs, online_assistant=recording),
    } | {"stats": static.stats}


@torch.no_grad()
def forward_seconds(model: Any, tokens: int, context: int) -> float:
    """Time one forward of some tokens behind a context."""
    ids = torch.randint(5, model.config.vocab_size, (1, context + tokens))
    cache = DynamicCache(config=model.config)
    model(ids[:, :context], past_key_values=cache, use_cache=True)
    start = time.perf_counter()
    model(ids[:, context:], past_key_values=cache, use_cache=True)
    return time.perf_counter() - start


def measure(target: Any, draft: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Run every contender on every prompt, rotating who goes first."""
    runs = contenders(target, draft, options)
    stats = runs.pop("stats")
    times: dict[str, list[float]] = {name: [] for name in runs}
    k = options.draft_length
    forwards: dict[str, list[float]] = {"target, 1 token": [], f"target, {k + 1} tokens": [], "draft, 1 token": []}
    prompts = read_prompts(options.prompts, options.requests + 1)
    for index, prompt in enumerate(track(prompts, description="serving", transient=True)):
        inputs = encode(tokenizer, [prompt]) | {"max_new_tokens": options.max_new_tokens, "do_sample": False}
        outputs = {}
        for name in [*runs][index % len(runs) :] + [*runs][: index % len(runs)]:
            start = time.perf_counter()
            outputs[name] = runs[name](**inputs)
            new = outputs[name].shape[1] - inputs["input_ids"].shape[1]
            times[name].append(1e3 * (time.perf_counter() - start) / new)
        assert all(torch.equal(output, outputs["plain"]) for output in outputs.values()), "outputs differ"
        for name, (model, tokens) in zip(forwards, [(target, 1), (target, k + 1), (draft, 1)], strict=True):
            forwards[name].append(1e3 * forward_seconds(model, tokens, 128))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first request warms up
    floors = {name: statistics.median(values[1:]) for name, values in forwards.items()}
    return summary(medians, floors, stats(), k)


def summary(medians: dict[str, float], forwards: dict[str, float], stats: Any, k: int) -> dict[str, Any]:
    """Compare with the floor: k forwards of the draft and one of the target a round, and nothing between them."""
    plain, _, *_ = medians.values()
    floor = (k * forwards["draft, 1 token"] + forwards[f"target, {k + 1} tokens"]) / stats.tokens_per_target_pass
    ours, recording = medians["hf_osd, static draft"], medians["hf_osd, recording"]
    return {
        "ms_per_token": {name: round(value, 3) for name, value in medians.items()},
        "speedup_over_plain": {name: round(plain / value, 3) for name, value in medians.items()},
        "forward_ms": {name: round(value, 3) for name, value in forwards.items()},
        "tokens_per_target_pass": round(stats.tokens_per_target_pass, 3),
        "acceptance_rate": round(stats.acceptance_rate, 3),
        "floor_ms_per_token": round(floor, 3),
        "engine_efficiency": round(floor / ours, 3),
        "recording_cost": round(recording / ours - 1, 4),
    }


def main() -> None:
    """Parse options, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--prompts", help=".jsonl with a prompt column")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write_result(measure(*load_pair(options.target, options.draft), options), options.output)


if __name__ == "__main__":
    main()
