"""Judges a draft on held-out texts: how often its tokens are those that the target wrote."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..drafts.features import FeatureDraft
from ..learning.features import FeatureCollator, reader_of
from ..records import Observation
from ..serving.weights import eval_mode

LONGEST_CHAIN = 5  # tokens drafted behind each position; later ones are rarely reached

_ANY_LENGTH = 2**24


@dataclass(frozen=True, slots=True)
class Quality:
    """
    What became of chains that a draft proposed behind every position of the target's answers.

    Attributes:
        agreement (`float`): Share of positions where its first token is the target's.
        accepted (`float`): Tokens of a chain of five that the target accepts, on average.
        chances (`tuple[float, ...]`): Share of first tokens that are accepted, of second ones where the first was, ...
    """

    agreement: float
    accepted: float
    chances: tuple[float, ...]


@torch.no_grad()
def judge(draft: FeatureDraft, answers: Iterable[Observation]) -> Quality:
    """
    Draft behind every position of recorded answers, as serving would: the second token on from the draft's own states.

    Args:
        draft (`FeatureDraft`): The draft, or its training copy.
        answers (`Iterable[Observation]`): What the target wrote greedily, each with its whole prompt as `prompt_ids`.
            The vocabulary is the draft's with the tokens of the prompt.

    Returns:
        [`Quality`]: Over all answers; zero where there are none.
    """
    with eval_mode(draft):
        hits = [_hits(draft, answer) for answer in answers]
    first = torch.cat([found[0] for found in hits]) if hits else torch.zeros(1)
    runs = torch.cat([_runs(found) for found in hits], dim=1) if hits else torch.zeros(LONGEST_CHAIN, 0)
    reached = runs.sum(1).tolist()
    before = [runs.shape[1], *reached[:-1]]
    chances = tuple(now / last if last else 0.0 for now, last in zip(reached, before, strict=True))
    return Quality(first.float().mean().item(), sum(reached) / max(runs.shape[1], 1), chances)


def _hits(draft: FeatureDraft, answer: Observation) -> torch.Tensor:
    """Return where the k-th drafted token of a chain equals the answer's: `(chain, answer)`."""
    reader, collate = reader_of(draft), FeatureCollator(_ANY_LENGTH, "all", draft)
    device = next(draft.parameters()).device
    inputs = {name: value.to(device) for name, value in collate([answer]).items()}
    inputs["vocabulary"] = draft.vocabulary.tokens(answer.prompt_ids.tolist()).to(device)
    # A draft that reads tokens alone needs no chain: behind right tokens it reads the text itself.
    own_steps = LONGEST_CHAIN - 1 if draft.state_layers else 0
    logits = draft(**reader.options(inputs), own_steps=own_steps).logits
    logits = logits[:, 0] if own_steps else logits.expand(LONGEST_CHAIN, -1, -1)
    said: torch.Tensor = inputs["vocabulary"][logits.argmax(-1)].cpu()
    return said == answer.output_ids


def _runs(hits: torch.Tensor) -> torch.Tensor:
    """Return ones up to the first miss of each whole chain: `(chain, positions)`."""
    count = max(hits.shape[1] - len(hits) + 1, 0)
    chains = torch.stack([hits[step, step : step + count] for step in range(len(hits))])
    return chains.long().cumprod(0)
