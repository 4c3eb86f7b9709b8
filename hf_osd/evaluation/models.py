"""The models of a run: a target, its draft and their tokenizers, loaded and tried before anything is measured."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .._compat import decoder_prefix
from ..config import reason_of, shown
from ..drafts.compatibility import AUTO, check_pair, made_draft, translation_for, vocabulary_sizes
from ..drafts.features import FeatureDraft
from ..errors import ConfigError, UnsupportedModelError
from ..precision import choose_dtype
from ..saving import auto_class
from ..tokenizing import load_tokenizer

STOCK_LOOKUP = 10  # tokens that transformers' prompt lookup proposes: what its documentation uses
EMBEDDED_PAIR = Path(__file__).parents[1] / "demo" / "pair"


@dataclass(frozen=True, slots=True)
class Pair:
    """
    A target and the draft that starts the run.

    Attributes:
        target (`PreTrainedModel`): Writes text, and may read it by an encoder.
        draft (`PreTrainedModel`): Drafts for it.
        tokenizer (`PreTrainedTokenizerBase`): That of the target.
        draft_tokenizer (`PreTrainedTokenizerBase`, *optional*): That of the draft, where it is another one.
    """

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    draft_tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def has_encoder(self) -> bool:
        """Whether the target reads a prompt by an encoder, and writes behind a start token."""
        return bool(self.target.config.is_encoder_decoder)


MakeDraft = Callable[[PreTrainedModel], PreTrainedModel]
"""Makes a draft of its target."""


def load_pair(
    target: str | None, assistant: str | MakeDraft | None, device: str = "auto", dtype: str = "auto"
) -> Pair:
    """
    Load a target and its draft, and let transformers decode a few tokens with them.

    Args:
        target (`str`, *optional*):
            Hub id, folder or GGUF file; with `assistant` left out too, the embedded pair is loaded.
        assistant (`str` or `MakeDraft`, *optional*):
            Hub id or folder of the draft, or what makes it of the target; defaults to [`cold_draft`].
        device (`str`, defaults to `"auto"`): A torch device; `"auto"` takes an accelerator where there is one.
        dtype (`str`, defaults to `"auto"`):
            A torch dtype by name. `"auto"` is each checkpoint's own, or float32 on a CPU that is slower in half
            precision ([`~hf_osd.precision.choose_dtype`]). The embedded pair is float32 on every CPU.

    Raises:
        ConfigError: There is an assistant without a target, or nothing can be computed on the device or in the dtype.
        UnsupportedModelError: A model cannot be loaded, the two do not fit, or transformers itself cannot decode with
            them.
    """
    if target is None and assistant is not None:
        raise ConfigError("an assistant needs its target: give both, or neither for the embedded pair")
    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)

    def load(name: str) -> Any:
        return _load(name, lambda name: _load_model(name, where, kind))

    if target is not None and assistant is None:
        assistant = cold_draft
    name = target or str(EMBEDDED_PAIR / "target")
    loaded = load(name)
    draft = assistant(loaded) if callable(assistant) else load(assistant or str(EMBEDDED_PAIR / "draft"))
    if isinstance(draft, FeatureDraft):
        draft.borrow(loaded)
    source = None if target is None or callable(assistant) else assistant
    pair = _fitted(Pair(loaded, draft, _load(name, _load_tokenizer)), source)
    _try_target(name, pair.target)
    _try_decoding(pair)
    return pair


def cold_draft(target: PreTrainedModel) -> PreTrainedModel:
    """Make the draft of a target for which none is named; it has learned nothing yet."""
    return made_draft(AUTO, target)


def _fitted(pair: Pair, source: str | None) -> Pair:
    """Check that a draft fits its target, and name its tokenizer where that is another one."""
    own = load_tokenizer(source) if not isinstance(pair.draft, FeatureDraft) else None
    translation = translation_for(pair.target, pair.draft, pair.tokenizer, own)
    check_pair(pair.target, pair.draft, translation)
    return pair if translation is None else replace(pair, draft_tokenizer=own)


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; `"auto"` is the accelerator where there is one, else the CPU."""
    try:
        found = torch.accelerator.current_accelerator(check_available=True) if name == "auto" else torch.device(name)
        return _try_computing(found or torch.device("cpu"), torch.float32)
    except Exception as error:  # each backend that is not there fails in its own way
        raise ConfigError(
            f"device must be a torch device that computes here, such as 'cpu' or 'cuda:0', got {shown(name)}: "
            f"{reason_of(error)}"
        ) from error


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of that name, or `None` for `"auto"`, which depends on the checkpoint."""
    if name == "auto":
        return None
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"dtype must be 'auto' or a floating torch dtype such as 'bfloat16', got {shown(name)}")
    try:
        _try_computing(device, kind)
    except Exception as error:  # some dtypes are for storage, or for other devices
        raise ConfigError(f"dtype must be one that {device} computes in, got {name!r}: {reason_of(error)}") from error
    return kind


def _try_computing(device: torch.device, dtype: torch.dtype) -> torch.device:
    """Multiply two small matrices, read the result, and return where it was."""
    ones = torch.ones(2, 2, device=device, dtype=dtype)
    (ones @ ones).softmax(-1).sum().item()
    return ones.device


def _load(name: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(name)
    except Exception as error:  # whatever a folder holds: broken weights alone raise five types
        why = reason_of(error)
        raise UnsupportedModelError(f"cannot load {shown(name)}, as a folder or from the Hub: {why}") from error


def _load_model(name: str, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    name, options = _place(name)
    config = AutoConfig.from_pretrained(name, **options)
    factory = auto_class(config, reads_text=True)
    if factory is AutoModelForSpeechSeq2Seq:
        raise ValueError(f"{type(config).__name__} is of a model that hears; use one that reads text")
    packed = "gguf_file" in options  # its weights have a few bits each, and its config says nothing of a dtype
    kind = dtype or _own_dtype(name, config, device, torch.bfloat16 if packed else torch.float32)
    model, found = factory.from_pretrained(name, dtype=kind, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"weights of {type(model).__name__} are missing, such as {missing[0]}")
    _forget_quantisation(model)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    folder, options = _place(name)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer


def _place(name: str) -> tuple[str, dict[str, Any]]:
    """Return what transformers takes for a Hub id, a folder or a GGUF file."""
    options: dict[str, Any] = {"trust_remote_code": False}  # by default it would ask, in the middle of the run
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {**options, "gguf_file": path.name}
    return name, options


def _forget_quantisation(model: Any) -> None:
    """Weights of a GGUF file are plain ones once they are loaded, but transformers (5.24) takes them for quantised."""
    if str(getattr(getattr(model.config, "quantization_config", None), "quant_method", "")).endswith("gguf"):
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config


def _own_dtype(
    name: str, config: PreTrainedConfig, device: torch.device, unstated: torch.dtype = torch.float32
) -> torch.dtype:
    """Return what `"auto"` means for a checkpoint; one that does not say is float32, as torch would have it."""
    if device.type == "cpu" and EMBEDDED_PAIR in Path(name).parents:
        return torch.float32  # its figures are of float32, and a model that small is no faster in bfloat16
    stated: Any = config.dtype or config.get_text_config(decoder=True).dtype
    return choose_dtype(device, stated or unstated)


@torch.no_grad()
def _try_target(name: str, target: PreTrainedModel) -> None:
    """Refuse a model whose logits depend on later tokens: it is no causal model."""
    texts = torch.tensor([[[0, 1, 2]], [[0, 3, 4]]], device=target.device)  # two of shape (1, 3)
    written = decoder_prefix(target) + "input_ids"
    try:
        one, other = (target(**{"input_ids": texts[0], written: text}).logits[0, 0].float() for text in texts)
    except Exception as error:  # modelling code of whatever family
        raise UnsupportedModelError(f"{shown(name)} does not run: {reason_of(error)}") from error
    if one.isnan().any():
        raise UnsupportedModelError(f"{shown(name)} computes no numbers in {target.dtype}, but NaN")
    if not torch.allclose(one, other, atol=1e-3 * one.abs().max().item()):
        raise UnsupportedModelError(f"{shown(name)} is no causal language model: its logits depend on later tokens")


def _try_decoding(pair: Pair) -> None:
    """Let transformers decode, plainly and with the draft: a run compares with both."""
    # Text, since transformers encodes anew what a draft with another tokenizer is to read.
    ids = pair.tokenizer("one, two, three", return_tensors="pt")["input_ids"].to(pair.target.device)
    ids = ids.clamp(max=vocabulary_sizes(pair.target, pair.draft)[0] - 1)
    draft = copy.copy(pair.draft)  # transformers keeps the state of its schedule in the draft's generation config
    draft.generation_config = copy.deepcopy(pair.draft.generation_config)
    target: Any = pair.target
    for helper in ({}, stock_helper(replace(pair, draft=draft))):
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, **generate_options(pair, 2), **helper}
        try:
            target.generate(ids, **options)
        except Exception as error:
            how = "with that draft" if helper else "plainly"
            raise UnsupportedModelError(f"transformers cannot decode {how} here: {reason_of(error)}") from error


def stock_helper(pair: Pair) -> dict[str, Any]:
    """Return what lets transformers' own assisted generation run: the draft, or a lookup where it cannot take it."""
    sizes = vocabulary_sizes(pair.target, pair.draft)
    is_alike = pair.draft.config.is_encoder_decoder == pair.has_encoder and not isinstance(pair.draft, FeatureDraft)
    if sizes[0] == sizes[1] and pair.draft_tokenizer is None and is_alike:
        return {"assistant_model": pair.draft}
    if sizes[0] == sizes[1] or not is_alike:  # a feature draft would run without the states that it reads
        return {"prompt_lookup_num_tokens": STOCK_LOOKUP}
    # transformers takes two sizes for two tokenizers, and one size for one.
    own = pair.tokenizer if pair.draft_tokenizer is None else pair.draft_tokenizer
    return {"assistant_model": pair.draft, "tokenizer": pair.tokenizer, "assistant_tokenizer": own}


def generate_options(pair: Pair, max_new_tokens: int, *, sample: bool = False) -> dict[str, Any]:
    """Return what every contender's `generate` receives."""
    pad, eos = pair.tokenizer.pad_token_id, pair.tokenizer.eos_token_id
    if sample:
        return {"max_new_tokens": max_new_tokens, "do_sample": True, "pad_token_id": eos if pad is None else pad}
    return greedy_options(eos if pad is None else pad, max_new_tokens)


def greedy_options(pad_token_id: int | None, max_new_tokens: int) -> dict[str, Any]:
    """Return the options of greedy decoding; a checkpoint's own sampling settings would each raise a warning."""
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "pad_token_id": pad_token_id,
        **dict.fromkeys(("temperature", "top_p", "top_k")),
    }


def describe(pair: Pair) -> dict[str, Any]:
    """Return what is to be said of the models in a report, ready for JSON."""
    return {
        "parameters": {"target": pair.target.num_parameters(), "draft": pair.draft.num_parameters()},
        "device": str(pair.target.device),
        "dtype": str(pair.target.dtype).removeprefix("torch."),
    }
