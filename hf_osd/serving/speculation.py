"""What each round proposes: the draft's tokens at a given length, or whatever measured costs and acceptance favour."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from ..records import Proposal
from .draft_length import FEW_ROUNDS, MeasuredLength, Plan, Round, bucket, confidence_bin
from .drafting import OnlineAssistedGenerator
from .experience import Experience
from .lookup import LOOKUP_LENGTH, Guess, Lookup
from .sequences import Sequences
from .stopwatch import Stopwatch
from .transfer import upload

_FRUITLESS, _SELDOM = 16, 8  # after so many rounds without a guess worth submitting, look every so many rounds at most

_ENOUGH = 4.0  # tokens gained by the mean row of a batch before it says something about batches


class Speculator(ABC):
    """
    Proposes for one batch, and learns from the outcome.

    Args:
        drafter (`OnlineAssistedGenerator`): The draft.
    """

    def __init__(self, drafter: OnlineAssistedGenerator) -> None:
        self.drafter = drafter
        self.counts = drafter.counts

    @abstractmethod
    def propose(self, sequences: Sequences, room: int, watch: Stopwatch) -> Proposal:
        """
        Propose tokens behind the end of every row.

        Args:
            sequences (`Sequences`): The batch.
            room (`int`): Tokens that may be proposed at most.
            watch (`Stopwatch`): Its stage `"draft"` is what the draft takes.
        """

    @abstractmethod
    def note(self, logits: torch.Tensor, tokens: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """
        Note what the target made of the last proposal.

        Args:
            logits (`torch.FloatTensor` of shape `(batch, k + 1, vocab)`): The target's logits.
            tokens (`Sequence[Sequence[int]]`): For each row, the tokens that the target settled on.
            taken (`Sequence[int]`): How many of them the row kept; 0 for finished rows.
        """

    def settle(self, seconds: dict[str, float]) -> None:  # noqa: B027 -- not everyone cares
        """Take the round's times, by stage."""

    def finish(self, lengths: Sequence[int]) -> None:  # noqa: B027
        """Leave to later requests what this one has learned; each row has generated `lengths[r]` tokens."""


