"""The draft's side of a round: proposes tokens, one forward each, and notes which of them the target accepted."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from .._compat import execution_device
from ..records import Proposal
from .choice import choose_draft_decoder
from .decoder import Decoder, context_length
from .processing import is_context_free, process
from .randomness import Randomness
from .recording import Recorder
from .states import TargetStates
from .steps import Counts, GoesOn, Step
from .transfer import upload
from .verification import sample

_NEVER = -1e30  # logit of tokens that the draft does not have; finite, so that a processor can still leave them alone


class OnlineAssistedGenerator(AssistedCandidateGenerator):
    """
    Proposes tokens with a draft model, and records where the target disagreed.

    In hf_osd's own loop it serves batches of any shape, through [`propose`] and [`note`]. It is also a
    `CandidateGenerator` of transformers, for its stock assisted decoding. Two things differ from its parent: it runs
    one forward for each token instead of a nested `generate`, and the probabilities that it returns are exactly those
    that it sampled from (huggingface/transformers#47932).

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, prompt)`): Left-padded prompts.
        assistant_model (`PreTrainedModel`): The draft.
        generation_config (`GenerationConfig`): Of the target's call.
        model_kwargs (`dict`): As in transformers; only the attention mask matters here.
        inputs_tensor (`torch.Tensor`, *optional*): Ignored. A draft with an encoder needs `draft_length` and
            `make_decoder`, so it drafts in hf_osd's own loop alone.
        logits_processor (`LogitsProcessorList`, *optional*): Applied to the draft's logits as to the target's, so that
            the two agree more often.
        draft_length (`int`, *optional*): Tokens to propose; defaults to the draft's `num_assistant_tokens`.
        draft_length_schedule (`str`, defaults to `"constant"`): See [`OnlineConfig`].
        confidence_threshold (`float`, defaults to 0.0): A proposal ends once the product of the draft's own
            probabilities of its tokens is at most this in every row; 0.0 never ends one early.
        padding (`Sequence[int]`, *optional*): Padding columns of each row; defaults to none.
        vocab_size (`int`, *optional*): The target's, where the two differ by padding; defaults to the draft's.
        randomness (`Randomness`, *optional*): Source of randomness.
        recorder (`Recorder`, *optional*): Where mismatches go.
        weights (`AbstractContextManager`, *optional*): Held during each forward of the draft, so that an update is
            never seen half done.
        make_decoder (`Callable[[], Decoder]`, *optional*): Makes the draft's decoder, when it is first needed.
            Defaults to choosing one then.
        states (`TargetStates`, *optional*): What the draft reads of the target; it proposes nothing before there are
            any.
        translates (`bool`, defaults to `False`): Whether its decoder reads whatever the target does: tokens that the
            draft does not have, and texts beyond its context.
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
        make_decoder: Callable[[], Decoder] | None = None,
        states: TargetStates | None = None,
        translates: bool = False,
    ) -> None:
        attention = {key: value for key, value in model_kwargs.items() if key == "attention_mask"}
        prompt: Any = input_ids  # torch.LongTensor to its parent, which no tensor is to a type checker
        if assistant_model.config.is_encoder_decoder:  # its parent would run the encoder, as the decoder's maker has
            self.main_model_max_length = generation_config.max_length
        else:
            super().__init__(prompt, assistant_model, generation_config, attention, inputs_tensor, logits_processor)
        if draft_length is not None:
            self.num_assistant_tokens = draft_length
        self.counts = [Counts() for _ in input_ids]  # by row
        self.device = execution_device(assistant_model)
        self._processors = list(logits_processor or [])
        self._do_sample = bool(generation_config.do_sample)
        self._randomness = randomness or (Randomness() if self._do_sample else None)
        self._longest = int(self.num_assistant_tokens) if draft_length_schedule == "heuristic" else None
        self._confidence_threshold = confidence_threshold
        # Processors that look at the text must not be asked about what follows its end.
        self._asks = not is_context_free(self._processors)
        self._may_stop_early = confidence_threshold > 0.0 or self._asks
        eos = generation_config.eos_token_id
        self._eos = None if eos is None else torch.tensor(eos, device=self.device)
        self._recorder = recorder
        self._weights = weights or nullcontext()
        self._known_tokens = assistant_model.config.get_text_config(decoder=True).vocab_size
        self._vocab_size = vocab_size or self._known_tokens
        self._context = context_length(assistant_model)
        if translates:
            self._known_tokens, self._context = self._vocab_size, 2**62
        self._padding = list(padding) if padding is not None else [0] * len(input_ids)
        width = max(generation_config.max_length or 0, input_ids.shape[1] + 1)
        self._choose_decoder = partial(choose_draft_decoder, assistant_model, input_ids, self._padding, width)
        self._make_decoder = make_decoder
        self._states = states
        self._decoder: Decoder | None = None  # made when first needed, since a prompt may exceed the draft's context
        self._nothing = Proposal(torch.empty(len(input_ids), 0, dtype=torch.long, device=self.device))
        self._last: Proposal | None = None
        self.others = self._nothing.tokens[..., None]  # (batch, k, others): the next best tokens of the last proposal
        self._finished: set[int] = set()  # rows that took nothing in the last round
        self._starts: list[int] = []  # column where the last proposal of each row began

    def room(self, ends: Sequence[int]) -> int:
        """Return how many tokens the draft's context takes behind the longest row; 0 without the target's states."""
        if self._states is not None and not self._states.known:
            return 0
        return max(self._context - max(end - pad for end, pad in zip(ends, self._padding, strict=True)) + 1, 0)

    @torch.no_grad()
    def propose(
        self, ids: torch.Tensor, ends: Sequence[int], k: int, goes_on: GoesOn | None = None, others: int = 0
    ) -> Proposal:
        """
        Propose `k` tokens for every row.

        Args:
            ids (`torch.LongTensor` of shape `(batch, columns)`): The token buffer. Columns behind the ends are
                scratch: where the buffer lives on the draft's device, the proposal is left there.
            ends (`Sequence[int]`): Column behind the last token of each row. All but that token are as they were, or
                as they were proposed: a row has taken a prefix of its proposal and one token more.
            k (`int`): Tokens to propose, at most; 0 gives an empty proposal without running the draft.
            goes_on (`Callable`, *optional*): Asked after every token whether to draft another. Defaults to the
                confidence threshold, if any.
            others (`int`, defaults to 0): How many of the next best tokens to note at each place; see [`others`].

        Returns:
            [`~hf_osd.records.Proposal`]: On the draft's device.
        """
        if k == 0:
            return self.skip()
        ids = ids.to(self.device)
        if self._decoder is None:
            with self._weights:  # which the choice may try out
                self._decoder = (self._make_decoder or self._choose_decoder())()
        self._decoder.rollback([end - 1 for end in ends])
        steps = self._steps(self._decoder, ids, ends, k, goes_on or self._confidence_rule(), others)
        tokens = torch.stack([step.tokens for step in steps], dim=1)
        probabilities = [step.probabilities for step in steps if step.probabilities is not None]
        self.others = torch.stack([step.others for step in steps], dim=1)
        self._starts = list(ends)
        self._last = Proposal(tokens, torch.stack(probabilities, dim=1) if probabilities else None)
        return self._last

    def skip(self) -> Proposal:
        """Note that this round goes without the draft, and return its empty proposal."""
        self._last = self._nothing
        return self._last

    @property
    def drafted(self) -> int:
        """Tokens of the last proposal, those that were not submitted included."""
        return self._last.tokens.shape[1] if self._last is not None else 0

    @property
    def samples(self) -> bool:
        """Whether proposals are sampled, not chosen greedily."""
        return self._randomness is not None

    def lag(self, ends: Sequence[int]) -> int:
        """Return how many tokens the draft has to read before it can propose: the most of any row."""
        cached = self._decoder.cached if self._decoder is not None else self._padding
        return max(end - done for end, done in zip(ends, cached, strict=True))

    def release(self) -> None:
        """Leave the draft's cache to later calls."""
        if self._decoder is not None:
            self._decoder.release()
            self._decoder = None

    def _confidence_rule(self) -> GoesOn | None:
        """Return a rule to go on while an unfinished row has a product of probabilities above the threshold."""
        if not self._may_stop_early:
            return None
        reach = torch.ones(len(self._padding), device=self.device)

        def goes_on(step: Step) -> bool:
            """Take a step into each row's product, and say whether any row still needs another."""
            assert step.chances is not None
            reach.mul_(step.chances[:, 0])
            if step.ended is not None:
                reach.masked_fill_(step.ended, 0.0)
            return bool((reach > self._confidence_threshold).any())

        return goes_on

    def _steps(
        self, decoder: Decoder, ids: torch.Tensor, ends: Sequence[int], k: int, goes_on: GoesOn | None, others: int
    ) -> list[Step]:
        """
        Draft token by token, until `goes_on` says no.

        It may decide by the tokens drafted so far, as long as all of these are submitted: the target chooses what is
        not proposed, so the output keeps the target's distribution.
        """
        steps: list[Step] = []
        over = self._over(ids, ends) if self._asks else set()
        for place in range(k):
            scores = self._scores(decoder, ids, [end + place for end in ends], over)
            names = decoder.vocabulary if scores.shape[-1] < self._vocab_size else None
            # Reading probabilities waits for the device, so it is done only where they decide something.
            steps.append(self._choose(scores, names, others, looks=goes_on is not None))
            self._write(ids, [end + place for end in ends], steps[-1].tokens)
            if self._asks and steps[-1].ended is not None:
                over |= _places(steps[-1].ended)
            if goes_on is not None and not goes_on(steps[-1]):
                break
        return steps

    def _over(self, ids: torch.Tensor, ends: Sequence[int]) -> set[int]:
        """Return the rows that take no more tokens."""
        if self._eos is None:
            return set(self._finished)
        last = ids[range(len(ends)), [end - 1 for end in ends]]
        return self._finished | _places(torch.isin(last, self._eos))

    @staticmethod
    def _write(ids: torch.Tensor, columns: Sequence[int], tokens: torch.Tensor) -> None:
        if len(columns) == 1:
            ids[:, columns[0]] = tokens
        else:
            ids.scatter_(1, upload(columns, ids.device)[:, None], tokens[:, None])

    def _readable(self, ids: torch.Tensor) -> torch.Tensor:
        """Clamp ids beyond the draft's embedding, which the target or a processor may have chosen."""
        return ids if self._known_tokens >= self._vocab_size else ids.clamp(max=self._known_tokens - 1)

    def _scores(self, decoder: Decoder, ids: torch.Tensor, ends: Sequence[int], over: Collection[int]) -> torch.Tensor:
        """
        Processed scores of the token in column `ends[r]` of each row, `(batch, vocab)`; raw ones if it is over.

        With a decoder of a smaller vocabulary, and neither processors nor sampling, scores are of its tokens alone.
        """
        with self._weights:  # not during processors, which are the user's code and may make requests themselves
            logits = decoder.feed(self._readable(ids), ends, keep=1)
        if decoder.vocabulary is None or self._processors or self.samples:
            logits = fit_vocabulary(logits, self._vocab_size, decoder.vocabulary)
        limit = self.main_model_max_length
        lengths = [limit if row in over else end for row, end in enumerate(ends)]
        return process(self._processors, ids, logits[:, 0], range(len(ends)), lengths, limit)

    def _choose(self, scores: torch.Tensor, names: torch.Tensor | None, others: int, looks: bool) -> Step:
        """Choose or sample a token by scores `(batch, vocab)` of the tokens `names`; `None` means all."""
        best = scores.topk(min(1 + others, scores.shape[-1]), dim=-1) if others else scores.max(dim=-1, keepdim=True)
        ids, values, probabilities = best.indices, best.values, None
        if self._randomness is not None:
            probabilities = scores.softmax(dim=-1)
            drawn = sample(probabilities, self._randomness.on(scores.device))[:, None]
            ids = torch.cat([drawn, _without(ids, drawn)], dim=1)
            values = scores.gather(1, ids)
        ids = ids if names is None else names[ids]
        if not looks:
            return Step(ids[:, 0], probabilities, ids[:, 1:])
        chances = (values - scores.logsumexp(dim=-1, keepdim=True)).exp()
        ended = torch.isin(ids[:, 0], self._eos) if self._eos is not None else None
        return Step(ids[:, 0], probabilities, ids[:, 1:], chances, ended)

    def note(
        self,
        logits: torch.Tensor,
        tokens: Sequence[Sequence[int]],
        taken: Sequence[int],
    ) -> list[int]:
        """
        Note what the target made of the last proposal.

        A drafted token is right if the row took it there and all drafted ones before it were right. Tokens that were
        not submitted are judged, too.

        Args:
            logits (`torch.FloatTensor` of shape `(batch, k + 1, vocab)`): The target's logits.
            tokens (`Sequence[Sequence[int]]`): For each row, the tokens that the target settled on.
            taken (`Sequence[int]`): How many of them the row kept; 0 for finished rows.

        Returns:
            `list[int]`: How many of each row's drafted tokens were right.
        """
        assert self._last is not None, "propose() comes before note()"
        k = self.drafted
        drafted = self._last.tokens.tolist() if k else [[]] * len(taken)
        compared = zip(drafted, tokens, taken, strict=True)
        right = [_leading(ours, theirs[:kept]) for ours, theirs, kept in compared]
        for counts, count, kept in zip(self.counts, right, taken, strict=True):
            counts.proposed += k if kept else 0
            counts.judged += min(count + 1, k, kept)
            counts.accepted += count
        if k and self._decoder is not None:
            # Straight to where the next proposal begins: a windowed cache cannot be rolled back twice in a row.
            rows_kept = zip(self._starts, right, taken, strict=True)  # a row that is over took none
            self._decoder.rollback([start + min(count, kept - 1) for start, count, kept in rows_kept])
        self._finished = {row for row, kept in enumerate(taken) if not kept}
        self._adapt_length(k, [count == k for count, kept in zip(right, taken, strict=True) if kept])
        if self._recorder is not None and any(taken):
            judged = [min(count + 1, k) for count in right]
            self._recorder.record(logits, self._last.tokens.to(logits.device), judged, right, taken)
        return right

    def _adapt_length(self, k: int, accepted_in_full: Sequence[bool]) -> None:
        """
        Apply transformers' heuristic: two tokens more after a proposal accepted in full, one less after any other.

        A batch counts as accepted where more than a third of its rows does, since that is the share at which the
        length of one row settles. Proposals that were cut short are left out.
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
        input_ids = input_ids.to(self.device)
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
        taken = input_ids[0, self._starts[0] :].tolist() if self.drafted else [int(input_ids[0, -1])]
        self.note(scores, [taken], [len(taken)])


def _places(flags: torch.Tensor) -> set[int]:
    return set(flags.nonzero().flatten().tolist())


def _without(ids: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Drop the column of `ids` that holds each row's `drawn` one, `(batch, 1)`; the last where none does."""
    kept = (ids == drawn).long().argsort(dim=1, stable=True)[:, : ids.shape[1] - 1]
    return ids.gather(1, kept)


def _leading(drafted: Sequence[int], taken: Sequence[int]) -> int:
    """Count the leading tokens that are the same."""
    count = 0
    for ours, theirs in zip(drafted, taken, strict=False):
        if ours != theirs:
            break
        count += 1
    return count


def fit_vocabulary(logits: torch.Tensor, size: int, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
    """
    Cut or pad the draft's logits to the target's vocabulary, or place them in it by `vocabulary`.

    Ids that only the target has get the logit `_NEVER`: they are proposed only where a processor forbids all others.
    """
    if vocabulary is not None:
        return logits.new_full((*logits.shape[:-1], size), _NEVER).index_copy_(-1, vocabulary, logits)
    missing = size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :size]
    return torch.nn.functional.pad(logits, (0, missing), value=_NEVER)
