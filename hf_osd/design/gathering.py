"""Gathers the texts that a draft learns from, and those that it is judged by."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafts.machine import digest
from ..errors import InputError
from ..evaluation.encoding import end_tokens
from ..learning.reading import longest_request
from ..storage.identity import sample
from .requests import Request, encode_texts
from .texts import BY_THE_TARGET, STDLIB, Text, in_turn, load_texts
from .writing import write_prompts

ANSWER_TOKENS = 96
"""Most tokens of an answer that the target writes: later ones are of the same kind."""

_LONGEST = 512  # tokens of a text, at most: a step costs more with longer texts, and few prompts are longer
_HELD_OUT = 48  # held-out texts, at most: some 4,000 positions, which resolve an acceptance to .02
_EVERY = 8  # one text in so many is held out, so that those of a smaller run stay held out in a larger one
_FEWEST = 8  # texts to learn from, at least


@dataclass(frozen=True, slots=True)
class Material:
    """
    Texts in tokens.

    Attributes:
        learned (`list[Request]`): What is learned from.
        held_out (`list[Request]`): Prompts whose answers the draft is judged by; no prompt of them is learned from.
        about (`dict`): What they are, in figures.
    """

    learned: list[Request]
    held_out: list[Request]
    about: dict[str, int | list[str]]


def gather(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    limit: int,
    folder: Path,
    seed: int = 0,
    tell: Callable[[int], object] = lambda done: None,
) -> Material:
    """
    Collect texts, and hold some out.

    Every second text with an answer is learned from as it is, which takes one pass of the target; the others, and all
    without an answer, the target answers itself, as it will when it serves.

    Args:
        target (`PreTrainedModel`): The target.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        sources (`Sequence[str]`): See [`~hf_osd.design.texts.load_texts`]; `"target"` stands for prompts that the
            target writes itself, as many as an equal share of the limit. Without any, documented functions of the
            standard library and, where the tokenizer has a chat template, a quarter of the target's own.
        limit (`int`): How many texts, at most.
        folder (`Path`): Where prompts that the target has written are kept for another run.
        seed (`int`, defaults to 0): Of the prompts that the target writes.
        tell (`Callable[[int], object]`, *optional*): Told how many prompts the target has written.

    Raises:
        PromptSourceError: A source cannot be read.
        UnsupportedModelError: The target is to write prompts, and its tokenizer has no chat template.
        InputError: Too few texts fit.
    """
    others = [source for source in sources or [STDLIB] if source != BY_THE_TARGET]
    read = load_texts(others, limit) if others else []
    count = own_prompts(tokenizer, sources, limit)
    own = _own_prompts(target, tokenizer, count, folder, seed, tell) if count else []
    texts = _distinct([*in_turn((read[: limit - len(own)], own))])
    kept, apart = _split(texts)
    longest = longest_request(target, _LONGEST)
    room = min(ANSWER_TOKENS, longest // 2)
    ends = end_tokens(target)

    def encoded(some: Sequence[Text]) -> list[Request]:
        return encode_texts(tokenizer, some, ends[0] if ends else None, longest, room)

    learned = encoded([_mixed(text, number) for number, text in enumerate(kept)])
    held_out = [_asked(request) for request in encoded(apart)]
    if len(learned) < _FEWEST or not held_out:
        raise InputError(
            f"{len(learned)} texts to learn from and {len(held_out)} to judge by are too few, of {len(texts)} read: "
            f"give more than {2 * _FEWEST}, with prompts of up to {longest - room} tokens"
        )
    about: dict[str, int | list[str]] = {
        "sources": [*sources],
        "prompts_by_the_target": len(own),
        "texts": len(learned),
        "with_given_answers": sum(request.answer_ids is not None for request in learned),
        "held_out": len(held_out),
    }
    return Material(learned, held_out, about)


def _split(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Return the texts to learn from, and the held-out ones."""
    last = _EVERY * _HELD_OUT
    apart = [*texts[:last:_EVERY]]
    return [text for number, text in enumerate(texts) if number % _EVERY or number >= last], apart


def own_prompts(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], limit: int) -> int:
    """Return how many prompts the target is to write; see [`gather`]."""
    if not sources:
        return limit // 4 if tokenizer.chat_template else 0  # no more, since it takes minutes on a CPU
    return limit // len(sources) if BY_THE_TARGET in sources else 0


def _distinct(texts: Sequence[Text]) -> list[Text]:
    """Drop repeated prompts, so that no held-out text is learned."""
    return [*{json.dumps(text.answer if text.prompt is None else [text.prompt]): text for text in texts}.values()]


def _mixed(text: Text, number: int) -> Text:
    """Leave the answer of every second prompt to the target."""
    return replace(text, answer=None) if text.prompt is not None and number % 2 else text


def _asked(request: Request) -> Request:
    """Turn a text into a prompt without an answer; a document becomes a prompt up to its middle."""
    prompt = request.prompt_ids
    if len(prompt) == 1 and request.answer_ids is not None:
        prompt = torch.cat((prompt, request.answer_ids[: len(request.answer_ids) // 2]))
    return Request(prompt, None, len(prompt))


def _own_prompts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    folder: Path,
    seed: int,
    tell: Callable[[int], object],
) -> list[Text]:
    weights = {name: values.tolist() for name, values in sample(target.named_parameters()).items()}
    path = folder / f"prompts-{digest([weights, count, seed])}.json"
    if not path.is_file():
        written = [text.prompt for text in write_prompts(target, tokenizer, count, seed, tell)]
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(written, indent=1), encoding="utf-8")
    return [Text(prompt) for prompt in json.loads(path.read_text(encoding="utf-8"))]