class DraftSpeculator(Speculator):
    """The draft proposes, `num_assistant_tokens` at most."""

    def propose(self, sequences: Sequences, room: int, watch: Stopwatch) -> Proposal:
        """Draft; see [`Speculator.propose`]."""
        k = max(min(int(self.drafter.num_assistant_tokens), room, self.drafter.room(sequences.ends)), 0)
        watch.lap("")
        proposal = self.drafter.propose(sequences.ids, sequences.ends, k)
        watch.lap("draft")
        return proposal

    def note(self, logits: torch.Tensor, tokens: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """Tell the draft; see [`Speculator.note`]."""
        self.drafter.note(logits, tokens, taken)


class MeasuredSpeculator(Speculator):
    """
    Draft, lookup or neither, by [`MeasuredLength`].

    In greedy decoding on the CPU, where looking costs no wait, the draft also stops as soon as its own probabilities
    say that going on does not pay, and tokens that would not pay to verify are held back. Holding back depends on the
    very token, so it would bend the distribution of what is submitted when sampling; there everything drafted is sent.

    Args:
        drafter (`OnlineAssistedGenerator`): The draft.
        experience (`Experience`): Of the assistant.
        sequences (`Sequences`): The batch.
        lookup (`bool`): Whether guesses are made.
    """

    def __init__(
        self, drafter: OnlineAssistedGenerator, experience: Experience, sequences: Sequences, lookup: bool
    ) -> None:
        super().__init__(drafter)
        self._experience = experience
        self._lengths = MeasuredLength(experience, sequences.batch)
        self._looks = drafter.device.type == "cpu"
        prompts = [sequences.text(row)[0].tolist() for row in range(sequences.batch)] if lookup else []
        self._lookup = Lookup(prompts, experience.outputs) if lookup else None
        self._guesses: dict[int, Guess] = {}
        self._guessed_rows: set[int] = set()  # whose guess was submitted
        self._reach: list[list[float]] = []  # of each drafted token, by row
        self._going: list[float] = []  # the last of each row, 0 behind an eos
        self._bins: list[list[int]] = []
        self._fruitless = 0  # rounds since a guess was submitted
        self._plan, self._now = Plan(), Round((), 0, 0, 0, 0, 0, 0)
        self._sent = 0
        self._taken: list[int] = []
        self._first = True
        self._rounds, self._gained = 0, 0.0  # the latter by the mean row

    def propose(self, sequences: Sequences, room: int, watch: Stopwatch) -> Proposal:
        """Choose, and propose; see [`Speculator.propose`]."""
        self._now = now = self._look_around(sequences, room)
        self._guesses = self._guess(now)
        self._guessed_rows = set()
        self._plan = self._lengths.plan(now, self._guesses)
        drafts = self._plan.draft > 0
        proposal = self._draft(sequences, watch) if drafts else self._guessed(sequences, self._plan.lookup)
        self._sent = proposal.tokens.shape[1]
        if self._guessed_rows:
            self._fruitless = 0
        return proposal

    def _look_around(self, sequences: Sequences, room: int) -> Round:
        ends, padding = sequences.ends, sequences.padding
        return Round(
            rows=[row for row in range(sequences.batch) if sequences.is_active(row)],
            context=max(end - pad for end, pad in zip(ends, padding, strict=True)),
            lag=self.drafter.lag(ends),
            draft_room=max(min(int(self.drafter.num_assistant_tokens), room, self.drafter.room(ends)), 0),
            lookup_room=max(min(LOOKUP_LENGTH, room), 0),
            remaining=sequences.budget,
            generated=max(ends) - sequences.prompt_length,
        )

    def _guess(self, now: Round) -> dict[int, Guess]:
        """Guess for every row; where that has not helped for long, the more rows the more seldom."""
        self._fruitless += 1
        stride = min(len(now.rows), _SELDOM) if self._fruitless > _FRUITLESS else 1
        if self._lookup is None or self._fruitless % stride:
            return {}
        found = {row: self._lookup.guess(row, now.lookup_room) for row in now.rows}
        return {row: guess for row, guess in found.items() if guess is not None}

    def _guessed(self, sequences: Sequences, k: int) -> Proposal:
        """Submit guesses. Rows without one, or with a short one, are filled up with tokens that count for nothing."""
        nothing = self.drafter.skip()
        if not k:
            return nothing
        rows = [self._guesses[row].tokens[:k] if row in self._guesses else [] for row in range(sequences.batch)]
        filled = [tokens + [0] * (k - len(tokens)) for tokens in rows]
        self._guessed_rows = set(self._guesses)
        return Proposal(upload([token for row in filled for token in row], sequences.ids.device).view(len(rows), k))

    def _draft(self, sequences: Sequences, watch: Stopwatch) -> Proposal:
        self._reach, self._bins = [[] for _ in range(sequences.batch)], [[] for _ in range(sequences.batch)]
        self._going = [float(row in self._now.rows) for row in range(sequences.batch)]
        k = self._plan.draft if self._looks else self._lengths.best_fixed(self._now, self._plan.draft)
        expected = [self._even_reach(row, k) for row in range(sequences.batch)]
        # When sampling, whose tokens are sent must not depend on what they are: it is settled before they are drawn.
        settled = self._better_guesses(expected) if self.drafter.samples else None
        watch.lap("")
        proposal = self.drafter.propose(sequences.ids, sequences.ends, k, self._goes_on if self._looks else None)
        watch.lap("draft")
        if not self._looks:
            self._reach = expected
        return self._cut(self._replaced(proposal, self._better_guesses(self._reach) if settled is None else settled))

    def _even_reach(self, row: int, k: int) -> list[float]:
        chance = self._lengths.request_acceptance(row)
        return [chance ** (step + 1) for step in range(k)]

    def _goes_on(self, probabilities: torch.Tensor, ended: torch.Tensor | None) -> bool:
        """Take in the draft's probabilities of the tokens just drafted, `(batch,)`, and decide whether to go on."""
        over = ended.tolist() if ended is not None else [False] * len(self._reach)
        for row, probability in enumerate(probabilities.tolist()):
            chance = self._experience.confidence.rate(confidence_bin(probability))
            chance = min(chance * self._lengths.draft_factors[row].value, 0.99)
            reach = self._going[row] * chance
            self._reach[row].append(reach)
            self._bins[row].append(confidence_bin(probability))
            self._going[row] = 0.0 if over[row] else reach
        going, drafted = self._lengths.share * sum(self._going), len(self._reach[0])
        left = self._plan.draft - drafted
        return going > 0.0 and (self._plan.trial or self._lengths.goes_on(going, drafted, left))

    def _better_guesses(self, reach: list[list[float]]) -> set[int]:
        """Rows whose guess promises more than the draft does."""
        return {
            row
            for row, guess in self._guesses.items()
            if sum(self._lengths.row_guess_reach(row, guess)[: len(reach[row])]) > sum(reach[row])
        }

    def _replaced(self, proposal: Proposal, rows: set[int]) -> Proposal:
        k = proposal.tokens.shape[1]
        for row in rows:
            self._reach[row] = self._lengths.row_guess_reach(row, self._guesses[row])[:k]
        self._guessed_rows = rows
        return proposal.replaced({row: self._guesses[row].tokens[:k] for row in rows}) if rows else proposal

    def _cut(self, proposal: Proposal) -> Proposal:
        if proposal.probabilities is not None or not self._looks or self._plan.trial:
            return proposal
        k = proposal.tokens.shape[1]
        share = self._lengths.share
        sums = [share * sum(reach[step] for reach in self._reach if step < len(reach)) for step in range(k)]
        return Proposal(proposal.tokens[:, : self._lengths.best_cut(sums)])

    def note(self, logits: torch.Tensor, tokens: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """Judge the draft's tokens and the guesses, sent or not, by what was taken; see [`Speculator.note`]."""
        sampling = self.drafter.samples  # a token that was not sent proves nothing then by being another one
        rows = [not (sampling and row in self._guessed_rows) for row in range(len(taken))]
        right = self.drafter.note(logits, tokens, taken, rows)
        for row in self._now.rows:
            if rows[row]:
                self._note_drafted(row, right[row], taken[row])
            if row in self._guesses:
                self._note_guess(row, tokens[row][: taken[row]])
            if self._lookup is not None:
                self._lookup.extend(row, tokens[row][: taken[row]])
        self._taken = [taken[row] for row in self._now.rows]
        self._rounds += 1
        self._gained += sum(self._taken) / len(self._taken) - 1

    def _note_drafted(self, row: int, right: int, taken: int) -> None:
        drafted = self.drafter.drafted
        for step in range(min(right + 1, drafted, taken)):
            bins, accepted = self._bins[row], step < right
            if bins:
                expected = self._experience.confidence.rate(bins[step])
                self._experience.confidence.note(bins[step], accepted)
            else:
                expected = self._experience.acceptance.value
            self._experience.acceptance.note(accepted)
            self._lengths.draft_factors[row].note(expected, accepted)

    def _note_guess(self, row: int, taken: Sequence[int]) -> None:
        guess, sent = self._guesses[row], self._sent if row in self._guessed_rows else 0
        for step, (guessed, token) in enumerate(zip(guess.tokens, taken, strict=False)):
            expected = self._experience.match.rate(guess.match + step)
            self._experience.match.note(guess.match + step, guessed == token)
            self._lengths.lookup_factors[row].note(expected, guessed == token)
            self.counts.guessed += step < sent
            self.counts.guessed_right += step < sent and guessed == token
            if guessed != token:
                break

    def settle(self, seconds: dict[str, float]) -> None:
        """Learn what the round cost and yielded; see [`Speculator.settle`]."""
        total, drafting = sum(seconds.values()), seconds.get("draft", 0.0)
        batch, context = self._lengths.batch, self._now.context
        if not self._first:  # the first round reads the prompt
            self._experience.target_costs.note(batch, context, self._sent + 1, total - drafting)
            self._lengths.settle(self._now, self._plan, total, sum(self._taken))
        self._first = False
        if self._plan.draft:
            self._note_draft_round(drafting)

    def _note_draft_round(self, seconds: float) -> None:
        experience, batch = self._experience, self._lengths.batch
        drafted, lag = self.drafter.drafted, self._now.lag
        step, past = experience.draft_costs.curve(batch, 0, 1), experience.draft_rounds[batch]
        only_begins = step is None and past.seen >= FEW_ROUNDS  # answers of a token or two: no better figure will come
        if lag <= 2 or only_begins:
            experience.draft_costs.note(batch, 0, 1, seconds / drafted)
        elif step is not None:
            experience.draft_costs.note(batch, 0, bucket(lag), max(seconds - (drafted - 1) * step[1], step[1]))
        past.seen += 1
        past.gain.note(sum(self._taken) / len(self._taken) - 1)
        past.drafted.note(drafted)
        past.sent.note(self._sent)

    def finish(self, lengths: Sequence[int]) -> None:
        """Leave the outputs to later requests; see [`Speculator.finish`]."""
        self._experience.answer_length.note(sum(lengths) / len(lengths))
        if self._gained >= _ENOUGH:
            saved = max(lengths) - self._rounds
            self._experience.gain_share(self._lengths.batch).note(min(max(saved / self._gained, 0.0), 1.0))
        if self._lookup is not None:
            self._lookup.finish(lengths)
