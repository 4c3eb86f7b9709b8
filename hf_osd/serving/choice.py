"""Chooses the cache that a model decodes on for one request, before any work: by its kind and by trying it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .._caches import carries_state, hides_state, is_croppable
from .._compat import attention_implementation, execution_device
from ..drafts.features import FeatureDraft
from ..drafts.translation import Translation
from ..errors import UnsupportedModelError
from .croppable_decoder import CroppableDecoder
from .decoder import Decoder, RaggedDecoder, context_length
from .feature_decoder import FeatureDecoder
from .positions import position_tap, takes_positions
from .preparation import Preparation
from .probe import Finding, Trial, probe
from .recurrent_decoder import RecurrentDecoder
from .translating_decoder import TranslatingDecoder
from .weights import describe

RAGGED_ATTENTION = ("sdpa", "eager")  # attention implementations that take a 4D mask as it is
_UNLIMITED = 2**62
_WINDOWS_KEPT = 4  # times the narrowest window: up to this text, a single prompt keeps all of it, and takes trees
TOKENS_EACH = 2  # tokens of a draft that each new one of the target has room for, where their tokenizers differ

MakeDecoder = Callable[..., Decoder]
"""Makes a decoder. `states` takes the hidden states of a target; `source` and `vocabulary` are for a feature draft."""


def choose_decoder(
    model: PreTrainedModel,
    trial: Trial,
    width: int,
    *,
    length: int | None = None,
    role: str = "target",
    cache: Cache | None = None,
    is_prefix: bool = True,
    ragged: Callable[..., RaggedDecoder] = RaggedDecoder,
) -> MakeDecoder:
    """
    Choose the decoder for a model and a request.

    Args:
        model (`PreTrainedModel`): The model.
        trial (`Trial`): The request.
        width (`int`): Columns that may ever be fed.
        length (`int`, *optional*): Positions that the longest row may reach; defaults to its columns.
        role (`str`, defaults to `"target"`): What to call the model in errors.
        cache (`Cache`, *optional*): A filled cache to continue.
        is_prefix (`bool`, defaults to `True`): Whether the text of that cache is part of the prompt.
        ragged (`Callable`, defaults to `RaggedDecoder`): Makes the decoder on the ragged cache.

    Returns:
        `Callable[..., Decoder]`: Makes the decoder, see [`MakeDecoder`]; nothing has been fed or allocated yet.

    Raises:
        UnsupportedModelError: Neither cache gives the model's own logits at this batch size and length.
    """
    padding, preparation = trial.padding, trial.preparation
    name, length = f"the {role} {describe(model)}", width - min(padding) if length is None else length
    single = _decoder_of_one_row(model, trial, cache is not None)
    if single is None:
        raise UnsupportedModelError(
            f"{name} keeps a state that cannot roll back rejected tokens", f"{role}: state that cannot roll back"
        )
    why = "its cache" if cache is None else "a cache of the caller's own"
    finding = Finding(False, f"{why} does not hold rows of different lengths")
    if cache is None and _may_be_ragged(model, trial, width - min(padding), length):
        position_tap(model)  # before the trials, since a model whose hooks change is tried again
        for kind, options in _layouts(model, trial, length):
            finding = probe(model, kind, partial(ragged, model, **options), trial)
            if finding.suits:
                options = {"takes_trees": finding.takes_trees, **options}
                return partial(ragged, model, padding, width, preparation, **options)
    _check_dynamic(partial(single, model), trial, length, (name, role, finding.why))
    return partial(single, model, padding, width, preparation, cache, is_prefix)


def _may_be_ragged(model: PreTrainedModel, trial: Trial, columns: int, length: int) -> bool:
    """Say whether the ragged cache is worth a trial for a request."""
    fits = columns <= _local_window(model) and length <= _index_span(model)
    # A single prompt's windows are kept by transformers' own cache, which holds no more than them.
    fits &= len(trial.padding) > 1 or length <= _WINDOWS_KEPT * attention_span(model)
    return fits and _feeds_tokens(trial) and _takes_masks(model)


def _layouts(model: PreTrainedModel, trial: Trial, length: int) -> Iterator[tuple[str, dict[str, bool]]]:
    """What to try on the ragged cache: one mask for all layers, the model's own masks, rows that end in one column."""
    sees_all = length <= attention_span(model)
    counts_columns = len(trial.padding) > 1 and not takes_positions(model) and position_tap(model) is None
    # Where attention is sharp, positions decide little, and a trial would not show that a decoder counts columns.
    if not (counts_columns and model.config.is_encoder_decoder):
        if sees_all:
            yield "ragged", {}
        if trial.has_extras or not sees_all:
            yield "ragged, with the model's masks", {"own_masks": True}
    if sees_all and counts_columns:
        yield "ragged, aligned", {"is_aligned": True}


def _decoder_of_one_row(
    model: PreTrainedModel, trial: Trial, continues: bool
) -> Callable[..., CroppableDecoder] | None:
    """Return the decoder on transformers' own cache, fresh or the caller's; `None` where neither rolls back."""
    if hides_state(model):
        return None
    if not carries_state(model):
        return CroppableDecoder if is_croppable(model) else None
    if continues:
        return None
    is_one_draft = trial.is_draft and len(trial.padding) == 1  # targets have to be exact, batches are not served
    if is_one_draft and not _is_exact(model, trial):
        return partial(RecurrentDecoder, reads_singly=True)
    return RecurrentDecoder


def _is_exact(model: PreTrainedModel, trial: Trial) -> bool:
    """Whether a draft goes on from its state by several tokens at once, as a target has to."""
    return probe(model, "dynamic", partial(RecurrentDecoder, model), replace(trial, is_draft=False)).suits


