"""What a router may look at: the tokens of a prompt, and their mean embedding in the target."""

import weakref
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import PreTrainedModel

_centres: "weakref.WeakKeyDictionary[PreTrainedModel, torch.Tensor]" = weakref.WeakKeyDictionary()


class Prompt:
    """
    A prompt without padding, as a router sees it.

    Args:
        ids (`torch.LongTensor` of shape `(prompt,)`): Its tokens.
        target (`PreTrainedModel`): The model that they are for.

    Attributes:
        ids (`torch.LongTensor` of shape `(prompt,)`): On the CPU.
    """

    def __init__(self, ids: torch.Tensor, target: PreTrainedModel) -> None:
        self.ids = ids.cpu()
        self._target = target

    @cached_property
    @torch.no_grad()
    def embedding(self) -> torch.Tensor:
        """
        The mean of the target's input embeddings of its different tokens: `(hidden,)`, float32, on the CPU.

        A token counts once, and by its direction from the centre of the vocabulary: how long embeddings are, and how
        often common tokens come, says little about a topic.
        """
        layer: Any = self._target.get_input_embeddings()
        tokens = torch.tensor(sorted(set(self.ids.tolist())))
        if layer.weight.is_meta:  # offloaded: only the layer itself can fetch it
            return normalize(layer(tokens).float(), dim=-1).mean(0).cpu()
        rows = layer.weight[tokens.to(layer.weight.device)].float()
        return normalize(rows - _centre(self._target), dim=-1).mean(0).cpu()


def _centre(target: PreTrainedModel) -> torch.Tensor:
    """Return the mean embedding of the target's vocabulary, `(hidden,)`, computed once."""
    if target not in _centres:
        layer: Any = target.get_input_embeddings()
        _centres[target] = layer.weight.detach().mean(0, dtype=torch.float32)
    return _centres[target]
