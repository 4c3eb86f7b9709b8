"""
The scorer: how well weights of the draft do on recorded requests, neither live nor in training.

The draft reads the recorded output (teacher forcing), and what it would have proposed at each position counts.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

import torch
from torch import nn
from transformers import PreTrainedModel

from ..drafts.adapters import carries_adapter, enable_adapter
from ..records import Observation
from .features import reader_of
from .losses import overlap
from .reading import longest_request

PROPOSAL_LENGTH = 5  # tokens of a proposal in `Score.accepted`; the papers' k
DROP_REQUESTS = 4  # latest requests that are compared with those before, to notice a change of the traffic
DROP_ERRORS = 4.5  # standard errors of acceptance that they are lower by where there is one
LEAST_SPREAD = 0.1  # acceptance: least standard deviation between requests that this assumes

Weights = Mapping[str, torch.Tensor]
"""Parameters of a draft by name; those that are missing are as in the live draft."""


@dataclass(frozen=True, slots=True)
class Score:
    """
    How weights do on a request.

    Attributes:
        acceptance (`float`): How likely the target accepts the draft's token, averaged over positions, in [0, 1].
        accepted (`float`): Tokens that the target would accept of a proposal of five, averaged over where it begins.
        positions (`int`): Positions of the output.
    """

    acceptance: float
    accepted: float
    positions: int


class Scorer:
    """
    Scores weights of a draft on recorded requests, in the precision in which they would serve.

    Args:
        draft (`PreTrainedModel`): The live draft, of which only parameters that a caller leaves out are read.
        max_length (`int`): Tokens of a request, its end, that are read.
        batch_size (`int`): Requests of one forward pass.
        pause (`Callable[[], object]`, *optional*): Called after each of these.
        proposed (`int` or `torch.LongTensor`, *optional*): See [`~hf_osd.learning.reading.Reader`].
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        max_length: int,
        batch_size: int,
        pause: Callable[[], object] = lambda: None,
        proposed: int | torch.Tensor | None = None,
    ) -> None:
        self._draft = draft
        self._skeleton = _skeleton(draft)
        self._reader = reader_of(draft, proposed)
        self.known = self._reader.known  # tokens of the draft's vocabulary
        self._collate = self._reader.collator(longest_request(draft, max_length), "all")
        self._batch_size = batch_size
        self._pause = pause

    def scores(self, candidates: Mapping[str, Weights], requests: Sequence[Observation]) -> list[dict[str, Score]]:
        """
        Score candidates on requests that have not been learned from.

        Args:
            candidates (`Mapping[str, Mapping[str, torch.Tensor]]`): Weights of each, of any dtype and device.
            requests (`Sequence[Observation]`): The requests.

        Returns:
            `list[dict[str, Score]]`: For each request, the score of every candidate.
        """
        starts = range(0, len(requests), self._batch_size)
        batches = [self._batch(requests[start : start + self._batch_size]) for start in starts]
        columns = {name: self._column(weights, batches) for name, weights in candidates.items()}
        return [{name: column[row] for name, column in columns.items()} for row in range(len(requests))]

    def _batch(self, requests: Sequence[Observation]) -> dict[str, torch.Tensor]:
        greedy = torch.tensor([_is_greedy(request, self.known) for request in requests])
        batch = {**self._collate(list(requests)), "greedy": greedy}
        return {name: tensor.to(self._draft.device) for name, tensor in batch.items()}

    @torch.no_grad()
    def _column(self, weights: Weights, batches: Iterable[dict[str, torch.Tensor]]) -> list[Score]:
        values: dict[str, torch.Tensor] = dict(self._draft.named_parameters()) | dict(self._draft.named_buffers())
        values |= {name: weight.to(values[name]) for name, weight in weights.items()}
        found: list[Score] = []
        for batch in batches:
            found += self._score_batch(values, batch)
            self._pause()
        return found

    def _score_batch(self, values: Weights, batch: dict[str, torch.Tensor]) -> Iterable[Score]:
        run = partial(torch.func.functional_call, self._skeleton, dict(values), ())
        accepted = acceptance(self._reader.logits(lambda **options: run(options), batch).float(), batch)
        mask = batch["learn_mask"]
        lengths = mask.sum(dim=1).clamp(min=1)
        means = (accepted.sum(dim=1) / lengths).tolist()
        runs = (accepted_run(accepted).sum(dim=1) / lengths).tolist()
        return map(Score, means, runs, mask.sum(dim=1).tolist())


