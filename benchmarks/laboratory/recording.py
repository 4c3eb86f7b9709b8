"""
What the target answers, with its distribution at every position: recorded once, kept as Parquet.

Not covered: targets that do not fit beside their logits; a batch holds `batch_size * max_new_tokens` rows of them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from hf_osd.drafts.states import StateTap
from hf_osd.evaluation.encoding import as_inputs, context_of, end_tokens, join, token_ids, until_end
from hf_osd.evaluation.models import Pair, greedy_options
from hf_osd.evaluation.prompts import Prompt
from hf_osd.records import Observation, sparse_teacher

from . import fingerprints

# Prompts recorded between two writes of the file: what an interruption costs.
_CHUNK = 128
_COLUMNS = {
    "prompt_ids": np.int32,
    "output_ids": np.int32,
    "teacher_ids": np.int32,  # (output * k,), row by row
    "teacher_log_probs": np.float32,  # likewise
    "teacher_tail": np.float32,
}
_STATES = "states"  # (tokens * size,) of bfloat16 as int16, only where a draft reads them


@dataclass(frozen=True, kw_only=True)
class RecordingSettings:
    """
    How the target answers.

    Args:
        max_new_tokens (`int`, defaults to 64): Tokens of an answer, at most.
        max_prompt_tokens (`int`, defaults to 400): Tokens of a prompt, its end, that are kept.
        temperature (`float`, defaults to 0.0): 0 is greedy; otherwise answers are sampled at it. The recorded
            distributions are those at temperature 1 in either case, as in serving.
        top_k_teacher (`int`, defaults to 32): Log-probabilities kept at a position.
        batch_size (`int`, defaults to 32): Prompts answered at a time; changes answers by rounding only.
        seed (`int`, defaults to 0): Of the sampling.
        state_layers (`tuple[int, ...]`, defaults to `()`): Layers of the target whose states are kept, for a draft
            that reads them.
        dtype (`str`, defaults to `"float32"`): In which the target answers.
    """

    max_new_tokens: int = 64
    max_prompt_tokens: int = 400
    temperature: float = 0.0
    top_k_teacher: int = 32
    batch_size: int = 32
    seed: int = 0
    state_layers: tuple[int, ...] = ()
    dtype: str = "float32"

    def fingerprint(self, target: PreTrainedModel) -> str:
        """Hash what an answer depends on, besides its prompt."""
        settings = {name: value for name, value in asdict(self).items() if name != "batch_size"}
        return fingerprints.of_values([settings, fingerprints.of_model(target)])


def prompt_tokens(pair: Pair, prompts: Sequence[Prompt], settings: RecordingSettings) -> list[torch.Tensor]:
    """Return each prompt as the target gets it when it is served, `(prompt,)`; its end where it is long."""
    limit = min(settings.max_prompt_tokens, context_of(pair) - settings.max_new_tokens)
    if limit < 1:
        raise SystemExit(f"--max-new-tokens {settings.max_new_tokens} leaves no room for a prompt")
    return [token_ids(pair.tokenizer, prompt)[0, -limit:].long() for prompt in prompts]


def recorded(
    path: Path,
    prompts: Sequence[torch.Tensor],
    target: PreTrainedModel,
    settings: RecordingSettings,
    tell: Callable[[int], None] = lambda done: None,
) -> list[Observation]:
    """
    Return the target's answers to prompts: from the file as far as it has them, the rest now, into the file.

    Args:
        path (`Path`): Parquet file; made, continued, or replaced where it is of another target or other settings.
        prompts (`Sequence[torch.LongTensor]`): Prompts of shape `(prompt,)`.
        target ([`~transformers.PreTrainedModel`]): The target.
        settings (`RecordingSettings`): How it answers.
        tell (`Callable[[int], None]`, *optional*): Told how many answers there are, again and again.

    Returns:
        `list[Observation]`: One for each prompt, as if nothing had been drafted: `draft_ids` is -1 throughout.
    """
    fingerprint = settings.fingerprint(target)
    known = _reusable(path, prompts, fingerprint)
    tell(min(len(known), len(prompts)))
    while len(known) < len(prompts):
        chunk = prompts[len(known) : len(known) + _CHUNK]
        torch.manual_seed(settings.seed + len(known))
        known += answer(target, chunk, settings)
        write(path, known, fingerprint)
        tell(len(known))
    return known[: len(prompts)]


def _reusable(path: Path, prompts: Sequence[torch.Tensor], fingerprint: str) -> list[Observation]:
    """Return what the file holds, if it begins with these prompts, or all it holds are the first of them."""
    if not path.is_file():
        return []
    kept, observations = read(path)
    same = all(torch.equal(one.prompt_ids, ids) for one, ids in zip(observations, prompts, strict=False))
    return observations if kept == fingerprint and same else []


def answer(target: PreTrainedModel, prompts: Sequence[torch.Tensor], settings: RecordingSettings) -> list[Observation]:
    """Answer prompts, those of similar length together; in the order given."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Observation] = {}
    for start in range(0, len(order), settings.batch_size):
        indices = order[start : start + settings.batch_size]
        batch = _answer_batch(target, [prompts[index] for index in indices], settings)
        answers |= dict(zip(indices, batch, strict=True))
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def _answer_batch(
    target: PreTrainedModel, prompts: Sequence[torch.Tensor], settings: RecordingSettings
) -> list[Observation]:
    ends = end_tokens(target)
    pad = ends[0] if ends else 0
    inputs = join([as_inputs(prompt) for prompt in prompts], pad)
    options = greedy_options(pad, settings.max_new_tokens)
    if settings.temperature > 0.0:
        options |= {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    text = target.generate(**inputs, **options)
    outputs = text[:, inputs["input_ids"].shape[1] :]
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(outputs)), dim=1)
    logits, states = _read(target, text, mask, outputs.shape[1], settings.state_layers)
    found = []
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        output = until_end(output, ends).clone()
        teacher = sparse_teacher(logits[row, : len(output)].float(), settings.top_k_teacher)
        known = None if states is None else _states_of(states[row], text.shape[1] - outputs.shape[1], prompt, output)
        found.append(_undrafted(prompt, output, *teacher, known))
    return found


