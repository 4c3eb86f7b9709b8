"""The decode loop: propose, verify, commit, until every row is done."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from ..records import Proposal, Verdict
from .decoder import Decoder
from .processing import is_context_free, process
from .randomness import Randomness
from .scores import History, PathScores, along
from .sequences import Sequences
from .speculation import Speculator
from .stopping import StopCheck
from .stopwatch import Stopwatch
from .verification import Choose, Draw, best_of, best_of_all, verify


@dataclass(slots=True)
class Engine:
    """
    Decodes one batch.

    Attributes:
        sequences (`Sequences`): The batch; changed in place.
        target (`Decoder`): The target and its cache.
        speculator (`Speculator`): What proposes.
        processors (`Sequence[LogitsProcessor]`): Applied to the target's logits.
        watch (`Stopwatch`): Times the stages of every round.
        stop_check (`StopCheck`): The stopping criteria.
        randomness (`Randomness`, *optional*): Source of randomness; `None` decodes greedily.
        streamer (`BaseStreamer`, *optional*): Gets every column as soon as no row can change it.
        scores, logits (`History`, *optional*): Filled where the user asked for them.
        passes (`list[int]`): By row, forwards of the target until it was finished.
        submitted (`list[int]`): By row, proposed tokens that they checked.
    """

    sequences: Sequences
    target: Decoder
    speculator: Speculator
    watch: Stopwatch
    processors: Sequence[LogitsProcessor]
    stop_check: StopCheck
    randomness: Randomness | None = None
    streamer: BaseStreamer | None = None
    scores: History | None = None
    logits: History | None = None
    passes: list[int] = field(init=False)
    submitted: list[int] = field(init=False)
    _streamed: int = 0

    def run(self) -> None:
        """Decode until every row is done."""
        self.passes, self.submitted = [0] * self.sequences.batch, [0] * self.sequences.batch
        self._streamed = self.sequences.prompt_length
        while not self.sequences.finished:
            starts = list(self.sequences.ends)
            try:
                self._round()
            except BaseException:  # of the user's code: the caller's cache must not keep proposed tokens
                self.target.rollback([start - 1 for start in starts])
                raise
        if self.streamer is not None:
            self.streamer.end()

    def _round(self) -> None:
        sequences = self.sequences
        starts = list(sequences.ends)
        self.watch.start()
        proposal = self.speculator.propose(sequences, self._room(), self.watch).to(sequences.ids.device)
        k = proposal.tokens.shape[1]
        if k:
            sequences.propose(proposal.tokens)
        self.watch.lap("")
        ends = [start + k for start in starts]
        logits = self.target.feed(sequences.ids, ends, keep=k + 1, parents=proposal.parents)
        self.watch.lap("verify")
        for row in filter(sequences.is_active, range(sequences.batch)):
            self.passes[row] += 1
            self.submitted[row] += k
        verdict, scores = self._verify(logits, starts, proposal)
        if proposal.parents is not None:
            self.target.select(starts, verdict.paths)
            logits = along(verdict.paths, logits)
        self._commit(logits, scores, verdict.tokens, in_place=proposal.parents is None)
        self.target.rollback([end - 1 for end in sequences.ends])
        self.watch.lap("")
        self.speculator.settle(self.watch.finish())
        self._stream()

    def _room(self) -> int:
        """Most tokens to propose: one less than a row may still take, since it takes one more than it accepts."""
        if self.target.reads_prompt_alone:
            return 0
        ends, padding = self.sequences.ends, self.sequences.padding
        longest = max(end - pad for end, pad in zip(ends, padding, strict=True))
        return max(min(self.sequences.budget - 1, self.target.context - longest), 0)

    def _verify(
        self, logits: torch.Tensor, starts: Sequence[int], proposal: Proposal
    ) -> tuple[Verdict, torch.Tensor | None]:
        """Judge a proposal; also return the processed scores of the path, `(batch, taken, vocab)`, if kept."""
        sequences, eos = self.sequences, self.sequences.eos_token_ids
        room = [sequences.limit - end if sequences.is_active(row) else 0 for row, end in enumerate(starts)]
        if self.randomness is None and is_context_free(self.processors):
            scores = process(self.processors, sequences.ids, logits.flatten(0, 1)).view_as(logits)
            verdict = verify(proposal, best_of_all(scores), room, eos)
            return verdict, along(verdict.paths, scores) if self.scores is not None else None
        read = PathScores(self.processors, sequences.ids, starts, logits, keep=self.scores is not None)
        choose: Choose = best_of(read)
        if self.randomness is not None:
            choose = Draw(read, proposal, self.randomness.on(logits.device))
        return verify(proposal, choose, room, eos), read.kept

    def _commit(
        self, logits: torch.Tensor, scores: torch.Tensor | None, tokens: Sequence[Sequence[int]], in_place: bool
    ) -> None:
        taken = self.sequences.commit(tokens, in_place)
        for history, values in ((self.scores, scores), (self.logits, logits)):
            if history is not None and values is not None:
                history.append(values, taken)
        ask_for = self.scores if self.stop_check.asks else None
        seen = ask_for.columns(self.sequences.lengths) if ask_for is not None else None
        taken = self.stop_check(self.sequences, taken, seen)
        self.watch.lap("accept")
        self.speculator.note(logits, tokens, taken)
        self.watch.lap("record")

    def _stream(self) -> None:
        if self.streamer is not None:
            for column in self.sequences.finished_columns(self._streamed):
                self.streamer.put(column.cpu())
                self._streamed += 1
