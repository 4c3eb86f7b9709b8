"""Checks that a draft fits a target, before any work: a misfit wastes time, though it cannot change the output."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._caches import carries_state, hides_state
from .._compat import is_offloaded
from ..config import OnlineConfig, shown
from ..errors import ConfigError, UnsupportedModelError
from .features import FeatureDraft
from .translation import Translation
from .wrapping import held_model_hint

# Vocabularies are padded to round sizes for speed, differently in each size of a family (Qwen2.5: 152,064 in 7B,
# 151,936 in 0.5B). Beyond that, two sizes mean two tokenizers.
MAX_PADDING = 1024

AUTO = "auto"
"""In place of a draft: make one of the target."""


def check_target(target: Any) -> None:
    """Raise `UnsupportedModelError` for what does not generate, such as a model inside of another framework's."""
    if not hasattr(target, "config") or not hasattr(target, "generate"):
        raise UnsupportedModelError(
            f"the target must be a transformers model that generates, got {type(target).__name__}"
            f"{held_model_hint(target)}"
        )


def made_draft(name: str, target: PreTrainedModel) -> FeatureDraft:
    """
    Make the draft that `"auto"` stands for: a cold one of the target's last layer.

    Raises:
        UnsupportedModelError: None can be made of this target, or something else was asked for by name.
    """
    if name != AUTO:
        raise UnsupportedModelError(
            f"the draft must be a model or {AUTO!r}, got {shown(name)}: load it with OnlineAssistant.from_pretrained"
        )
    has_state = carries_state(target) or hides_state(target)
    if target.config.is_encoder_decoder or has_state or is_offloaded(target):
        raise UnsupportedModelError(
            f"no draft can be made of the layers of {type(target).__name__}, which has an encoder, keeps a recurrent "
            "state or is offloaded: pass a draft",
            "draft: cannot be made",
        )
    return FeatureDraft.of(target)


