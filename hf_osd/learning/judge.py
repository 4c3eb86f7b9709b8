"""
How good weights of the draft are, by recorded requests: without the live draft and without the training copy.

Teacher-forced: the draft reads the recorded output and says what it would have proposed at each position.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..records import Observation
from .adapters import carries_adapter, enable_adapter
from .features import reader_of
from .forwards import longest_request
from .losses import overlap

Weights = Mapping[str, torch.Tensor]
"""Parameters of a draft by name; those that are missing are as in the live draft."""

# Tokens of a proposal, in the measure of `Score.accepted`; the papers' k.
PROPOSAL_LENGTH = 5


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

    @property
    def passes(self) -> float:
        """Target passes a token: each gives one token besides the accepted ones."""
        return 1.0 / (1.0 + self.accepted)


class Judge:
    """
    Scores weights of a draft on recorded requests.

    Args:
        draft (`PreTrainedModel`): The live draft. It is read only, and only the parameters that a caller leaves out.
        max_length (`int`): Tokens of a request (its end) to look at.
        batch_size (`int`): Requests of one forward.
        pause (`Callable[[], object]`, *optional*): Called after each forward.
        vocab_size (`int`, *optional*): Tokens of the target, where the draft has more; it proposes no others.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        max_length: int,
        batch_size: int,
        pause: Callable[[], object] = lambda: None,
        vocab_size: int | None = None,
    ) -> None:
        self._draft = draft
        self._skeleton = _skeleton(draft)
        self._reader = reader_of(draft, vocab_size)
        self._collate = self._reader.collator(longest_request(draft, max_length), "all")
        self._batch_size = batch_size
        self._pause = pause

    @property
    def known(self) -> int:
        """Tokens that the draft knows."""
        return self._reader.known

    @torch.no_grad()
    def scores(self, weights: Weights, observations: Sequence[Observation]) -> list[Score]:
        """
        Score weights, in the precision in which they would serve.

        Args:
            weights (`Mapping[str, torch.Tensor]`): By name; any dtype and device. None for the live ones.
            observations (`Sequence[Observation]`): Requests, best not learned from.

        Returns:
            `list[Score]`: One a request.
        """
        values: dict[str, torch.Tensor] = dict(self._draft.named_parameters()) | dict(self._draft.named_buffers())
        values |= {name: weight.to(values[name]) for name, weight in weights.items()}
        found: list[Score] = []
        for start in range(0, len(observations), self._batch_size):
            found += self._score_batch(values, observations[start : start + self._batch_size])
            self._pause()
        return found

    def _score_batch(self, values: Weights, observations: Sequence[Observation]) -> Iterator[Score]:
        device = self._draft.device
        batch = {name: tensor.to(device) for name, tensor in self._collate(list(observations)).items()}
        options = self._reader.options(batch)
        logits = self._reader.proposable(torch.func.functional_call(self._skeleton, dict(values), (), options).logits)
        mask = batch["learn_mask"]
        greedy = torch.tensor([_is_greedy(observation) for observation in observations], device=device)
        accepted = acceptance(logits[:, -mask.shape[1] :].float(), batch, greedy)
        lengths = mask.sum(dim=1).clamp(min=1)
        means = (accepted.sum(dim=1) / lengths).tolist()
        runs = (accepted_run(accepted).sum(dim=1) / lengths).tolist()
        return map(Score, means, runs, mask.sum(dim=1).tolist())


def token_mean(rates: Iterable[tuple[float, int]]) -> float:
    """Return the mean over tokens of what is given by request, with its length; 0 without any."""
    pairs = list(rates)
    return sum(rate * positions for rate, positions in pairs) / max(sum(positions for _, positions in pairs), 1)


def acceptance(logits: torch.Tensor, batch: Mapping[str, torch.Tensor], greedy: torch.Tensor) -> torch.Tensor:
    """
    Return how likely the target accepts the draft's token at each position.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, verified, vocab)`): Of the draft.
        batch (`Mapping[str, torch.Tensor]`): A batch of [`ObservationCollator`].
        greedy (`torch.BoolTensor` of shape `(batch,)`): Requests that were decoded greedily, where the draft's first
            choice has to be the target's. Of others it is the mass that both distributions share.

    Returns:
        `torch.FloatTensor` of shape `(batch, verified)`: In [0, 1]; 0 where there is no output.
    """
    mask = batch["learn_mask"]
    best = logits.max(dim=-1)
    right = (best.indices == batch["teacher_ids"][..., 0]).float()
    if not bool(greedy.all()):
        shared = torch.zeros_like(right)
        teacher = (batch[f"teacher_{name}"][mask] for name in ("ids", "log_probs", "tail"))
        shared[mask] = overlap(logits[mask], *teacher)
        right = torch.where(greedy[:, None], right, shared)
    counts = mask & best.values.isfinite() & right.isfinite()  # what is broken accepts nothing
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


def _is_greedy(observation: Observation) -> bool:
    return bool((observation.output_ids == observation.teacher_ids[:, 0]).all())


def _skeleton(draft: PreTrainedModel) -> nn.Module:
    """A copy of the draft without weights: a call with others must not touch the modules that serve."""
    memo = {id(weight): nn.Parameter(weight.to("meta"), requires_grad=False) for weight in draft.parameters()}
    with torch.inference_mode(False):
        skeleton: nn.Module = copy.deepcopy(draft, memo).eval()
    if carries_adapter(draft):
        enable_adapter(skeleton)
    return skeleton
