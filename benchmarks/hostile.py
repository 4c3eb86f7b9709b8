"""
Write the hostile prompts of docs/laboratory.md: noise.jsonl, tokens drawn at random, and spam.jsonl, one prompt again
and again.

    python -m benchmarks.hostile --target models/pair_target --output hostile
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

PROMPTS = 150  # of each kind; a third of the longest mix, with some to spare
SHORTEST, LONGEST = 10, 60  # tokens of a prompt of noise
SPAM = "Win a free prize now! Click here, click here, click here!"


def noise(tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[str]:
    """Return prompts of tokens that were drawn at random, none of them special."""
    draw = random.Random(seed)
    plain = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    drawn = (draw.choices(plain, k=draw.randint(SHORTEST, LONGEST)) for _ in range(count))
    return [str(tokenizer.decode(tokens)) for tokens in drawn]


def write(path: Path, prompts: Sequence[str]) -> None:
    """Write JSON lines with a `prompt` column."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="whose tokenizer the noise is made with")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "noise.jsonl", noise(AutoTokenizer.from_pretrained(options.target), PROMPTS))
    write(options.output / "spam.jsonl", [SPAM] * PROMPTS)


if __name__ == "__main__":
    main()
