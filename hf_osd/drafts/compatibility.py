"""Checks that a draft fits a target, before any work: a misfit wastes time, though it cannot change the output."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat import carries_state, hides_state, is_offloaded
from ..config import OnlineConfig, shown
from ..errors import ConfigError, UnsupportedModelError
from .features import FeatureDraft
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


def check_pair(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """
    Refuse a draft that cannot work for a target.

    Args:
        target (`PreTrainedModel`): The target.
        draft (`PreTrainedModel`): The draft.

    Raises:
        UnsupportedModelError: The draft has an encoder, and the target none for the same kind of input; or the draft
            keeps a state where it cannot be copied, or has another vocabulary.
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
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (target, draft)]
    if abs(sizes[0] - sizes[1]) > MAX_PADDING:
        raise UnsupportedModelError(
            f"the target's vocabulary has {sizes[0]} tokens and the draft's {sizes[1]}: their tokenizers differ, "
            "which is not supported yet; pick a draft of the same model family",
            "draft: another tokenizer",
        )


def check_tokenizers(target: PreTrainedTokenizerBase | None, draft: PreTrainedTokenizerBase | None) -> None:
    """
    Refuse a draft whose tokenizer gives other ids to the same text.

    Args:
        target, draft (`PreTrainedTokenizerBase`, *optional*): The tokenizers; nothing is checked if one is unknown.

    Raises:
        UnsupportedModelError: Names a token that the two number differently.
    """
    if target is None or draft is None:
        return
    ours, theirs = target.get_vocab(), draft.get_vocab()
    different = next((token for token, index in theirs.items() if ours.get(token, index) != index), None)
    shared = sum(token in ours for token in theirs)
    if different is not None or shared < len(theirs) - MAX_PADDING:
        detail = (
            f"token {different!r} is {ours[different]} and {theirs[different]}"
            if different
            else "few tokens in common"
        )
        raise UnsupportedModelError(
            f"target and draft use different tokenizers ({detail}), which is not supported yet; pick a draft of the "
            "same model family",
            "draft: another tokenizer",
        )


def check_settings(config: OnlineConfig, draft: Any) -> None:
    """Raise `ConfigError` for a setting that does not go with a draft with an encoder, or that reads states."""
    if config.lmbda > 0.0 and draft.config.is_encoder_decoder:
        raise ConfigError(
            f"lmbda={config.lmbda!r} does not go with a draft that has an encoder: it learns from recorded texts "
            "alone; leave it out"
        )
    if not isinstance(draft, FeatureDraft):
        return
    for name, given in (("full_teacher", config.full_teacher), ("lmbda", config.lmbda > 0.0)):
        if given:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} does not go with a draft that reads the target's states: it scores "
                "a part of the vocabulary, and learns from recorded texts alone; leave it out"
            )
