"""Plain data between the draft and the speculator: a drafted token in every row, and counts of what became of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Step:
    """
    One step of the draft: a token in every row.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch,)`): What was drafted.
        probabilities (`torch.FloatTensor` of shape `(batch, vocab)`, *optional*): What it was sampled from.
        others (`torch.LongTensor` of shape `(batch, others)`): The likeliest tokens besides.
        chances (`torch.FloatTensor` of shape `(batch, 1 + others)`, *optional*): The draft's own probabilities of the
            drafted token and of the others; `None` where they are not read.
        ended (`torch.BoolTensor` of shape `(batch,)`, *optional*): Whether the token ends its row; `None` where
            nothing does, or it is not read.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor | None
    others: torch.Tensor
    chances: torch.Tensor | None = None
    ended: torch.Tensor | None = None


GoesOn = Callable[[Step], bool]
"""Decides, given the newest step, whether to draft another."""


@dataclass(slots=True)
class Counts:
    """
    What became of the proposed tokens of one row.

    Attributes:
        proposed (`int`): Tokens the draft chose.
        judged (`int`): Those that the target judged: up to and including the first wrong one of each round. Later ones
            follow a wrong token and say nothing about the draft.
        accepted (`int`): Those that were right.
        guessed (`int`): Places that the row came to where tokens of the lookup were submitted, one or several.
        guessed_right (`int`): Those of them where one was right.
        others_right (`int`): Accepted tokens that were the draft's next best at their place.
    """

    proposed: int = 0
    judged: int = 0
    accepted: int = 0
    guessed: int = 0
    guessed_right: int = 0
    others_right: int = 0
