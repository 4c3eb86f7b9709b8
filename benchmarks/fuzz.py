"""
Compare greedy outputs with the target's own over requests made at random, on small random models in float32.

Every request draws an architecture, a batch, prompts that repeat themselves in part, processors, an end of text, and a
draft: the target blurred or shifted, or another model. Rounds are what the default settings make of them: chains and
trees of the draft's and the lookup's tokens. Near ties are told apart as in `equality`.

    python -m benchmarks.fuzz --cases 1000 --output benchmarks/results/fuzz.json
"""

import argparse
import copy
import random
from collections import Counter
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, Qwen3Config

import hf_osd
from hf_osd.serving.measured import MeasuredSpeculator

from .common import write_result
from .equality import NEAR_TIE, differences

VOCAB = 97
SHARED = {"vocab_size": VOCAB, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, **SHARED}
CONFIGS = {
    "llama": LlamaConfig(num_key_value_heads=2, **SIZES),
    "qwen3": Qwen3Config(num_key_value_heads=2, head_dim=16, **SIZES),
    "gemma": GemmaConfig(num_key_value_heads=1, head_dim=16, **SIZES),
    "gpt2": GPT2Config(n_embd=64, n_head=4, n_layer=2, n_positions=256, **SHARED),
}
DRAFTS = ("blurred", "shifted", "other")
PROCESSORS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"suppress_tokens": [5, 6, 7]},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 12},
)


def draft_of(target: Any, how: str) -> Any:
    """Return a draft that is wrong in some way."""
    if how == "other":
        return AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    draft = copy.deepcopy(target)
    if how == "shifted":
        draft.get_output_embeddings().register_forward_hook(lambda module, given, logits: logits.roll(1, -1))
        return draft
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    return draft


def assistants(kind: str) -> tuple[Any, Any, list[hf_osd.OnlineAssistant]]:
    """Return a target, the same in float64, and an assistant for each kind of draft."""
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    exact = copy.deepcopy(target).double()
    config = hf_osd.OnlineConfig(update_every=64)
    return target, exact, [hf_osd.OnlineAssistant(draft_of(target, how), target, config) for how in DRAFTS]


def request(choose: random.Random) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return left-padded prompts and the settings of one request."""
    batch, width = choose.randint(1, 4), choose.randint(2, 24)
    ids = torch.zeros(batch, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row in range(batch):
        length = choose.randint(1, width) if row else width
        phrase = [choose.randrange(3, VOCAB) for _ in range(choose.randint(1, length))]
        ids[row, width - length :] = torch.tensor((phrase * length)[:length])
        mask[row, width - length :] = 1
    eos = choose.sample(range(3, VOCAB), choose.choice([0, 1, 3]))
    settings = {"max_new_tokens": choose.randint(1, 48), "do_sample": False, "pad_token_id": 0}
    settings |= choose.choice(PROCESSORS) | ({"eos_token_id": eos} if eos else {})
    settings["max_new_tokens"] = max(settings["max_new_tokens"], settings.get("min_new_tokens", 0))
    return {"input_ids": ids, "attention_mask": mask}, settings


def count_trees(counts: Counter[str]) -> None:
    """Count the rounds that submit a tree, a chain, or nothing."""
    propose = MeasuredSpeculator.propose

    def counting(self: MeasuredSpeculator, *given: Any) -> Any:
        proposal = propose(self, *given)
        chain = "chains" if proposal.tokens.shape[1] else "plain rounds"
        counts["trees" if proposal.parents is not None else chain] += 1
        return proposal

    MeasuredSpeculator.propose = counting  # type: ignore[method-assign]


def fuzz(cases: int, seed: int) -> dict[str, Any]:
    """Serve all requests both ways."""
    choose, counts = random.Random(seed), Counter[str]()
    count_trees(counts)
    made = {kind: assistants(kind) for kind in CONFIGS}
    gaps: dict[int, list[float]] = {}
    for case in track(range(cases), transient=True):
        target, exact, ours = made[list(CONFIGS)[case % len(CONFIGS)]]
        inputs, settings = request(choose)
        expected = target.generate(**inputs, **settings)
        actual = hf_osd.generate(target, **inputs, **settings, online_assistant=choose.choice(ours))
        counts["rows"] += len(expected)
        if found := differences(exact, inputs, expected, actual):
            gaps[case] = found
    for _, _, ours in made.values():
        for assistant in ours:
            assistant.close()
    wrong = [case for case, found in gaps.items() if max(found) >= NEAR_TIE]
    near = [gap for found in gaps.values() for gap in found if gap < NEAR_TIE]
    return {"cases": cases, "seed": seed, "mismatches": len(wrong), "wrong_cases": wrong, "near_ties": near, **counts}


def main() -> None:
    """Parse options, compare, write; exits with 1 on a real mismatch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = fuzz(options.cases, options.seed)
    write_result(result, options.output)
    raise SystemExit(bool(result["mismatches"]))


if __name__ == "__main__":
    main()
