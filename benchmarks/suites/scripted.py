"""
A draft that is right at a chosen rate whatever its weights are: what an engine costs, apart from what a draft knows.

The draft's own forward runs and is paid for. Behind it, a hook replaces the choice at each position: the token that
the target is known to say, or, by a coin thrown once for each position of each request, another one.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_osd._caches import cache_of
from hf_osd.evaluation.encoding import Inputs

_CERTAIN = 1e4  # a logit that no other one reaches in any dtype


class Script:
    """
    Puts words into a draft's mouth, as long as it is attached.

    Args:
        draft (`PreTrainedModel`): The draft; its weights are not touched.
        rate (`float`): How likely each proposed token is the target's own, in [0, 1], at each position independently.
        seed (`int`, defaults to 0): Seed of the coin.
    """

    def __init__(self, draft: PreTrainedModel, rate: float, seed: int = 0) -> None:
        self._rate = rate
        self._generator = torch.Generator().manual_seed(seed)
        self._lines: dict[int, torch.Tensor] = {}  # by batch, (batch, context): the draft's choice at each position
        self._context = int(draft.config.get_text_config(decoder=True).max_position_embeddings)
        self._cached = 0  # tokens in the cache before the current forward
        draft.register_forward_pre_hook(self._note_cache, with_kwargs=True)
        draft.register_forward_hook(self._speak, with_kwargs=True)

    @torch.no_grad()
    def learn_answer(self, target: Any, request: Inputs, options: dict[str, Any]) -> None:
        """Decode a request plainly, and throw the coin for each of its positions."""
        output = target.generate(**{**options, **request})
        self.load(output, request["attention_mask"], target.config.get_text_config(decoder=True).vocab_size)

    def load(self, ids: torch.Tensor, attention_mask: torch.Tensor, vocab_size: int) -> None:
        """
        Take the text that is to come.

        Args:
            ids (`torch.LongTensor` of shape `(batch, length)`): Left-padded prompts, each with its answer, on the
                draft's device.
            attention_mask (`torch.LongTensor` of shape `(batch, prompt)`): Of the prompts.
            vocab_size (`int`): How many tokens there are to be wrong with.
        """
        padding = (attention_mask == 0).sum(dim=1, keepdim=True)  # (batch, 1)
        columns = torch.arange(ids.shape[1], device=ids.device) + padding  # a row's first token comes first
        text = ids.gather(1, columns.clamp(max=ids.shape[1] - 1))
        right = torch.rand(text.shape, generator=self._generator).to(text.device) < self._rate
        if len(text) not in self._lines:  # one place for good: a captured graph of the draft reads it there
            self._lines[len(text)] = text.new_zeros(len(text), self._context)
        self._lines[len(text)][:, : text.shape[1]] = torch.where(right, text, (text + 1) % vocab_size)

    def _note_cache(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_ids") is None:  # else they tell, without waiting for the device
            cache = cache_of(kwargs)
            self._cached = 0 if cache is None else int(cache.get_seq_length())

    def _speak(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Make the scripted token the certain one behind every position, however many are fed at once."""
        logits = output.logits  # (batch, kept, vocab)
        batch, kept = logits.shape[:2]
        lines = self._lines.get(batch)
        if lines is None:
            return
        positions = kwargs.get("position_ids")
        if positions is None:
            ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
            positions = self._cached + torch.arange(ids.shape[1], device=logits.device)[None]
        following = positions[:, -kept:].expand(batch, kept) + 1
        tokens = lines.gather(1, following.clamp(max=lines.shape[1] - 1))
        logits.scatter_(2, tokens[:, :, None], _CERTAIN)
