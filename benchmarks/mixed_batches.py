"""
What it costs that the rows of one batch take different routes: seconds of a batch by how many drafts serve it.

    python -m benchmarks.mixed_batches TARGET DRAFT PROMPTS --output benchmarks/results/mixed_batches.json

Every draft is a copy of the same one, so outputs and acceptance are the same, and only the forwards differ. The draft
length is constant. "Split" serves the rows of each route in a call of their own.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.evaluation.encoding import as_inputs, join, token_ids
from hf_osd.evaluation.machine import versions
from hf_osd.evaluation.models import Pair, load_pair
from hf_osd.evaluation.output import command_line
from hf_osd.evaluation.prompts import load_prompts

BATCH, TOKENS, LENGTH = 4, 48, 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Time batches in turns, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "draft", "prompts"):
        parser.add_argument(name)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    pair = load_pair(options.target, options.draft, "cpu", "float32")
    ids = [token_ids(pair.tokenizer, one)[0] for one in load_prompts(options.prompts, BATCH * options.batches)]
    found = measure(pair, [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)])
    about = {"command": command_line(), "versions": versions(), "batch": BATCH, "tokens": TOKENS, "drafted": LENGTH}
    options.output.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def measure(pair: Pair, batches: Sequence[Sequence[torch.Tensor]]) -> dict[str, Any]:
    """Return the median seconds of a batch under each way to serve it, and whether all outputs were the same."""
    config = OnlineConfig(learn=False, draft_length=LENGTH, draft_length_schedule="constant")
    pair.target.generation_config.eos_token_id = None  # so that all rows are equally long
    drafts = {name: copy.deepcopy(pair.draft) for name in "abcd"}
    with OnlineAssistant(drafts=drafts, target=pair.target, config=config) as assistant:

        def serve(rows: Sequence[torch.Tensor], keys: Any) -> torch.Tensor:
            inputs = join([as_inputs(row) for row in rows], 0)
            options = {"max_new_tokens": TOKENS, "do_sample": False}
            if keys is None:
                return pair.target.generate(**inputs, **options)[:, -TOKENS:]
            return hf_osd.generate(pair.target, **inputs, online_assistant=assistant, osd_route=keys, **options)[
                :, -TOKENS:
            ]

        ways: dict[str, Callable[[Sequence[torch.Tensor]], torch.Tensor]] = {
            "plain": lambda rows: serve(rows, None),
            "one draft": lambda rows: serve(rows, "a"),
            "two drafts": lambda rows: serve(rows, ["a", "b", "a", "b"]),
            "four drafts": lambda rows: serve(rows, ["a", "b", "c", "d"]),
            "split in two": lambda rows: torch.cat([serve(rows[:2], "a"), serve(rows[2:], "b")]),
            "split in four": lambda rows: torch.cat(
                [serve([row], key) for row, key in zip(rows, "abcd", strict=True)]
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        differ = 0
        for rows in batches:
            outputs = []
            for name, way in ways.items():
                began = time.perf_counter()
                outputs.append(way(rows))
                seconds[name].append(time.perf_counter() - began)
            differ += sum(not torch.equal(outputs[0], one) for one in outputs)
    return {
        "seconds": {name: round(statistics.median(taken[2:]), 4) for name, taken in seconds.items()},
        "outputs that differ from plain": differ,
        "batches": len(batches),
    }


if __name__ == "__main__":
    main()
