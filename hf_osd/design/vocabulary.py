"""The tokens that a designed draft always proposes from: those that the recorded texts use most."""

from collections.abc import Iterable, Sequence

import torch

from ..records import Observation

GENERAL = 4096
"""How many they are. Together with those of the prompt and of earlier outputs they cover .9 to .99 of the output."""


def most_used(
    texts: Sequence[Observation], vocab_size: int, always: Iterable[int] = (), size: int = GENERAL
) -> torch.Tensor:
    """
    Return the tokens that are most frequent in texts and in the target's distributions over them.

    Args:
        texts (`Sequence[Observation]`): Recorded texts.
        vocab_size (`int`): Tokens of the target.
        always (`Iterable[int]`): Tokens that are among them in any case, such as those that end an answer.
        size (`int`, defaults to 4096): How many to return; all, where there are fewer.

    Returns:
        `torch.LongTensor` of shape `(size,)`: In ascending order.
    """
    # Ties of unused tokens go to the first, which are the most frequent ones in a vocabulary made by merging.
    counts = torch.linspace(0.5, 0.0, vocab_size)
    for text in texts:
        said = torch.cat((text.output_ids, text.teacher_ids[:, 0]))
        counts += torch.bincount(said, minlength=vocab_size)[:vocab_size]
    counts[torch.tensor(sorted(token for token in set(always) if token < vocab_size), dtype=torch.long)] = torch.inf
    return counts.topk(min(size, vocab_size)).indices.sort().values
