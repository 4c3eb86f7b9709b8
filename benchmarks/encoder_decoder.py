"""
A small pair of T5's shape, trained in minutes on two tasks, through the laboratory's recipes.

    python -m benchmarks.encoder_decoder --data DATA --folder pair --output learning_encoder_decoder.json

DATA has `spider/` (questions and SQL) and `python/` (docstrings and functions; here the function is the source, and
the first line of its docstring is asked for). Each has `train.jsonl` and `stream.jsonl` of `prompt` and `response`:
both models are trained on the former, the latter is what is asked. Greedy answers of up to 32 tokens are recorded, and
replayed as docs/laboratory.md says. A few requests of each task are served as well, by a draft that learns in
between, and compared with what the target gives alone.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

import hf_osd
from hf_osd.records import Observation, sparse_teacher

from .laboratory import report
from .laboratory.goals import Run
from .laboratory.recipes import choose, load_recipes
from .laboratory.runs import make_tasks, run_all, run_here
from .laboratory.streams import alone

PAD, END = 0, 1
SOURCE, ANSWER = 80, 32  # tokens, at most
VOCABULARY = 2048
BATCH = 32
WARM_UP = 50  # steps
TOP_K = 32  # log-probabilities kept at a position
TASKS = {"spider": ("prompt", "response"), "summaries": ("response", "prompt")}
FOLDERS = {"spider": "spider", "summaries": "python"}
SHAPES: dict[str, dict[str, Any]] = {
    "target": dict(d_model=128, d_kv=32, d_ff=384, num_heads=4, num_layers=3, num_decoder_layers=3),
    "draft": dict(d_model=64, d_kv=16, d_ff=192, num_heads=4, num_layers=1, num_decoder_layers=1),
}
RATES = {"target": 2e-3, "draft": 4e-3}  # of learning, at its highest

Example = tuple[str, str]
"""A source and its answer."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the pair and of finished runs; used again")
    parser.add_argument("--output", type=Path, help="the result, as JSON")
    parser.add_argument("--target-steps", type=int, default=800)
    parser.add_argument("--draft-steps", type=int, default=200)
    parser.add_argument("--requests", type=int, default=800, help="of each task")
    parser.add_argument("--served", type=int, default=60, help="requests of each task that are served and compared")
    parser.add_argument("--recipes", nargs="+", default=["static", "algorithm_1", "defaults"])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, record, replay, serve, report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    tokenizer = _tokenizer(options)
    steps = {"target": options.target_steps, "draft": options.draft_steps}
    pair = {role: _model(role, tokenizer, count, options) for role, count in steps.items()}
    sources = {
        task: [
            _ids(tokenizer, text, SOURCE) for text, _ in _examples(options.data, task, "stream")[: options.requests]
        ]
        for task in TASKS
    }
    recordings = {task: _recorded(pair["target"], found) for task, found in sources.items()}
    streams, recipes = (
        [alone(task, len(found)) for task, found in sources.items()],
        choose(load_recipes(), options.recipes),
    )
    tasks = make_tasks(streams, recipes, recordings, pair["draft"], options.folder / "runs")
    run = partial(run_here, draft=pair["draft"], recordings=recordings)
    results = run_all(tasks, run, lambda task, fresh: print(task.stream.name, task.recipe.name, flush=True))
    measured = [(stream, [Run(recipe, results[stream.name, recipe.name]) for recipe in recipes]) for stream in streams]
    about = {role: {"parameters": model.num_parameters(), "steps": steps[role]} for role, model in pair.items()}
    served = {task: _served(pair, found[: options.served]) for task, found in sources.items()}
    found = report.document({"pair": about, "served": served}, measured)
    print(report.markdown(found), json.dumps(served), sep="\n")
    if options.output is not None:
        options.output.write_text(report.compact(found) + "\n", encoding="utf-8")


