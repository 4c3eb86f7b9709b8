"""
What an update of the draft costs: memory and time of full training, bf16, checkpointing and adapters.

Memory is taken in a process for each variant: on CUDA the peak of the allocator, on the CPU (Linux only) the peak of
the resident set, both above what was held with the draft loaded, and after an update of a tiny draft, so that neither
the imports nor the libraries' own buffers count. What is trained, its gradients and AdamW's two moments are counted
from the parameters. Times are of all variants in one process, which take turns; medians. The requests are random
tokens: the cost does not depend on what they say.

    python -m benchmarks.training_cost --shape 512x6 --output benchmarks/results/training_cost.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_osd import OnlineConfig
from hf_osd.learning import OnlineLearner
from hf_osd.learning.student import Student
from hf_osd.records import Observation

from .common import write_result

TEACHER, VOCABULARY = 32, 32_000
LORA: dict[str, Any] = {}  # the defaults of a mapping
BF16, CHECKPOINTING = {"bf16": True}, {"gradient_checkpointing": True}
# The type of the draft, and what OnlineConfig adds.
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "full": (torch.float32, {}),
    "full, bf16 autocast": (torch.float32, {"training_arguments": BF16}),
    "full, checkpointing": (torch.float32, {"training_arguments": CHECKPOINTING}),
    "LoRA": (torch.float32, {"peft_config": LORA}),
    "LoRA, bf16": (torch.bfloat16, {"peft_config": LORA, "training_arguments": BF16}),
    "LoRA, bf16, checkpointing": (
        torch.bfloat16,
        {"peft_config": LORA, "training_arguments": BF16 | CHECKPOINTING},
    ),
}


def make_draft(options: argparse.Namespace, dtype: torch.dtype, shape: str | None = None) -> Any:
    """Return the draft of a folder, or a Llama of random weights, such as 512x6: hidden size by layers."""
    if options.draft is not None and shape is None:
        return AutoModelForCausalLM.from_pretrained(options.draft, dtype=dtype).to(options.device).eval()
    hidden, layers = map(int, (shape or options.shape).split("x"))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(options.device, dtype).eval()


def make_requests(options: argparse.Namespace, vocabulary: int) -> list[Observation]:
    """Return requests of random tokens, half prompt and half output, with a random teacher."""
    half = options.tokens // 2
    requests = []
    for seed in range(options.batch_size):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (options.tokens,), generator=generator)
        log_probs, top = torch.randn(half, vocabulary, generator=generator).log_softmax(-1).topk(TEACHER)
        tail = 1.0 - log_probs.exp().sum(-1)
        nothing = torch.zeros(half, dtype=torch.bool)
        requests.append(Observation(ids[:half], ids[half:], top, log_probs, tail, ids[half:], nothing))
    return requests


def make_learner(options: argparse.Namespace, draft: Any, variant: dict[str, Any]) -> OnlineLearner:
    """Return a learner with the requests recorded, which learns when it is told to."""
    config = OnlineConfig(
        update_every=10**9, steps_per_update=options.steps, batch_size=options.batch_size, learning_rate=1e-9,
        max_length=options.tokens, **variant,
    )  # fmt: skip
    learner = OnlineLearner(draft, config, ignore)
    for request in make_requests(options, draft.config.vocab_size):
        learner.observe(request)
    return learner


def ignore(weights: Any, acceptance: float) -> None:
    """Publish nowhere."""


def count(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return what a variant trains and keeps, from its parameters."""
    dtype, variant = VARIANTS[name]
    student = Student(make_draft(options, dtype), variant.get("peft_config"))
    trained = sum(weight.numel() for weight in student.state().values())
    copied = sum(weight.numel() * weight.element_size() for weight in student.model.parameters())
    megabytes = {"weights": copied, "gradients": 4 * trained, "optimizer": 8 * trained}
    return {"trained_parameters": trained} | {f"{key}_mb": round(size / 1e6, 2) for key, size in megabytes.items()}


class Peak:
    """Memory above that at the start, at most, in bytes."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.start = self.now()

    def now(self) -> int:
        """Return the high-water mark."""
        if self.cuda:
            return int(torch.cuda.max_memory_allocated())
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    def taken(self) -> int:
        """Return the difference."""
        return self.now() - self.start


def measure_memory(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Return the peak of a variant's first two updates; run in a process of its own."""
    dtype, variant = VARIANTS[name]
    draft = make_draft(options, dtype)
    warm = make_learner(options, make_draft(options, dtype, shape="64x1"), variant)
    warm.update()
    warm.close()
    learner = make_learner(options, draft, variant)
    peak = Peak(options.device)
    for _ in range(2):
        learner.update()
    return {"peak_mb": round(peak.taken() / 1e6, 1)}


def in_another_process(name: str) -> dict[str, float]:
    """Return what `measure_memory` finds."""
    command = [sys.executable, "-m", "benchmarks.training_cost", *sys.argv[1:], "--memory-of", name]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def measure_times(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the median seconds of an update of each variant; they take turns."""
    learners = {
        name: make_learner(options, make_draft(options, dtype), variant) for name, (dtype, variant) in VARIANTS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    for turn in range(options.turns + 1):
        for name, learner in learners.items():
            start = time.perf_counter()
            learner.update()
            if turn:  # the first builds the trainer
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {"seconds": round(median, 4), "seconds_ratio": round(median / medians["full"], 3)}
        for name, median in medians.items()
    }


def main() -> None:
    """Parse options, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", help="folder; a random draft of --shape by default")
    parser.add_argument("--shape", default="256x4", help="hidden size x layers of the random draft")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a request, half of them output")
    parser.add_argument("--steps", type=int, default=2, help="of an update")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(measure_memory(options, options.memory_of)))
        return
    results = {name: count(options, name) | in_another_process(name) for name in VARIANTS}
    times = measure_times(options)
    chosen = {key: getattr(options, key) for key in ("device", "shape", "batch_size", "tokens", "steps", "turns")}
    write_result(chosen | {"variants": {name: results[name] | times[name] for name in VARIANTS}}, options.output)


if __name__ == "__main__":
    main()