def token_mean(rates: Iterable[tuple[float, int]]) -> float:
    """Return the mean over tokens of rates by request, each with its tokens; 0 without any."""
    pairs = list(rates)
    return sum(rate * positions for rate, positions in pairs) / max(sum(positions for _, positions in pairs), 1)


def has_dropped(rates: Sequence[float]) -> bool:
    """Return whether acceptance by request, oldest first, is so low of late that the traffic has changed."""
    now, before = rates[-DROP_REQUESTS:], rates[:-DROP_REQUESTS]
    if len(before) < 2 * DROP_REQUESTS:
        return False
    error = max(stdev(before), LEAST_SPREAD) / DROP_REQUESTS**0.5
    return bool(fmean(before) - fmean(now) > DROP_ERRORS * error)


def acceptance(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    Return how likely the target accepts the draft's token at each position.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, verified, vocab)`): Of the draft.
        batch (`Mapping[str, torch.Tensor]`): A batch of [`ObservationCollator`], and `greedy` of shape `(batch,)`:
            whether a request was decoded greedily, so that the draft's first choice has to be the target's. For
            others, acceptance is the mass that both distributions share.

    Returns:
        `torch.FloatTensor` of shape `(batch, verified)`: In [0, 1]; 0 where there is no output.
    """
    mask = batch["learn_mask"]
    best = logits.max(dim=-1)
    right = (best.indices == batch["teacher_ids"][..., 0]).float()
    if not bool(batch["greedy"].all()):
        shared = torch.zeros_like(right)
        teacher = (batch[f"teacher_{name}"][mask] for name in ("ids", "log_probs", "tail"))
        shared[mask] = overlap(logits[mask], *teacher)
        right = torch.where(batch["greedy"][:, None], right, shared)
    counts = mask & best.values.isfinite() & right.isfinite()  # broken weights have nothing accepted
    return right.where(counts, torch.zeros_like(right))


def accepted_run(accepted: torch.Tensor, length: int = PROPOSAL_LENGTH) -> torch.Tensor:
    """
    Return the expected number of accepted tokens of a proposal that begins at each position.

    The sum over j of the probability that its first j tokens are accepted (https://arxiv.org/abs/2211.17192, sec. 3).

    Args:
        accepted (`torch.FloatTensor` of shape `(batch, verified)`): Acceptance probabilities, right-aligned.
        length (`int`, defaults to 5): Tokens of the proposal.

    Returns:
        `torch.FloatTensor` of shape `(batch, verified)`: In [0, length].
    """
    ahead = torch.nn.functional.pad(accepted, (0, length - 1)).unfold(1, length, 1)  # (batch, verified, length)
    return ahead.cumprod(dim=-1).sum(dim=-1)


def _is_greedy(observation: Observation, known: int) -> bool:
    best = observation.teacher_ids[:, 0]
    return bool(((observation.output_ids == best) | (best >= known)).all())


def _skeleton(draft: PreTrainedModel) -> nn.Module:
    """Return a copy of the draft without weights, so that calls with others never touch the modules that serve."""
    memo = {id(weight): nn.Parameter(weight.to("meta"), requires_grad=False) for weight in draft.parameters()}
    with torch.inference_mode(False):
        skeleton: nn.Module = copy.deepcopy(draft, memo).eval()
    if carries_adapter(draft):
        enable_adapter(skeleton)
    return skeleton
