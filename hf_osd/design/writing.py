"""Lets the target write: answers to prompts, and prompts without any data."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UnsupportedModelError
from ..evaluation.encoding import as_inputs, end_tokens, join, until_end
from ..evaluation.models import greedy_options
from .requests import template_head
from .texts import Text

_PROMPT_TOKENS = 64  # tokens of a written prompt, at most; longer ones, about a fifth, are dropped
_TOP_K, _TOP_P = 256, 0.95  # sampling of prompts: unlikely tokens derail a small model
_OPENINGS = (
    *("Explain", "How many", "What is the", "Why", "How do I", "Write a Python function that", "Write a SQL query to"),
    *("Calculate", "Solve", "Translate", "Summarize the following text:", "Rewrite", "Describe", "Compare", "If a"),
    *("Write a short story about", "Create a list of", "Given the following table,", "Define a class", "Give me"),
)
"""Beginnings of every second prompt, since the target writes similar prompts without one."""


def rows_at_once(target: PreTrainedModel) -> int:
    """
    Return how many texts to write at a time; a tenth fewer where memory runs out, and so on.

    More are no faster on a CPU, while a GPU waits for its launches.
    """
    return 32 if target.device.type == "cpu" else 512


@torch.no_grad()
def write_answers(target: PreTrainedModel, prompts: Sequence[torch.Tensor], max_new_tokens: int) -> list[torch.Tensor]:
    """
    Let the target answer prompts greedily, in batches of similar length.

    Args:
        target (`PreTrainedModel`): The target.
        prompts (`Sequence[torch.LongTensor]`): Each of shape `(prompt,)`, on the CPU.
        max_new_tokens (`int`): Tokens of an answer at most.

    Returns:
        `list[torch.LongTensor]`: Each of shape `(answer,)`, on the CPU, the end of text included.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    written = _in_batches(target, [prompts[index] for index in order], max_new_tokens)
    answers = dict(zip(order, written, strict=True))
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def write_prompts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int = 0,
    tell: Callable[[int], object] = lambda done: None,
) -> list[Text]:
    """
    Let the target write user prompts: sampled behind the beginning of the chat template's user turn.

    Magpie (https://arxiv.org/abs/2406.08464). They are of the kind that the target was tuned on, and need no data.
    Every second one begins with an ordinary opening in English, so that there are questions, code and arithmetic among
    them.

    Args:
        target (`PreTrainedModel`): The target.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        count (`int`): How many to write; a few of them may turn out empty, too long or the same, and are left out.
        seed (`int`, defaults to 0): Of the sampling. The global random state is left as it was.
        tell (`Callable[[int], object]`, *optional*): Called with the number written so far.

    Raises:
        UnsupportedModelError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UnsupportedModelError("the target writes no prompts, since its tokenizer has no chat template")
    head, some = template_head(tokenizer), _openings(tokenizer)
    openings = [some[number % len(some)] for number in range(count)]
    heads = [torch.cat((head, opening)) for opening in openings]
    sampling = {"do_sample": True, "top_k": _TOP_K, "top_p": _TOP_P}
    with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):
        written = _in_batches(target, heads, _PROMPT_TOKENS, seed, tell, **sampling)
    return [Text(prompt) for prompt in dict.fromkeys(_texts(tokenizer, openings, written)) if prompt]


def _openings(tokenizer: Any) -> list[torch.Tensor]:
    """Return the beginnings of prompts behind the template, `(opening,)`: every second one is empty."""
    found: list[torch.Tensor] = []
    for opening in _OPENINGS:
        ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
        found += [torch.empty(0, dtype=torch.long), torch.tensor(ids, dtype=torch.long)]
    return found


def _texts(tokenizer: Any, openings: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> list[str]:
    """Return the prompts that ended by themselves, with their openings."""
    whole = [torch.cat(pair) for pair in zip(openings, written, strict=True) if len(pair[1]) < _PROMPT_TOKENS]
    return [text.strip() for text in tokenizer.batch_decode(whole, skip_special_tokens=True)]


def _in_batches(
    target: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    max_new_tokens: int,
    seed: int | None = None,
    tell: Callable[[int], object] = lambda done: None,
    **options: Any,
) -> list[torch.Tensor]:
    """Continue prompts, as many at a time as fit into memory: if they do not, anew with fewer, by the same seed."""

    @find_executable_batch_size(starting_batch_size=min(rows_at_once(target), len(prompts) or 1))  # type: ignore[untyped-decorator]
    def write(rows: int) -> list[torch.Tensor]:
        """Continue all prompts, so many at once."""
        if seed is not None:
            torch.manual_seed(seed)
        found: list[torch.Tensor] = []
        for start in range(0, len(prompts), rows):
            found += _continue(target, prompts[start : start + rows], max_new_tokens, **options)
            tell(len(found))
        return found

    written: list[torch.Tensor] = write()
    return written


def _continue(target: Any, prompts: Sequence[torch.Tensor], max_new_tokens: int, **options: Any) -> list[torch.Tensor]:
    ends = end_tokens(target)
    pad = ends[0] if ends else 0
    inputs = join([as_inputs(prompt) for prompt in prompts], pad)
    text = target.generate(
        **{name: tensor.to(target.device) for name, tensor in inputs.items()},
        **{**greedy_options(pad, max_new_tokens), **options},
    )
    return [until_end(row, ends) for row in text[:, inputs["input_ids"].shape[1] :].cpu()]
