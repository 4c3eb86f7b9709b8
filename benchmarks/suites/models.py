"""The models of a run: the embedded pair or a given one, a pair trained here, or random weights behind a script."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_osd.bench.command import BenchCommand
from hf_osd.bench.session import Steps
from hf_osd.config import check_fields, choice, integer, number, optional
from hf_osd.errors import ConfigError
from hf_osd.evaluation.models import EMBEDDED_PAIR, Pair, describe, load_pair, resolve_device, resolve_dtype
from hf_osd.evaluation.options import NAME, NAMES, SECONDS, SEEDS

from .architecture import llama_config, random_model, read_shape
from .scripted import Script
from .training import load_rows, pack, recipes, train

Kind = Literal["given", "trained", "scripted"]

_SHAPES = {"trained": ("2048x16", "1024x3"), "scripted": ("4096x32", "2048x4")}
_SCRIPTED_VOCABULARY = 128_256  # Llama 3's
_RULES = {
    "models": choice(*get_args(Kind)),
    "target_shape": NAME,
    "draft_shape": NAME,
    "vocabulary": optional(integer(8, 2**24)),
    "acceptance": number(0, 1),
    "train_prompts": NAMES,
    "draft_train_prompts": NAMES,
    "train_seconds": SECONDS,
}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BenchCommand):
    """
    Which models to measure; the help of `python -m benchmarks.suites` explains each option.

    Trained and scripted pairs are bf16 on a GPU and float32 on a CPU where `dtype` is `"auto"`. `seed` is that of
    weights, of the order of training and of the script too.

    Raises:
        ConfigError: A value is out of its range or contradicts another one.
    """

    models: Kind = "given"
    target_shape: str | None = None
    draft_shape: str | None = None
    vocabulary: int | None = None
    acceptance: float = 0.8
    train_prompts: Sequence[str] = ()
    draft_train_prompts: Sequence[str] = ()
    train_seconds: float = 180.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _RULES)
        if self.models == "given":
            self._refuse("given", "target_shape", "draft_shape", "vocabulary", "train_prompts", "draft_train_prompts")
        else:
            self._refuse(self.models, "target", "assistant")
            for shape in self.shapes:
                read_shape(shape)

    def _refuse(self, kind: str, *names: str) -> None:
        for name in names:
            if getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r} means nothing with models={kind!r}: leave it out")

    @property
    def is_embedded(self) -> bool:
        """Whether it is the pair that comes with the package."""
        return self.models == "given" and self.target is None and self.assistant is None

    @property
    def shapes(self) -> tuple[str, str]:
        """Shapes of target and draft, for the pairs that are made here."""
        target, draft = _SHAPES[self.models]
        return self.target_shape or target, self.draft_shape or draft


@dataclass(frozen=True, slots=True)
class Models:
    """The pair, its script where it has one, and what is to be said of it in a report."""

    pair: Pair
    script: Script | None
    about: dict[str, Any]


def open_models(options: ModelOptions, steps: Steps) -> Models:
    """
    Load, train or make the models.

    Args:
        options (`ModelOptions`): Which.
        steps (`Steps`): Shows the progress of training.

    Raises:
        UnsupportedModelError: A model cannot be loaded.
        ConfigError: Nothing can be computed on the device or in the dtype, or a model does not fit into its memory.
        PromptSourceError: A file to train on cannot be read.
    """
    if options.models == "given":
        pair = load_pair(options.target, options.assistant, options.device, options.dtype)
        kind = "embedded" if options.is_embedded else "given"
        return Models(pair, None, {"kind": kind, **describe(pair)})
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(EMBEDDED_PAIR / "target")
    device = resolve_device(options.device)
    dtype = _dtype(options, device)
    if options.models == "trained":
        return _train_pair(options, tokenizer, device, dtype, steps)
    vocabulary = options.vocabulary or _SCRIPTED_VOCABULARY
    if vocabulary < len(tokenizer):
        raise ConfigError(f"vocabulary must be at least {len(tokenizer)}, the prompts' tokens, got {vocabulary}")
    pair = Pair(*_random_pair(options, device, dtype, vocab_size=vocabulary), tokenizer)
    about = {"kind": "scripted", "acceptance": options.acceptance, **describe(pair)}
    return Models(pair, Script(pair.draft, options.acceptance, options.seed), about)


def _train_pair(
    options: ModelOptions,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    steps: Steps,
) -> Models:
    sources = {"target": options.train_prompts, "draft": options.draft_train_prompts or options.train_prompts}
    blocks = {name: pack(load_rows(paths), tokenizer) for name, paths in sources.items()}
    config = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    target, draft = _random_pair(options, device, torch.float32, **config)
    plans = recipes(target, draft, options.train_seconds, options.seed)
    learned = {
        name: train(model, blocks[name], recipe, steps, name)
        for name, model, recipe in zip(("target", "draft"), (target, draft), plans, strict=True)
    }
    pair = Pair(target.to(dtype), draft.to(dtype), tokenizer)  # type: ignore[arg-type]
    return Models(pair, None, {"kind": "trained", "training": learned, **describe(pair)})


def _random_pair(
    options: ModelOptions, device: torch.device, dtype: torch.dtype, **config: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    target, draft = (
        random_model(llama_config(shape, **config), device, dtype, (options.seed + index) % SEEDS)
        for index, shape in enumerate(options.shapes)
    )
    return target, draft


def _dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """Return the dtype of a pair that is made here, and so has no checkpoint to say it."""
    named = resolve_dtype(options.dtype, device)
    return named or (torch.float32 if device.type == "cpu" else torch.bfloat16)