def _examples(data: Path, task: str, split: str) -> list[Example]:
    lines = (data / FOLDERS[task] / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    source, answer = TASKS[task]
    rows = [json.loads(line) for line in lines]
    return [(_said(row[source]), _said(row[answer]).splitlines()[0]) for row in rows if _said(row[answer])]


def _said(text: str) -> str:
    """Return a text without the words by which the prompt of the other direction begins."""
    return text.removeprefix("Please generate code based on the following doc:\n").strip()


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    path = options.folder / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"], show_progress=False)
    texts = (text for task in TASKS for example in _examples(options.data, task, "train") for text in example)
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def _ids(tokenizer: Tokenizer, text: str, most: int) -> torch.Tensor:
    return torch.tensor([*tokenizer.encode(text).ids[: most - 1], END])


def _model(role: str, tokenizer: Tokenizer, steps: int, options: argparse.Namespace) -> PreTrainedModel:
    """Return a model of the pair: from the folder, or trained now."""
    folder = options.folder / f"{role}-{steps}"
    if not folder.is_dir():
        torch.manual_seed(0)
        ids = dict(vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD)
        config = T5Config(**SHAPES[role], **ids, dropout_rate=0.0, feed_forward_proj="gated-gelu")
        model = T5ForConditionalGeneration(config)
        examples = [
            (_ids(tokenizer, source, SOURCE), _ids(tokenizer, answer, ANSWER))
            for task in TASKS
            for source, answer in _examples(options.data, task, "train")
        ]
        _train(model, examples, steps, RATES[role])
        model.save_pretrained(folder)
    return T5ForConditionalGeneration.from_pretrained(folder).eval()


def _train(model: Any, examples: Sequence[tuple[torch.Tensor, torch.Tensor]], steps: int, rate: float) -> None:
    """Train on examples at random; the learning rate rises, then falls to zero as a cosine does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)

    def share(step: int) -> float:
        return min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = [examples[place] for place in torch.randint(len(examples), (BATCH,), generator=draw).tolist()]
        answers = pad_sequence([answer for _, answer in chosen], batch_first=True, padding_value=-100)
        loss = model(**_padded([source for source, _ in chosen]), labels=answers).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f} nats", flush=True)


def _padded(sources: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = pad_sequence(list(sources), batch_first=True, padding_value=PAD)
    mask = pad_sequence([torch.ones_like(source) for source in sources], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def _recorded(target: Any, sources: Sequence[torch.Tensor]) -> list[Observation]:
    """Return the target's greedy answers, as serving records them."""
    starts = range(0, len(sources), BATCH)
    return [one for start in starts for one in _answers(target, sources[start : start + BATCH])]


@torch.no_grad()
def _answers(target: Any, sources: Sequence[torch.Tensor]) -> Iterator[Observation]:
    inputs = _padded(sources)
    text = target.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
    logits = target(**inputs, decoder_input_ids=text[:, :-1]).logits
    for source, row, scores in zip(sources, text, logits, strict=True):
        ends = (row[1:] == END).nonzero()
        count = int(ends[0]) + 1 if len(ends) else len(row) - 1
        output, teacher = row[1 : count + 1].clone(), sparse_teacher(scores[:count], TOP_K)
        drafted = torch.full_like(output, -1), torch.zeros_like(output, dtype=torch.bool)
        yield Observation(row[:1].clone(), output, *teacher, *drafted, source_ids=source)


def _served(pair: dict[str, PreTrainedModel], sources: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Serve requests by a draft that learns from them; count outputs that differ from the target's own."""
    target, differ = pair["target"], 0
    draft = T5ForConditionalGeneration(pair["draft"].config).eval()
    draft.load_state_dict(pair["draft"].state_dict())
    config = hf_osd.OnlineConfig(background=False, draft_length_schedule="constant")
    with hf_osd.OnlineAssistant(draft, target, config) as assistant:
        for source in sources:
            call = {**_padded([source]), "max_new_tokens": ANSWER, "do_sample": False}
            differ += not torch.equal(
                target.generate(**call), hf_osd.generate(target, **call, online_assistant=assistant)
            )
        stats = assistant.stats()
    counts = (
        "requests",
        "fallbacks",
        "generated_tokens",
        "target_passes",
        "draft_tokens",
        "accepted_tokens",
        "updates",
    )
    return {"outputs_that_differ": differ, **{name: getattr(stats, name) for name in counts}}


if __name__ == "__main__":
    main()
