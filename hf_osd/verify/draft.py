"""A draft for a target that has none: poor, but good enough to be refused."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..config import reason_of
from ..errors import UnsupportedModelError


@torch.no_grad()
def first_layer(target: PreTrainedModel) -> PreTrainedModel:
    """
    Copy a target's first layer, with its embedding and its head, into a model of their own.

    Untrained, it is hardly ever right: what it proposes is mostly refused, which is what a verification wants to see.

    Args:
        target (`PreTrainedModel`): A decoder-only model.

    Raises:
        UnsupportedModelError: Nothing can be cut from this model.
    """
    config = copy.deepcopy(target.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = 1
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[:1]
    try:
        draft: Any = AutoModelForCausalLM.from_config(config, dtype=target.dtype)
        missing = draft.load_state_dict(target.state_dict(), strict=False).missing_keys
    except Exception as error:  # of whatever family, and of whatever quantised its weights
        missing = [reason_of(error)]
    if missing:
        raise UnsupportedModelError(
            f"no draft can be made of the first layer of {type(target).__name__} ({missing[0]}): pass --assistant"
        )
    draft.generation_config = copy.deepcopy(target.generation_config)
    made: PreTrainedModel = draft.to(target.device).eval()
    return made