def _check_dynamic(single: partial[CroppableDecoder], trial: Trial, length: int, named: tuple[str, str, str]) -> None:
    """
    Raise the reason if transformers' dynamic cache cannot serve a request.

    Args:
        single (`partial`): Makes the decoder from a model.
        trial (`Trial`), length (`int`): See [`choose_decoder`].
        named (`tuple[str, str, str]`): The model, its role, and why the ragged cache does not serve it.
    """
    (model,), (name, role, why) = single.args, named
    if len(trial.padding) > 1:
        raise UnsupportedModelError(
            f"{name} cannot decode up to {length} tokens in a batch of {len(trial.padding)}, since {why}: pass one "
            "prompt at a time",
            f"{role}: batches of this model or length",
        )
    if length > _index_span(model):
        raise UnsupportedModelError(
            f"{name} looks at {_index_span(model)} tokens of its choice, and text of up to {length} makes its logits "
            "depend on how many tokens are fed at once",
            f"{role}: sparse attention with an index",
        )
    if trial.padding[0] and (trial.returns_cache or not _feeds_tokens(trial)):
        raise UnsupportedModelError(
            f"{name} decodes a single prompt without its padding, which its soft prompt or the returned cache counts",
            f"{role}: padding of a single prompt",
        )
    finding = probe(model, "dynamic", single, trial)
    if not finding.suits:
        raise UnsupportedModelError(
            f"{name} cannot check several tokens at once: {finding.why}", f"{role}: checking several tokens at once"
        )


def _feeds_tokens(trial: Trial) -> bool:
    return trial.preparation is None or trial.preparation.feeds_tokens


def choose_draft_decoder(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    padding: Sequence[int],
    width: int,
    preparation: Preparation | None = None,
    generation_config: GenerationConfig | None = None,
    translation: Translation | None = None,
) -> MakeDecoder:
    """
    Choose the decoder of a draft; see [`choose_decoder`].

    Args:
        model (`PreTrainedModel`): The draft.
        prompts (`torch.LongTensor` of shape `(batch, prompt)`): On any device. May hold tokens that the draft lacks.
        padding (`Sequence[int]`): Padding columns of each row.
        width (`int`): Columns that may ever be fed.
        preparation (`Preparation`, *optional*): The inputs of its passes, where it reads an encoder's outputs.
        generation_config (`GenerationConfig`, *optional*): As `generate` prepared it for the target; then needed.
        translation (`Translation`, *optional*): How the draft reads the target's tokens, where its tokenizer differs.
    """
    if translation is not None:
        return _choose_translating(model, prompts, padding, width, translation)
    known = model.config.get_text_config(decoder=True).vocab_size
    prompts = prompts.to(execution_device(model)).clamp(max=known - 1)
    ragged: Callable[..., RaggedDecoder] = FeatureDecoder if isinstance(model, FeatureDraft) else RaggedDecoder
    trial = Trial(prompts, padding, preparation, generation_config, is_draft=True)
    made = choose_decoder(model, trial, width, role="draft", ragged=ragged)
    if isinstance(model, FeatureDraft) and getattr(made, "func", None) is not FeatureDecoder:
        raise UnsupportedModelError(
            f"the draft {describe(model)} reads its target's states, for which it needs the ragged cache; its layers "
            "do not go on it",
            "draft: its layers do not go on the ragged cache",
        )
    return made


def _choose_translating(
    model: PreTrainedModel, prompts: torch.Tensor, padding: Sequence[int], width: int, translation: Translation
) -> MakeDecoder:
    texts = [translation.text(row[pad:]) for row, pad in zip(prompts.tolist(), padding, strict=True)]
    new = TOKENS_EACH * (width - prompts.shape[1])
    columns = min(max(map(len, texts)) + new, context_length(model))
    beginnings = torch.tensor([text[: min(map(len, texts))] for text in texts])
    make = choose_draft_decoder(model, beginnings, [0] * len(texts), columns)
    return partial(TranslatingDecoder, model, translation, make, padding, columns)


def attention_span(model: PreTrainedModel) -> int:
    """
    Return the length of the text up to which every layer sees all of it.

    Up to the narrowest window, windowed layers equal full ones, so that one mask does for both.
    """
    config = model.config.get_text_config(decoder=True)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        window = None
    else:
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    chunk = getattr(config, "attention_chunk_size", None)
    spans: list[Any] = [window, chunk, _local_window(model), _index_span(model)]
    return min(span or _UNLIMITED for span in spans)


def _local_window(model: PreTrainedModel) -> int:
    """Return GPT-Neo's window, which its layers apply by column of the cache instead of by position."""
    local = getattr(model.config.get_text_config(decoder=True), "window_size", None)
    return local if isinstance(local, int) else _UNLIMITED


def _index_span(model: PreTrainedModel) -> int:
    """Return how many tokens sparse attention selects by an index (arXiv 2512.02556); it sees shorter texts whole."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "index_topk", None) or _UNLIMITED


def _takes_masks(model: PreTrainedModel) -> bool:
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    return attention_implementation(model) in RAGGED_ATTENTION and not set(kinds) - attention


def holds_ragged_cache(model: PreTrainedModel) -> bool:
    """Return whether a model decodes on the ragged cache, for one row and for several; tries each once."""
    prompts = torch.arange(1, 8, device=execution_device(model)).expand(2, -1)
    trials = (Trial(prompts[:rows], [0] * rows, Preparation({}, width=prompts.shape[1])) for rows in (1, 2))
    make = partial(RaggedDecoder, model)
    return _takes_masks(model) and all(probe(model, "ragged", make, trial).suits for trial in trials)
