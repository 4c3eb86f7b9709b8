"""
Train economize's EAGLE-3 head for a target, by economize's own loop, for `benchmarks.suites --peers --eagle3 FOLDER`.

The head drafts the most frequent tokens of the texts, as EAGLE-3 does. Rows are short and few draft steps are
unrolled, since on a CPU each of them costs the head's logits at every position. The number of steps follows from the
time that the first few take, so it is only about `--seconds`.

    python -m benchmarks.eagle3 --target T --prompts gsm8k/train.jsonl --seconds 900 --output FOLDER
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import economize
import torch
from economize.techniques.eagle3 import Eagle3Config
from economize.train import fit
from transformers import AutoModelForCausalLM, AutoTokenizer

from .suites.training import load_rows, pack

ROW = 128  # tokens of a training row
UNROLLED = 3  # draft steps; the paper's 7 cost more than twice as much
TIMED = 4  # steps that tell how many fit into the time
WARM_UP = 0.05  # share of the steps in which the learning rate rises


def attach(target: Any, rows: torch.Tensor, vocabulary: int) -> Any:
    """Attach a new head that drafts the most frequent tokens of the rows."""
    size = min(vocabulary, target.config.vocab_size)
    model = economize.apply(target, Eagle3Config(draft_vocab=size, train_steps=UNROLLED))
    counts = rows.flatten().bincount(minlength=target.config.vocab_size)
    model.techniques["eagle3"].set_draft_vocab(counts.topk(size).indices)
    return model


def train(model: Any, rows: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Train for about so many seconds; return the steps, the time and the last figures that economize logged."""
    settings = {"batch_size": options.batch_size, "seed": 0, "autocast": "bfloat16"}
    start = time.perf_counter()
    fit(model, rows, steps=TIMED, **settings)
    steps = max(int(options.seconds * TIMED / (time.perf_counter() - start)), TIMED)
    found = fit(
        model, rows, steps=steps, lr=options.learning_rate, schedule="cosine", warmup_steps=int(WARM_UP * steps),
        output_dir=options.output, log_every=max(steps // 20, 1), **settings,
    )  # fmt: skip
    return {"steps": steps, "seconds": time.perf_counter() - start, "last": found.history[-1]}


def main(arguments: list[str] | None = None) -> None:
    """Train, and say where the head is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="Hub id or folder")
    parser.add_argument(
        "--prompts", action="append", default=[], help=".jsonl of prompt and response; repeat for more"
    )
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens that the head can draft")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="economize's own is 1e-4, for long runs")
    parser.add_argument("--dtype", default="float32", help="of the target, which only reads")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=getattr(torch, options.dtype)).eval()
    rows = pack(load_rows(options.prompts), AutoTokenizer.from_pretrained(options.target)).view(-1, ROW)
    model = attach(target, rows, options.vocabulary)
    print(json.dumps(train(model, rows, options) | {"head": str(options.output / "final")}, indent=1))


if __name__ == "__main__":
    main()
