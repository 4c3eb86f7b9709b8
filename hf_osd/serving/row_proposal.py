"""What the draft and the lookup propose for one row in one round, as one tree, and how what became of it is judged."""

from collections.abc import Iterable, Sequence

from .draft_length import MeasuredLength
from .experience import confidence_bin, evidence_bin, stance
from .growing import grow
from .lookup import Branch, Lookup
from .steps import Counts
from .tree import ROOT, Candidates


class RowProposal:
    """
    Gathers what is proposed for a row.

    Each of draft and lookup is believed by how often it was right lately: by what it says itself, and by whether the
    other one agrees. The lookup is asked at the end of the text, and again behind each drafted token.

    Args:
        row (`int`): The row.
        lengths (`MeasuredLength`): Of the batch.
        lookup (`Lookup`, *optional*): The lookup; `None` where it is not asked.
        nodes (`int`): Nodes of its tree to go on from, at most.
        depth (`int`): Tokens that may follow one another.
        is_active (`bool`): Whether the row still takes tokens.

    Attributes:
        tokens (`list[int]`): The drafted chain. Tokens still on the device are stand-ins: -2, -3 ...
        reach (`list[float]`): The chance that the row takes each, and all before it.
        tree (`Candidates`): All that is proposed.
        submitted (`set[int]`): The nodes of it that were submitted.
    """

    def __init__(
        self, row: int, lengths: MeasuredLength, lookup: Lookup | None, nodes: int, depth: int, is_active: bool
    ) -> None:
        self.tokens: list[int] = []
        self.reach: list[float] = []
        self.tree = Candidates()
        self.submitted: set[int] = set()
        self._row, self._nodes, self._depth, self._is_active = row, nodes, depth, is_active
        self._experience, self._least = lengths.experience, lengths.least_reach
        self._drafted, self._looked_up = lengths.draft_factors[row], lengths.lookup_factors[row]
        self._lookup = lookup if is_active and nodes > 0 else None
        self._found: list[Branch] = []  # what the lookup knows behind the text, and behind each drafted token
        self._bins: list[list[int]] = []  # of each drafted token, and of the others at its place
        self._others: list[list[tuple[int, float]]] = []  # the draft's next best tokens, with the chance of each there
        self._has_ended = not is_active
        self._look_up()
        self._grow()

    def _look_up(self) -> None:
        if self._lookup is not None:
            self._found.append(self._lookup.find(self._row, self.tokens))

    def _grow(self) -> None:
        grow(self.tree, dict(enumerate(self._found, ROOT)), self._judge, self._nodes, self._depth, self._least)

    def _judge(self, node: int, branch: Branch) -> tuple[int, float]:
        """Return the bin and the chance of a looked-up token. The chain is the first nodes of the tree."""
        place = node + 1
        known = place < len(self.tokens) and self.tokens[place] >= 0
        choices = [self.tokens[place], *(token for token, _ in self._others[place])] if known else []
        bin_ = evidence_bin(branch.evidence, stance(branch.token, choices))
        return bin_, min(self._experience.evidence.rate(bin_) * self._looked_up.value, 0.99)

    @property
    def going(self) -> float:
        """The chance that the row takes the whole chain and goes on; 0 behind an eos."""
        return 0.0 if self._has_ended else self.reach[-1] if self.reach else 1.0

    def draft(self, tokens: Sequence[int], chances: Sequence[float], is_last: bool) -> None:
        """
        Add a step of the draft.

        Args:
            tokens (`Sequence[int]`): Its token, and the next best ones.
            chances (`Sequence[float]`): The draft's own probability of each.
            is_last (`bool`): Whether the token ends the row.
        """
        choices = [branch.token for branch in self._found[-1].branches] if self._found else []
        bins = [confidence_bin(chance, stance(token, choices)) for token, chance in zip(tokens, chances, strict=True)]
        rates = [self._experience.others.rate(bin_) for bin_ in bins[1:]]
        chance = min(self._experience.confidence.rate(bins[0]) * self._drafted.value, 0.99)
        self._bins.append(bins)
        self._add(tokens, [chance, *rates])
        self._has_ended |= is_last
        self._look_up()

    def expect(self, tokens: Sequence[int], chance: float) -> None:
        """Add a step whose tokens, of which only stand-ins are known, have the chances that such tokens had lately."""
        rates = [self._experience.ranks.rate(rank) for rank in range(len(tokens) - 1)]
        self._add(tokens, [chance, *rates])

    def _add(self, tokens: Sequence[int], chances: Sequence[float]) -> None:
        self.reach.append(self.going * chances[0])
        self.tokens.append(tokens[0])
        self._others.append(list(zip(tokens[1:], chances[1:], strict=True)))

    def merge(self) -> Candidates:
        """Return the tree of what both propose; the drafted chain is its first nodes."""
        if not self.tokens:
            return self.tree
        self.tree = Candidates()
        chain = self.tree.add_chain(self.tokens, self.reach)
        before = [float(self._is_active), *self.reach]
        for parent, reach, others in zip([ROOT, *chain], before, self._others, strict=False):
            for token, chance in others:
                self.tree.add(parent, token, reach * chance)
        self._grow()
        return self.tree

    def submit(self, nodes: Iterable[int]) -> None:
        """Note which nodes of the tree were submitted."""
        self.submitted = set(nodes)

    @property
    def guesses(self) -> bool:
        """Whether anything of the lookup was submitted."""
        return not self.submitted.isdisjoint(self.tree.bins)

    def was_guessed(self, token: int) -> bool:
        """Whether the lookup proposed a token right behind the text."""
        return any(self.tree.tokens[node] == token for node in self.tree.children(ROOT) if node in self.tree.bins)

    def note_drafted(self, right: int, taken: Sequence[int]) -> None:
        """Judge the drafted chain, of which `right` tokens were right; the row took `taken`."""
        experience = self._experience
        for step in range(min(right + 1, len(self.tokens), len(taken))):
            accepted, bins = step < right, self._bins[step] if self._bins else None
            expected = experience.confidence.rate(bins[0]) if bins else experience.acceptance.value
            if bins:
                experience.confidence.note(bins[0], accepted)
            experience.acceptance.note(accepted)
            self._drafted.note(expected, accepted)

    def note_others(self, others: Sequence[Sequence[int]], right: int, taken: Sequence[int], counts: Counts) -> None:
        """Judge the draft's next best tokens, `others`, likewise."""
        for step in range(min(right + 1, len(others), len(taken))):
            for rank, token in enumerate(others[step]):
                is_right = token == taken[step]
                if self._bins:
                    self._experience.others.note(self._bins[step][1 + rank], is_right)
                else:
                    self._experience.ranks.note(rank, is_right)
                counts.others_right += is_right and step < len(taken) - 1

    def note_guessed(self, taken: Sequence[int], counts: Counts) -> None:
        """Judge what the lookup proposed behind each token that the row took, as far as the tree goes."""
        tree, node = self.tree, ROOT
        for token in taken:
            following = tree.children(node)
            node = next((child for child in following if tree.tokens[child] == token), ROOT)
            guessed = [child for child in following if child in tree.bins]
            if guessed:
                self._note_place(guessed, node)
                counts.guessed += not self.submitted.isdisjoint(guessed)
                counts.guessed_right += node in guessed and node in self.submitted
            if node == ROOT:
                return

    def _note_place(self, guessed: Sequence[int], right: int) -> None:
        calibration, bins = self._experience.evidence, [self.tree.bins[node] for node in guessed]
        self._looked_up.note(min(sum(calibration.rate(bin_) for bin_ in bins), 1.0), right in guessed)
        for node, bin_ in zip(guessed, bins, strict=True):
            calibration.note(bin_, node == right)