def check_draft(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """
    Refuse what cannot serve as a draft of any target.

    Args:
        target (`PreTrainedModel`): The target.
        draft (`PreTrainedModel`): The draft.

    Raises:
        UnsupportedModelError: The draft is not a language model, has no weights, or is the target itself.
    """
    if not isinstance(draft, PreTrainedModel) or not draft.can_generate():
        raise UnsupportedModelError(f"the draft must be a model that generates, got {type(draft).__name__}")
    if draft is target:
        raise UnsupportedModelError("the draft is the target itself: pass a smaller model, or a copy")
    if any(parameter.is_meta for parameter in draft.parameters()) and not is_offloaded(draft):
        raise UnsupportedModelError(
            "the draft is on the meta device, where it has no weights: load it with from_pretrained, or move it with "
            "to_empty() and load a state dict"
        )


def check_pair(target: PreTrainedModel, draft: PreTrainedModel, translation: Translation | None = None) -> None:
    """
    Refuse a draft that cannot work for a target.

    Args:
        target (`PreTrainedModel`): The target.
        draft (`PreTrainedModel`): The draft.
        translation (`Translation`, *optional*): How the draft reads the target's tokens; defaults to as they are.

    Raises:
        UnsupportedModelError: The draft has an encoder, and the target none for the same kind of input; or the draft
            keeps a state where it cannot be copied, or has another vocabulary without a translation.
    """
    is_alike = target.config.is_encoder_decoder and target.main_input_name == draft.main_input_name
    if draft.config.is_encoder_decoder and not is_alike:
        raise UnsupportedModelError(
            f"the draft {type(draft).__name__} is an encoder-decoder model, whose encoder reads "
            f"{draft.main_input_name}, and the target {type(target).__name__} has none for that: use a draft without",
            "draft: encoder-decoder",
        )
    if hides_state(draft):
        raise UnsupportedModelError(
            f"the draft {type(draft).__name__} keeps a recurrent state of its own, which cannot roll back",
            "draft: state that cannot roll back",
        )
    size, own = vocabulary_sizes(target, draft)
    fits = have_one_size(target, draft) if translation is None else size == translation.sizes[0]
    if not fits:
        raise UnsupportedModelError(
            f"the target's vocabulary has {size} tokens and the draft's {own}: their tokenizers differ, and it is not "
            "known how; pass both to OnlineAssistant, as tokenizer= and target_tokenizer=",
            "draft: another tokenizer",
        )


def vocabulary_sizes(target: PreTrainedModel, draft: PreTrainedModel) -> tuple[int, int]:
    """Return how many tokens the two know."""
    size, own = (model.config.get_text_config(decoder=True).vocab_size for model in (target, draft))
    return size, own


def proposable(target: PreTrainedModel, translation: Translation | None) -> int | torch.Tensor:
    """Return which of its tokens a draft may propose: the first ones, or these."""
    size: int = target.config.get_text_config(decoder=True).vocab_size
    return size if translation is None else translation.drafts


def have_one_size(target: PreTrainedModel, draft: PreTrainedModel) -> bool:
    """Return whether both know the same number of tokens, up to padding."""
    size, own = vocabulary_sizes(target, draft)
    return abs(size - own) <= MAX_PADDING


def translation_for(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    target_tokenizer: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Translation | None:
    """
    Return how a draft reads its target's tokens.

    Args:
        target, draft (`PreTrainedModel`): The models.
        target_tokenizer, tokenizer (`PreTrainedTokenizerBase`, *optional*): Their tokenizers.

    Returns:
        `Translation`, *optional*: `None` where both number their tokens alike, or a tokenizer is not known.

    Raises:
        UnsupportedModelError: The tokenizers have nothing in common, or differ for a draft that uses the target's own
            embedding, or for models with an encoder.
    """
    if target_tokenizer is None or tokenizer is None:
        return None
    if have_one_size(target, draft) and _number_alike(target_tokenizer, tokenizer):
        return None
    if isinstance(draft, FeatureDraft):
        raise UnsupportedModelError(
            "the draft was made for a target with another tokenizer: make one for this target",
            "draft: another tokenizer",
        )
    if target.config.is_encoder_decoder or draft.config.is_encoder_decoder:
        raise UnsupportedModelError(
            "target and draft have different tokenizers, which goes with decoder-only models alone: pick a draft of "
            "the target's family",
            "draft: another tokenizer",
        )
    return Translation.between(target_tokenizer, tokenizer, vocabulary_sizes(target, draft))


def _number_alike(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> bool:
    """Return whether a draft's tokens are the target's, up to some that only one of them has."""
    ours, theirs = target.get_vocab(), draft.get_vocab()
    same = [index == ours[token] for token, index in theirs.items() if token in ours]
    return all(same) and len(same) >= max(len(theirs) - MAX_PADDING, len(theirs) // 2 + 1)


def check_settings(config: OnlineConfig, draft: Any, translated: bool = False) -> None:
    """
    Raise `ConfigError` for a setting that does not go with a draft.

    Args:
        config (`OnlineConfig`): Settings.
        draft (`PreTrainedModel`): The draft.
        translated (`bool`, defaults to `False`): Whether its tokenizer is not the target's.
    """
    if config.lmbda > 0.0 and draft.config.is_encoder_decoder:
        raise ConfigError(
            f"lmbda={config.lmbda!r} does not go with a draft that has an encoder: it learns from recorded texts "
            "alone; leave it out"
        )
    if isinstance(draft, FeatureDraft):
        why = "a draft that reads the target's states: it scores a part of the vocabulary"
    elif translated:
        why = "a draft with another tokenizer: the target cannot read its tokens"
    else:
        return
    for name, given in (("full_teacher", config.full_teacher), ("lmbda", config.lmbda > 0.0)):
        if given:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} does not go with {why}, and learns from recorded texts alone; "
                "leave it out"
            )
