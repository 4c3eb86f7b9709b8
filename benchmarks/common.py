"""What the scripts share: prompts of several files in tokens, and a result that says what made it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_osd.evaluation.encoding import Inputs, encode_prompts
from hf_osd.evaluation.machine import versions
from hf_osd.evaluation.models import Pair
from hf_osd.evaluation.output import command_line, write_json
from hf_osd.evaluation.prompts import load_prompts


def load_requests(pair: Pair, sources: Sequence[str] | None, count: int, max_new_tokens: int) -> list[Inputs]:
    """Return so many prompts of each source in tokens; docstrings of the standard library where there is no source."""
    chosen: Sequence[str | None] = sources or [None]
    prompts = [prompt for source in chosen for prompt in load_prompts(source, count)]
    return encode_prompts(pair, prompts, max_new_tokens)


def write_result(result: dict[str, Any], output: str | None) -> None:
    """Print the result, and write it with the command and the versions where `output` says so."""
    about = {"command": command_line(), "versions": versions(), "threads": torch.get_num_threads()}
    result = about | result
    print(json.dumps(result, indent=1))
    if output:
        write_json(Path(output), result)
