"""
Compare greedy outputs with the target's own, over many prompts and batch sizes.

A difference is a near tie if the target's two best logits, in float64, are closer than 1e-4 where the outputs part.
The draft learns meanwhile, so that weights are swapped under the comparison too.

    python -m benchmarks.equality --prompts a.jsonl b.jsonl --count 500 --output benchmarks/results/equality.json
"""

import argparse
import copy
from typing import Any

import torch
from rich.progress import track

import hf_osd
from hf_osd.evaluation.encoding import join
from hf_osd.evaluation.exactness import first_difference
from hf_osd.evaluation.models import generate_options, load_pair

from .common import load_requests, write_result

NEAR_TIE = 1e-4


@torch.no_grad()
def gap(target: Any, ids: torch.Tensor) -> float:
    """Return the distance between the two largest logits behind some tokens, in float64."""
    best = target(ids[None]).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def differences(exact: Any, inputs: dict[str, torch.Tensor], plain: torch.Tensor, ours: torch.Tensor) -> list[float]:
    """Return the gap at the first difference of each row that differs."""
    padding = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
    columns = [first_difference(*rows) for rows in zip(plain, ours, strict=True)]
    return [gap(exact, plain[row, padding[row] : end]) for row, end in enumerate(columns) if end is not None]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Decode every prompt both ways, at every batch size."""
    pair = load_pair(options.target, options.draft, "cpu", "float32")
    target, exact = pair.target, copy.deepcopy(pair.target).double()
    requests = load_requests(pair, options.prompts, options.count, options.max_new_tokens)
    settings = generate_options(pair, options.max_new_tokens)
    results = {}
    for size in options.batch_sizes:
        gaps: list[float] = []
        with hf_osd.OnlineAssistant(
            copy.deepcopy(pair.draft), target, hf_osd.OnlineConfig(update_every=64)
        ) as assistant:
            for start in track(range(0, len(requests), size), description=f"batch {size}", transient=True):
                inputs = join(requests[start : start + size], settings["pad_token_id"])
                plain = target.generate(**inputs, **settings)
                ours = hf_osd.generate(target, **inputs, **settings, online_assistant=assistant)
                gaps += differences(exact, inputs, plain, ours)
            stats = assistant.stats().to_dict()
        near = [value for value in gaps if value < NEAR_TIE]
        results[f"batch {size}"] = {
            "prompts": len(requests), "mismatches": len(gaps) - len(near), "near_ties": near, "stats": stats,
        }  # fmt: skip
    return results


def main() -> None:
    """Parse options, compare, write; exits with 1 on a real mismatch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--prompts", nargs="*", default=[], help=".jsonl files with a prompt column")
    parser.add_argument("--count", type=int, default=500, help="prompts of each file")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = compare(options)
    write_result(results, options.output)
    raise SystemExit(any(result["mismatches"] for result in results.values()))


if __name__ == "__main__":
    main()