def _read(
    target: PreTrainedModel, text: torch.Tensor, mask: torch.Tensor, count: int, layers: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits that chose the last `count` tokens, `(batch, count, vocab)`, and states of all but the last token."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": text[:, :-1], "attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
    if not layers:
        return target(**inputs, logits_to_keep=count).logits, None
    outputs, states = StateTap.of(target, layers).read(lambda: target(**inputs, logits_to_keep=count))
    return outputs.logits, states


def _states_of(states: torch.Tensor, begin: int, prompt: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """States of a row whose prompt ends, and whose output begins, at `begin`; as serving records them."""
    return states[begin - len(prompt) : begin + len(output) - 1].to(torch.bfloat16, copy=True)


def _undrafted(
    prompt: torch.Tensor,
    output: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    tail: torch.Tensor,
    states: torch.Tensor | None = None,
) -> Observation:
    drafted, accepted = torch.full_like(output, -1), torch.zeros_like(output, dtype=torch.bool)
    return Observation(prompt, output, ids, log_probs, tail, drafted, accepted, states)


def write(path: Path, observations: Sequence[Observation], fingerprint: str) -> None:
    """Write a recording, all of it or nothing."""
    columns = {
        name: pa.array([getattr(one, name).flatten().numpy().astype(kind) for one in observations])
        for name, kind in _COLUMNS.items()
    }
    if any(one.states is not None for one in observations):
        columns[_STATES] = pa.array([one.states.view(torch.int16).flatten().numpy() for one in observations])
    table = pa.table(columns).replace_schema_metadata({"hf_osd": json.dumps({"fingerprint": fingerprint})})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.replace(path)


def read(path: Path) -> tuple[str, list[Observation]]:
    """Return the fingerprint of a recording, and its requests."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"hf_osd"])
    columns = [table[name] for name in (*_COLUMNS, _STATES) if name in table.column_names]
    rows = zip(*columns, strict=True)
    return about["fingerprint"], [
        _row(*(torch.from_numpy(value.values.to_numpy().copy()) for value in row)) for row in rows
    ]


def _row(prompt: torch.Tensor, output: torch.Tensor, *rest: torch.Tensor) -> Observation:
    ids, log_probs, tail, *states = rest
    shape = (len(output), -1)
    known = [one.view(torch.bfloat16).view(len(prompt) + len(output) - 1, -1) for one in states]
    return _undrafted(prompt.long(), output.long(), ids.long().view(shape), log_probs.view(shape), tail, *known)
