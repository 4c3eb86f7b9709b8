"""What one row of the table tries: a target with drafts for it, a draft for a Llama, or both."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from .building import llama, prompts, small_draft, with_noise

Inputs = Callable[[int, int], dict[str, Any]]


@dataclass(kw_only=True)
class Case:
    """
    One row, built.

    Attributes:
        target (`PreTrainedModel`, *optional*): What is tried as a target.
        drafts (`Mapping[str, PreTrainedModel | str]`): Drafts for it by how good they are, the last one learns; a
            `str` is a folder to load one from.
        draft (`PreTrainedModel` or `str`, *optional*): What is tried as a draft.
        host (`PreTrainedModel`, *optional*): The target that it is tried for.
        host_inputs (`Callable[[int, int], dict]`): Likewise, inputs of that target.
        inputs (`Callable[[int, int], dict]`): Inputs of the target for a batch size and a seed. Made anew for each
            call, since a cache among them is filled by it.
        settings (`Mapping[str, Any]`): Further arguments of `generate`.
        around (`Callable[[], AbstractContextManager]`): What calls of `generate` are wrapped in.
        precision (`torch.dtype`): The type that the target computes in; bounds what may be called rounding.
        tries (`int`): Prompts of each check, one batch at least; more where errors are rare.
        samples, learns (`bool`): Whether sampling and learning are tried.
        truths (`dict`): What plain `generate` gave so far; the checks fill it.
    """

    target: PreTrainedModel | None = None
    drafts: Mapping[str, PreTrainedModel | str] = field(default_factory=dict)
    draft: PreTrainedModel | str | None = None
    host: PreTrainedModel | None = None
    host_inputs: Inputs = prompts
    inputs: Inputs = prompts
    settings: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    precision: torch.dtype = torch.float32
    tries: int = 2
    samples: bool = True
    learns: bool = True
    truths: dict[Any, Any] = field(default_factory=dict)


def family(make: Callable[[int], PreTrainedModel], as_draft: bool = True, **options: Any) -> Case:
    """
    Return the row of a model family: as a target, with a wrong draft and a near one, and as a draft of a Llama.

    Args:
        make (`Callable[[int], PreTrainedModel]`): Builds a model of the family from a seed.
        as_draft (`bool`, defaults to `True`): Whether it is tried as a draft.
        options: Further attributes of the [`Case`].
    """
    target = make(0)
    vocab = target.config.get_text_config(decoder=True).vocab_size
    return Case(
        target=target,
        drafts={"wrong": small_draft(vocab), "near": with_noise(make(0))},
        draft=make(9) if as_draft else None,
        host=llama(5, vocab_size=vocab) if as_draft else None,
        **options,
    )


def as_target(target: PreTrainedModel, near: PreTrainedModel | None = None, **options: Any) -> Case:
    """Return the row of a Llama in some wrapping as a target; `near` is the same without it, `llama()` by default."""
    return Case(target=target, drafts={"wrong": small_draft(), "near": with_noise(near or llama())}, **options)


def as_draft(draft: PreTrainedModel | str, **options: Any) -> Case:
    """Return the row of something that is tried as a draft of a Llama only."""
    return Case(draft=draft, host=llama(), **options)
