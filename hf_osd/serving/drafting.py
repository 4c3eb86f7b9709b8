"""The draft's side of a round: propose tokens in a tight loop, and note which of them the target took."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from ..records import Proposal
from .decoder import Decoder, context_length, make_decoder
from .processing import is_context_free, process
from .randomness import Randomness
from .recording import Recorder
from .verification import sample


@dataclass(slots=True)
class DraftCounts:
    """
    What became of the proposed tokens of one request.

    Attributes:
        proposed (`int`): Tokens the draft proposed.
        judged (`int`): Those that the target judged: up to and including the first refusal of each round. Later ones
            follow a refused token and say nothing about the draft.
        accepted (`int`): Those it took.
    """

    proposed: int = 0
    judged: int = 0
    accepted: int = 0


class OnlineAssistedGenerator(AssistedCandidateGenerator):
    """
    Proposes tokens with a draft model, and records where the target disagreed.

    Inside hf_osd's own loop it serves batches of any shape, through [`propose`] and [`note`]. It is also a
    `CandidateGenerator` of transformers, and works unchanged in its stock assisted decoding. Against its parent: one
    forward a token in a loop of its own instead of a nested `generate`, and the probabilities it hands out are
    exactly those it sampled from (huggingface/transformers#47932).

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, prompt)`): Left-padded prompts.
        assistant_model (`PreTrainedModel`): The draft.
        generation_config (`GenerationConfig`): Of the target's call.
        model_kwargs (`dict`): As in transformers; only the attention mask matters here.
        inputs_tensor (`torch.Tensor`, *optional*): Ignored; encoder-decoder drafts are not supported.
        logits_processor (`LogitsProcessorList`, *optional*): Applied to the draft as to the target, which is what
            makes the two agree.
        draft_length (`int`, *optional*): Tokens to propose; defaults to the draft's `num_assistant_tokens`.
        draft_length_schedule (`str`, defaults to `"constant"`): See [`OnlineConfig`].
        confidence_threshold (`float`, defaults to 0.0): Stop a proposal once the product of the draft's own
            probabilities of it falls to this in every row; 0.0 proposes in full.
        padding (`Sequence[int]`, *optional*): Padding columns of each row; defaults to none.
        vocab_size (`int`, *optional*): The target's, where the two differ by padding; defaults to the draft's.
        randomness (`Randomness`, *optional*): Source of randomness.
        recorder (`Recorder`, *optional*): Where mismatches go.
        weights (`AbstractContextManager`, *optional*): Held while the draft's weights are read, so that an update is
            never seen half done.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        assistant_model: PreTrainedModel,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        inputs_tensor: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        draft_length: int | None = None,
        draft_length_schedule: str = "constant",
        confidence_threshold: float = 0.0,
        padding: Sequence[int] | None = None,
        vocab_size: int | None = None,
        randomness: Randomness | None = None,
        recorder: Recorder | None = None,
        weights: AbstractContextManager[Any] | None = None,
    ) -> None:
        attention = {key: value for key, value in model_kwargs.items() if key == "attention_mask"}
        prompt: Any = input_ids  # torch.LongTensor to its parent, which no tensor is to a type checker
        super().__init__(prompt, assistant_model, generation_config, attention, inputs_tensor, logits_processor)
        if draft_length is not None:
            self.num_assistant_tokens = draft_length
        self.counts = DraftCounts()
        self._processors = list(logits_processor or [])
        self._do_sample = bool(generation_config.do_sample)
        self._randomness = randomness or (Randomness() if self._do_sample else None)
        self._longest = int(self.num_assistant_tokens) if draft_length_schedule == "heuristic" else None
        self._confidence_threshold = confidence_threshold
        # Behind an eos, processors that look at the text must not be asked to go on.
        self._may_stop_early = confidence_threshold > 0.0 or not is_context_free(self._processors)
        eos = generation_config.eos_token_id
        self._eos = None if eos is None else torch.tensor(eos, device=assistant_model.device)
        self._recorder = recorder
        self._weights = weights or nullcontext()
        self._known_tokens = assistant_model.config.get_text_config(decoder=True).vocab_size
        self._vocab_size = vocab_size or self._known_tokens
        self._context = context_length(assistant_model)
        self._padding = list(padding) if padding is not None else [0] * len(input_ids)
        self._width = max(generation_config.max_length or 0, input_ids.shape[1] + 1)
        self._decoder: Decoder | None = None  # made when first needed: a prompt may exceed the draft's context
        self._last: Proposal | None = None

    def room(self, ends: Sequence[int]) -> int:
        """Return how many tokens the draft's context still takes behind the longest row."""
        return max(self._context - max(end - pad for end, pad in zip(ends, self._padding, strict=True)) + 1, 0)

    def propose(self, ids: torch.Tensor, ends: Sequence[int], k: int) -> Proposal:
        """
        Propose `k` tokens for every row.

        Args:
            ids (`torch.LongTensor` of shape `(batch, columns)`): The token buffer. Columns behind the ends are
                scratch: where the buffer lives on the draft's device, the proposal is left there.
            ends (`Sequence[int]`): Column behind the last token of each row. All but that token are as they were, or
                as they were proposed: a row goes on from a prefix of its proposal and one token more.
            k (`int`): Tokens to propose, at most; 0 gives an empty proposal without running the draft.

        Returns:
            [`~hf_osd.records.Proposal`]: On the draft's device.
        """
        ids = ids.to(self.assistant_model.device)
        if k == 0:
            self._last = Proposal(ids.new_empty(len(ids), 0))
            return self._last
        with self._weights:  # also over the choice of the decoder, which may try the draft out
            if self._decoder is None:
                self._decoder = make_decoder(self.assistant_model, self._padding, self._width, role="draft")
            self._decoder.rollback([end - 1 for end in ends])
            steps = self._steps(self._decoder, ids, ends, k)
        tokens = torch.stack([token for token, _ in steps], dim=1)
        probabilities = [q for _, q in steps if q is not None]
        self._last = Proposal(tokens, torch.stack(probabilities, dim=1) if probabilities else None)
        return self._last

    def _steps(
        self, decoder: Decoder, ids: torch.Tensor, ends: Sequence[int], k: int
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """
        Draft token by token, until going on is not worth a step.

        Whether to go on may depend on the tokens drafted so far, as long as those are verified: what is not proposed
        is left to the target, so the output's distribution is the target's either way.
        """
        reach = torch.ones(len(ids), device=ids.device)  # how likely each row is to accept all it has, (batch,)
        steps: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for step in range(k):
            tokens, probabilities, reach = self._step(decoder, ids, [end + step for end in ends], reach)
            steps.append((tokens, probabilities))
            # Asking waits for the device, so it is done only where it can matter.
            if self._may_stop_early and step + 1 < k and not bool((reach > self._confidence_threshold).any()):
                break
        return steps

    def _readable(self, ids: torch.Tensor) -> torch.Tensor:
        """Replace ids that the draft's embedding does not have: the target or a processor may choose them."""
        return ids if self._known_tokens >= self._vocab_size else ids.clamp(max=self._known_tokens - 1)

    def _step(
        self, decoder: Decoder, ids: torch.Tensor, ends: Sequence[int], reach: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        logits = _fit_vocabulary(decoder.feed(self._readable(ids), ends, keep=1), self._vocab_size)
        scores = process(self._processors, ids, logits, ends, self.main_model_max_length)[:, 0]  # (batch, vocab)
        probabilities = scores.softmax(dim=-1) if self._may_stop_early or self._randomness is not None else None
        if self._randomness is None or probabilities is None:
            tokens = scores.argmax(dim=-1)
        else:
            tokens = sample(probabilities, self._randomness.on(scores.device))
        ids.scatter_(1, torch.tensor(ends, device=ids.device)[:, None], tokens[:, None])
        if self._may_stop_early and probabilities is not None:
            reach = reach * probabilities.gather(1, tokens[:, None])[:, 0]
            if self._eos is not None:
                reach = reach.masked_fill(torch.isin(tokens, self._eos), 0.0)  # nothing follows
        return tokens, probabilities if self._randomness is not None else None, reach

    def note(self, logits: torch.Tensor, accepted: Sequence[int], taken: Sequence[int]) -> None:
        """
        Note what the target made of the last proposal.

        Args:
            logits (`torch.FloatTensor` of shape `(batch, k + 1, vocab)`): The target's logits.
            accepted (`Sequence[int]`): Proposed tokens that each row accepted.
            taken (`Sequence[int]`): Tokens that each row kept; 0 for finished rows.
        """
        assert self._last is not None, "propose() comes before note()"
        k = self._last.tokens.shape[1]
        for row_accepted, row_taken in zip(accepted, taken, strict=True):
            if row_taken:
                self.counts.proposed += k
                self.counts.judged += min(row_accepted + 1, k, row_taken)
                self.counts.accepted += min(row_accepted, row_taken)
        self._adapt_length(k, [full == k for full, kept in zip(accepted, taken, strict=True) if kept])
        if self._recorder is not None and any(taken):
            self._recorder.record(logits, self._last.tokens.to(logits.device), accepted, taken)

    def _adapt_length(self, k: int, accepted_in_full: Sequence[bool]) -> None:
        """
        Follow transformers' heuristic: its length settles where a third of the proposals is accepted in full.

        A batch asks for that third of its rows; for one row, that is transformers' own rule. Proposals that were cut
        short say nothing about the length.
        """
        if self._longest is None or not accepted_in_full or k < self.num_assistant_tokens:
            return
        step = 2 if 3 * sum(accepted_in_full) > len(accepted_in_full) else -1
        self.num_assistant_tokens = min(max(k + step, 1), self._longest)

    # The three hooks of transformers' stock assisted decoding, which serves one row.

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
        """
        Propose tokens behind `input_ids`, for transformers' assisted decoding.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)`): All tokens so far.

        Returns:
            `tuple[torch.LongTensor, torch.FloatTensor]`: The tokens with the proposal, `(1, length + k)`, and scores
            `(1, k, vocab)` whose softmax is what the proposal was sampled from; `None` where k is 0, or when greedy.
        """
        input_ids = input_ids.to(self.assistant_model.device)
        length = input_ids.shape[1]
        k = max(min(int(self.num_assistant_tokens), self.main_model_max_length - length - 1, self.room([length])), 0)
        ids = torch.cat([input_ids, input_ids.new_zeros(1, k)], dim=1)
        proposal = self.propose(ids, [length], k)
        scores = proposal.probabilities.log() if proposal.probabilities is not None else None
        return ids, scores

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """
        Note the outcome, for transformers' assisted decoding.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)`): All tokens, the accepted ones included.
            scores (`torch.FloatTensor` of shape `(1, k + 1, vocab)`): The target's scores, after processors: a
                teacher recorded here is what they leave of the target's own distribution.
            num_matches (`int`): Proposed tokens it accepted.
        """
        self.note(scores, [int(num_matches)], [int(num_matches) + 1])


def _fit_vocabulary(logits: torch.Tensor, size: int) -> torch.Tensor:
    """
    Cut or pad the draft's logits to the target's vocabulary.

    Ids that only the target has are never proposed, except where a processor allows nothing else: they are finite, so
    that there is a choice then too.
    """
    missing = size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :size]
    return torch.nn.functional.pad(logits, (0, missing), value=-1e30)
