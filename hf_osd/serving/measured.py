"""The speculator of the schedule "measured": each round submits a tree of what the draft and the lookup propose."""

from collections.abc import Sequence

import torch

from ..records import Proposal
from .draft_length import Guess, MeasuredLength, Plan, Round, bucket
from .drafting import OnlineAssistedGenerator
from .experience import RANKS, Experience
from .growing import Limits
from .lookup import END, LOOKUP_LENGTH, Lookup
from .row_proposal import RowProposal
from .sequences import Sequences
from .speculation import Speculator
from .steps import Step
from .stopwatch import Stopwatch
from .transfer import upload
from .tree import ROOT, Candidates, chain

_FRUITLESS = 16  # rounds without a submitted guess, after which the lookup is asked less often
_SELDOM = 8  # rounds: then it is asked every so many, or every `rows` rounds where there are fewer rows
_ENOUGH = 4.0  # tokens that the mean row of a batch has to gain before the batch counts for `gain_share`
_PATIENCE = 4  # rounds in which the draft reads long text, after which one has to serve as the cost of a step
_UNSEEN = -2  # ids from here downwards stand for drafted tokens that have not been read from the device


class MeasuredSpeculator(Speculator):
    """
    Proposes by the draft, the lookup, both or neither, as [`MeasuredLength`] plans.

    What both propose becomes one tree, of which the likeliest nodes are submitted. For a target that takes no trees,
    its best chain is submitted.

    On a CPU, reading a probability costs no wait. So there the draft stops as soon as its own probabilities say that
    another token does not pay, and nodes that are not worth verifying are held back. When sampling, every drawn token
    is submitted: to hold back some of them by what they are would change the distribution of the output.

    Args:
        drafter (`OnlineAssistedGenerator`): The draft.
        experience (`Experience`): Of the assistant.
        sequences (`Sequences`): The batch.
        lookup (`bool`): Whether the lookup is asked.
        nodes (`int`): Most tokens to submit.
        branches (`bool`): Whether a proposal may be a tree.
    """

    def __init__(
        self,
        drafter: OnlineAssistedGenerator,
        experience: Experience,
        sequences: Sequences,
        lookup: bool,
        nodes: int = LOOKUP_LENGTH,
        branches: bool = False,
    ) -> None:
        super().__init__(drafter)
        self._experience = experience
        self._lengths = MeasuredLength(experience, sequences.batch)
        self._looks = drafter.device.type == "cpu"
        self._nodes, self._branches = nodes, branches
        prompts = [_known_text(sequences, row) for row in range(sequences.batch)] if lookup else []
        self._lookup = Lookup(prompts, experience.outputs) if lookup else None
        self._proposals: list[RowProposal] = []  # by row
        self._expected: dict[int, set[int]] = {}  # by row, the first tokens that the lookup alone would have submitted
        self._fruitless = 0  # rounds since a guess was submitted
        self._plan, self._now = Plan(), Round((), 0, 0, 0, 0, 0, 0, 0)
        self._sent = 0
        self._taken: list[int] = []
        self._first = True
        self._rounds, self._gained = 0, 0.0  # tokens, of the mean row

    def propose(self, sequences: Sequences, room: int, watch: Stopwatch) -> Proposal:
        """Choose, and propose; see [`Speculator.propose`]."""
        self._now = now = self._look_around(sequences, room)
        self._proposals = self._look_up(sequences, now)
        guesses = {row: self._guesses(self._proposals[row].tree) for row in now.rows}
        self._plan = self._lengths.plan(now, guesses)
        for row, found in guesses.items():
            self._expected[row] = {one.token for one in found[: self._plan.guessed] if one.is_first}
        drafted = self._draft(sequences, watch) if self._plan.draft else self.drafter.skip()
        proposal = self._chosen(drafted, sequences.ids.device)
        self._sent = proposal.tokens.shape[1]
        if any(one.has_guessed for one in self._proposals):
            self._fruitless = 0
        return proposal

    @property
    def _may_branch(self) -> bool:
        """Whether this round may submit a tree: not the first, since a long prompt is read faster without a mask."""
        return self._branches and not self._first

    def _look_around(self, sequences: Sequences, room: int) -> Round:
        ends, padding = sequences.ends, sequences.padding
        return Round(
            rows=[row for row in range(sequences.batch) if sequences.is_active(row)],
            context=max(end - pad for end, pad in zip(ends, padding, strict=True)),
            lag=self.drafter.lag(ends),
            draft_room=max(min(int(self.drafter.num_assistant_tokens), room, self.drafter.room(ends)), 0),
            lookup_room=max(min(LOOKUP_LENGTH, room), 0),
            nodes=self._nodes if room > 0 else 0,
            remaining=sequences.budget,
            generated=max(ends) - sequences.prompt_length,
        )

    def _look_up(self, sequences: Sequences, now: Round) -> list[RowProposal]:
        """Ask the lookup for every row; after many fruitless rounds only now and then, more seldom with more rows."""
        self._fruitless += 1
        stride = min(len(now.rows), _SELDOM) if self._fruitless > _FRUITLESS else 1
        lookup = self._lookup if self._fruitless % stride == 0 else None
        nodes = min(now.lookup_room, now.nodes)
        limits = Limits(nodes, now.lookup_room, sequences.eos_token_ids, self._lengths.least_reach)
        return [
            RowProposal(row, self._lengths, lookup, limits, is_active=row in now.rows)
            for row in range(self._lengths.batch)
        ]

    def _guesses(self, tree: Candidates) -> list[Guess]:
        return [Guess(tree.tokens[node], tree.reach[node], tree.parents[node] == ROOT) for node in self._order(tree)]

    def _draft(self, sequences: Sequences, watch: Stopwatch) -> Proposal:
        k = self._plan.draft if self._looks else self._lengths.best_fixed(self._now, self._plan.draft)
        others = len(RANKS) if self._may_branch else 0
        goes_on = self._goes_on if self._looks else None
        watch.lap("")
        proposal = self.drafter.propose(sequences.ids, sequences.ends, k, goes_on, others)
        watch.lap("draft")
        if not self._looks:
            self._expect(proposal.tokens.shape[1], self.drafter.others.shape[2])
        return proposal

    def _goes_on(self, step: Step) -> bool:
        """Note the tokens of a draft step with their chances, and decide whether to draft another."""
        assert step.chances is not None
        tokens = torch.cat([step.tokens[:, None], step.others], dim=1).tolist()
        over = step.ended.tolist() if step.ended is not None else [False] * len(tokens)
        for one, *drafted in zip(self._proposals, tokens, step.chances.tolist(), over, strict=True):
            one.draft(*drafted)
        going = self._lengths.share * sum(one.going for one in self._proposals)
        count = len(self._proposals[0].tokens)
        return going > 0.0 and (self._plan.trial or self._lengths.goes_on(going, count, self._plan.draft - count))

    def _expect(self, k: int, others: int) -> None:
        """Note drafted tokens that stay on the device."""
        for row, one in enumerate(self._proposals):
            chance = self._lengths.request_acceptance(row)
            for step in range(k):
                one.expect([_UNSEEN - step * (1 + others) - rank for rank in range(1 + others)], chance)

    def _chosen(self, drafted: Proposal, device: torch.device) -> Proposal:
        """Keep the nodes of each row's tree that are worth submitting."""
        forced = range(drafted.tokens.shape[1] if self.drafter.samples or self._plan.trial else 0)
        rows = [one.merge() for one in self._proposals]
        orders = [self._order(row, forced) for row in rows]
        most, pairs = max(self._plan.nodes, len(forced)), list(zip(rows, orders, strict=True))
        gains = self._lengths.gains([[row.reach[node] for node in order[:most]] for row, order in pairs])
        n = self._lengths.best_cut(gains, len(forced))
        n = self._lengths.filled(n, self._plan.nodes) if self._may_branch else n
        trees = [row.arranged(order[:n], forced) for row, order in pairs]
        for one, order in zip(self._proposals, orders, strict=True):
            one.submit(order[:n])
        filler = [ROOT] * n if self._may_branch else chain(n)
        parents = [[*nodes, *filler[len(nodes) :]] for _, nodes in trees]
        tokens = self._tokens([[*row, *[0] * (n - len(row))] for row, _ in trees], drafted, device)
        is_chain = all(nodes == chain(n) for nodes in parents)
        return Proposal(tokens, drafted.probabilities, None if is_chain else parents)

    def _order(self, tree: Candidates, forced: range = range(0)) -> list[int]:
        """Return the nodes that may be submitted: those that must be, and then the others by falling worth."""
        nodes = tree.ranked() if self._may_branch else tree.best_chain(forced)
        return [*forced, *(node for node in nodes if node >= len(forced))]

    def _tokens(self, rows: list[list[int]], drafted: Proposal, device: torch.device) -> torch.Tensor:
        """Upload tokens, and replace stand-ins by the drafted tokens on the device."""
        tokens = upload([token for row in rows for token in row], device).view(len(rows), -1)
        if all(token > _UNSEEN for row in rows for token in row):
            return tokens
        known = torch.cat([drafted.tokens[..., None], self.drafter.others], dim=2).flatten(1).to(device)
        return torch.where(tokens > _UNSEEN, tokens, known.gather(1, (_UNSEEN - tokens).clamp(min=0)))

    def note(self, logits: torch.Tensor, tokens: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """Judge drafted and guessed tokens, submitted or not, by what the rows took; see [`Speculator.note`]."""
        right = self.drafter.note(logits, tokens, taken)
        others = self.drafter.others.tolist() if self._plan.draft else []
        for row in self._now.rows:
            one, kept, counts = self._proposals[row], tokens[row][: taken[row]], self.counts[row]
            one.note_drafted(right[row], kept)
            if self._plan.draft and tokens[row][0] not in self._expected[row]:
                self._experience.rescue.note(taken[row] > 1)
            if others:
                one.note_others(others[row], right[row], kept, counts)
            one.note_guessed(kept, counts)
            if self._lookup is not None:
                self._lookup.extend(row, kept)
        self._taken = [taken[row] for row in self._now.rows]
        self._rounds += 1
        self._gained += sum(self._taken) / len(self._taken) - 1

    def settle(self, seconds: dict[str, float]) -> None:
        """Learn what the round cost and yielded; see [`Speculator.settle`]."""
        total, drafting = sum(seconds.values()), seconds.get("draft", 0.0)
        batch, context = self._lengths.batch, self._now.context
        if not self._first:  # the first round reads the prompt
            self._experience.target_costs.note(batch, context, self._sent + 1, total - drafting)
            self._lengths.settle(self._now, self._plan, total, sum(self._taken))
        self._first = False
        if self._plan.draft:
            self._note_draft_costs(drafting)

    def _note_draft_costs(self, seconds: float) -> None:
        experience, batch = self._experience, self._lengths.batch
        drafted, lag = self.drafter.drafted, self._now.lag
        step = experience.draft_costs.curve(batch, 0, 1)
        experience.unmeasured += step is None
        if lag <= 2 or (step is None and experience.unmeasured > _PATIENCE):
            experience.draft_costs.note(batch, 0, 1, seconds / drafted)
        elif step is not None:
            experience.draft_costs.note(batch, 0, bucket(lag), max(seconds - (drafted - 1) * step[1], step[1]))

    def finish(self, lengths: Sequence[int]) -> None:
        """Leave the outputs to later requests; see [`Speculator.finish`]."""
        self._experience.answer_length.note(sum(lengths) / len(lengths))
        if self._gained >= _ENOUGH:
            saved = max(lengths) - self._rounds
            self._experience.gain_share(self._lengths.batch).note(min(max(saved / self._gained, 0.0), 1.0))
        if self._lookup is not None:
            self._lookup.finish(lengths)


def _known_text(sequences: Sequences, row: int) -> list[int]:
    """Return what the output may quote: the prompt, behind what an encoder has read."""
    prompt = sequences.text(row)[0].tolist()
    return prompt if sequences.sources is None else [*sequences.sources[row].tolist(), END, *prompt]
