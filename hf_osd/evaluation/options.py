"""What the options that the demo and the benchmark share may be."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import FLAG, PATH, RULES, TEXT, Rule, integer, number, optional


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(TEXT.accepts(text) for text in value)


SEEDS = 2**64  # that torch tells apart; a seed plus the number of a request begins anew there
NAME = optional(TEXT)
NAMES = Rule("a sequence of texts that are not empty", _are_texts, tuple)
SECONDS = number(1e-6, 1e9)  # JSON has no infinity

OPTIONS: dict[str, Rule] = {
    "target": NAME,
    "assistant": NAME,
    "requests": integer(1, 10**9),
    "max_new_tokens": integer(1, 2**20),  # longer than most contexts
    "seed": RULES["seed"],
    "device": TEXT,
    "dtype": TEXT,
    "threads": optional(integer(1, os.cpu_count() or 1)),  # more only wait for each other, and many more crash torch
    "output": replace(PATH, keep=Path),
    "plot": FLAG,
}
"""Rules of the options of both commands, by field."""
