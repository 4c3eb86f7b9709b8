"""A pair of models trained by the benchmark itself, from prompts and their responses, in a few minutes of a GPU."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_osd.bench.session import Steps
from hf_osd.config import shown
from hf_osd.errors import PromptSourceError
from hf_osd.evaluation.prompts import INSTRUCTION, checked_text, is_held_out, stdlib_functions
from hf_osd.evaluation.rows import json_lines

BLOCK = 512  # tokens of a packed training sequence
_TOKENS_A_STEP = 2**14  # on a GPU; a CPU gets one block at a time
_TARGET_SHARE = 0.75  # of the training time


@dataclass(frozen=True, slots=True)
class Recipe:
    """
    How to train one model.

    Attributes:
        seconds (`float`): Wall-clock time of training; the learning rate's schedule spans it.
        batch (`int`): Blocks in one step.
        learning_rate (`float`): Its peak.
        seed (`int`): Order of the rows.
    """

    seconds: float
    batch: int
    learning_rate: float
    seed: int = 0


def load_rows(sources: Sequence[str]) -> list[tuple[str, str]]:
    """
    Return prompts and responses.

    Args:
        sources (`Sequence[str]`): `.jsonl` files with the columns `prompt` and `response`; the documented functions of
            the standard library, but for those that the default stream serves, if there is none.

    Raises:
        PromptSourceError: A file cannot be read, lacks a column, or holds nothing.
    """
    if not sources:
        functions = stdlib_functions(keep=lambda docstring: not is_held_out(docstring))
        return [(INSTRUCTION + docstring, source) for docstring, source in functions]
    if rows := [row for source in sources for row in _read(Path(source))]:
        return rows
    raise PromptSourceError(f"{', '.join(sources)}: no prompts and responses in it")


def _read(path: Path) -> Iterator[tuple[str, str]]:
    for where, row in json_lines(path):
        texts = [row.get(name) if isinstance(row, dict) else None for name in ("prompt", "response")]
        prompt, response = (checked_text(text, where) if isinstance(text, str) else None for text in texts)
        if prompt is None or response is None:
            raise PromptSourceError(
                f"{where}: expected an object with 'prompt' and 'response', two texts, got {shown(row)}"
            )
        yield prompt, response


def pack(rows: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """
    Join the conversations, by the tokenizer's chat template where it has one, and cut them into blocks.

    Returns:
        `torch.LongTensor` of shape `(blocks, BLOCK)`: At least one block; short texts are repeated.
    """
    stream: list[int] = []
    for prompt, response in rows:
        stream.extend(_conversation(tokenizer, prompt, response))
    ids = torch.tensor(stream)
    ids = ids.repeat(-(-BLOCK // len(ids)))
    return ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)


def _conversation(tokenizer: Any, prompt: str, response: str) -> list[int]:
    if not tokenizer.chat_template:
        return [*tokenizer(f"{prompt}\n{response}")["input_ids"], tokenizer.eos_token_id]
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return list(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])


def recipes(target: PreTrainedModel, draft: PreTrainedModel, seconds: float, seed: int) -> tuple[Recipe, Recipe]:
    """Share out the time, and choose what suits each model's size: wider models take smaller steps."""

    def recipe(model: PreTrainedModel, share: float) -> Recipe:
        batch = _TOKENS_A_STEP // BLOCK if model.device.type == "cuda" else 1
        return Recipe(share * seconds, batch, min(2e-3, 0.6 / model.config.hidden_size), seed)

    return recipe(target, _TARGET_SHARE), recipe(draft, 1 - _TARGET_SHARE)


def train(model: PreTrainedModel, blocks: torch.Tensor, recipe: Recipe, steps: Steps, name: str) -> dict[str, Any]:
    """
    Train a model in place: AdamW, cosine after a short warm-up, weights in float32 and forwards in bf16.

    Args:
        model (`PreTrainedModel`): In float32, with random weights.
        blocks (`torch.LongTensor` of shape `(blocks, BLOCK)`): What to learn.
        recipe (`Recipe`): How.
        steps (`Steps`): Shows progress, in hundredths of the time.
        name (`str`): What to call the model meanwhile.

    Returns:
        `dict[str, Any]`: Steps, tokens seen, and the mean loss over the last tenth of the steps.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    done, shown = steps(f"training the {name}", 100), 0
    losses: list[torch.Tensor] = []
    start = perf_counter()
    model.train()
    for batch in _batches(blocks, recipe):
        progress = (perf_counter() - start) / recipe.seconds
        if progress >= 1 and losses:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(progress)
        losses.append(_step(model, batch.to(model.device, non_blocking=True), optimizer))
        while shown < min(100 * progress, 100):
            done()
            shown += 1
    model.eval()
    last = torch.stack(losses[-max(len(losses) // 10, 1) :]).mean().item()
    return {"steps": len(losses), "tokens": len(losses) * recipe.batch * BLOCK, "loss": last}


def _step(model: PreTrainedModel, batch: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    kind = model.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        loss: torch.Tensor = model(batch, labels=batch, use_cache=False).loss
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()  # read at the end, so that no step waits for the device


def _schedule(progress: float) -> float:
    warm_up = 0.03
    if progress < warm_up:
        return max(progress / warm_up, 0.01)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _batches(blocks: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield batches of shuffled blocks, epoch after epoch, without an end."""
    order = random.Random(recipe.seed)
    indices = list(range(len(blocks))) * -(-recipe.batch // len(blocks))
    while True:
        order.shuffle(indices)
        for start in range(0, len(indices) - recipe.batch + 1, recipe.batch):
            yield blocks[indices[start : start + recipe.batch]]
