"""What the benchmarks share: models, prompts, versions, and where results go."""

import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_osd.demo.prompts import stdlib_prompts

PAIR = Path(__file__).parent.parent / "hf_osd" / "demo" / "pair"


def load_pair(target: str | None, draft: str | None) -> tuple[Any, Any, Any]:
    """Return target, draft (float32, on the CPU) and tokenizer; the embedded pair by default."""
    paths = (target or str(PAIR / "target"), draft or str(PAIR / "draft"))
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in paths]
    return *models, AutoTokenizer.from_pretrained(paths[0], padding_side="left")


def read_prompts(path: str | None, count: int) -> list[str]:
    """Return prompts of a .jsonl file with a `prompt` column; docstrings of the standard library by default."""
    if path is None:
        return stdlib_prompts()[:count]
    with Path(path).open(encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line, _ in zip(lines, range(count), strict=False)]


def encode(tokenizer: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Return the chat-formatted prompts as one left-padded batch."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def write_result(result: dict[str, Any], output: str | None) -> None:
    """Print the result, and write it with the command and the versions where `output` says so."""
    packages = ("torch", "transformers", "trl")
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        **result,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text + "\n")
