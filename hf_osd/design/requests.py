"""Turns texts into tokens as serving will, and marks the beginnings that teach nothing, such as chat templates."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..config import reason_of
from ..errors import InputError
from ..evaluation.encoding import token_ids
from .texts import Text

_RECENT = 9  # latest prompts that one is compared with: one more than the sources that may take turns
_OPENINGS = ("What", "123", "- a")  # user messages that differ from their first character on


@dataclass(frozen=True, slots=True)
class Request:
    """
    A text in tokens, for [`~hf_osd.design.recording.record`].

    Attributes:
        prompt_ids (`torch.LongTensor` of shape `(prompt,)`): What is asked, as the target gets it.
        answer_ids (`torch.LongTensor` of shape `(answer,)`, *optional*): The answer; `None` for the target's.
        head (`int`): Tokens at the beginning that are not learned, such as those that a chat template or a system
            prompt always begins with; at least 1, for nothing is drafted before the first token.
    """

    prompt_ids: torch.Tensor
    answer_ids: torch.Tensor | None
    head: int


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Text], end: int | None, longest: int, room: int
) -> list[Request]:
    """
    Turn texts into requests, by the tokenizer's chat template where it has one.

    What a prompt has in common with one of the last few, from its first token on, teaches nothing: it is the template,
    a system prompt or an instruction, which would otherwise be learned again with every text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        texts (`Iterable[Text]`): The texts.
        end (`int`, *optional*): Token behind an answer; `None` for none.
        longest (`int`): Tokens of a request at most; answers are cut off there.
        room (`int`): Tokens that are kept for an answer; texts whose prompt is too long for that are left out.

    Raises:
        InputError: The tokenizer or its template refuses a text.
    """
    ending = [] if end is None else [end]
    recent, found = deque([template_head(tokenizer)], maxlen=_RECENT), []
    for number, text in enumerate(texts, start=1):
        prompt, answer = _encode(tokenizer, text, ending, number)
        if 0 < len(prompt) <= longest - room and (answer is None or len(prompt) + len(answer) > 1):
            head = max(_shared(prompt, other) for other in recent)
            found.append(Request(prompt, answer if answer is None else answer[: longest - len(prompt)], head))
            recent.append(prompt)
    return found


def template_head(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the tokens that every user prompt begins with, `(head,)`: the common prefix of different ones."""
    prompts = [token_ids(tokenizer, opening)[0] for opening in _OPENINGS]
    return prompts[0][: min(_shared(prompts[0], other, 0) for other in prompts[1:])].long()


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special tokens, and those that the chat template writes."""
    special = set(tokenizer.all_special_ids)
    if not tokenizer.chat_template:
        return special
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    written: Any = token_ids(tokenizer, chat)[0].tolist()
    return special | set(written) & set(tokenizer.added_tokens_decoder)


def _shared(ids: torch.Tensor, head: torch.Tensor, least: int = 1) -> int:
    """Count the tokens that a text has in common with a head, from the first on."""
    count = min(len(ids), len(head))
    same = (ids[:count] == head[:count]).long().cumprod(0)
    return max(least, int(same.sum()))


def _encode(tokenizer: Any, text: Text, ending: list[int], number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    try:
        if text.prompt is None:
            ids = torch.tensor(tokenizer(text.answer)["input_ids"], dtype=torch.long)
            return ids[:1], ids[1:]
        prompt = token_ids(tokenizer, text.prompt)[0].long()
        if text.answer is None:
            return prompt, None
        answer = text.answer if tokenizer.chat_template else f"\n{text.answer}"  # a template ends prompts itself
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return prompt, torch.tensor([*ids, *ending], dtype=torch.long)
    except Exception as error:  # a chat template is a program, which may raise anything
        raise InputError(f"text {number} cannot be encoded: {reason_of(error)}") from error
