"""What the draft and the lookup propose for one row in one round, as one tree, and how what became of it is judged."""

from collections.abc import Iterable, Sequence

from .draft_length import MeasuredLength
from .experience import confidence_bin, evidence_bin, stance
from .growing import Limits, grow
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
        limits (`Limits`): How far the tree may grow.
        is_active (`bool`): Whether the row still takes tokens.

    Attributes:
        tokens (`list[int]`): The drafted chain. Tokens still on the device are stand-ins: -2, -3 ...
        reach (`list[float]`): The chance that the row takes each, and all before it.
        tree (`Candidates`): All that is proposed.
        submitted (`set[int]`): The nodes of it that were submitted.
    """

    def __init__(
        self, row: int, lengths: MeasuredLength, lookup: Lookup | None, limits: Limits, is_active: bool
    ) -> None:
        self.tokens: list[int] = []
        self.reach: list[float] = []
        self.tree = Candidates()
        self.submitted: set[int] = set()
        self._row, self._limits, self._is_active = row, limits, is_active
        self._experience = lengths.experience
        self._draft_factor, self._lookup_factor = lengths.draft_factors[row], lengths.lookup_factors[row]
        self._lookup = lookup if limits.nodes else None
        self._found: list[Branch] = []  # what the lookup knows behind the text, and behind each drafted token
        self._bins: list[list[int]] = []  # of each drafted token, and of the others at its place
        self._others: list[list[tuple[int, float]]] = []  # the draft's next best tokens, with the chance of each there
        self._has_ended = not is_active
        self._look_up()
        self._grow()

    def _look_up(self) -> None:
        if self._lookup is not None and self.going >= self._limits.reach:
            self._found.append(self._lookup.find(self._row, self.tokens))

    def _grow(self) -> None:
        grow(self.tree, dict(enumerate(self._found, ROOT)), self._chance, self._limits)

    def _chance(self, node: int, branch: Branch) -> float:
        """Return how likely a looked-up token is. The drafted chain is the first nodes, so node 0 leads to place 1."""
        return min(self._experience.evidence.rate(self._bin(node + 1, branch)) * self._lookup_factor.value, 0.99)

    def _bin(self, place: int, branch: Branch) -> int:
        """Return the bin of a looked-up token at a place of the drafted chain, or elsewhere if there is none."""
        known = place < len(self.tokens) and self.tokens[place] >= 0
        choices = [self.tokens[place], *(token for token, _ in self._others[place])] if known else []
        return evidence_bin(branch.evidence, stance(branch.token, choices))

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
        found = self._found[len(self.tokens) :]  # empty where it was not asked
        choices = [branch.token for branch in found[0].branches] if found else []
        bins = [confidence_bin(chance, stance(token, choices)) for token, chance in zip(tokens, chances, strict=True)]
        rates = [self._experience.others.rate(bin_) for bin_ in bins[1:]]
        chance = min(self._experience.confidence.rate(bins[0]) * self._draft_factor.value, 0.99)
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
    def has_guessed(self) -> bool:
        """Whether anything of the lookup was submitted."""
        return not self.submitted.isdisjoint(self.tree.looked_up)

    def note_drafted(self, right: int, taken: Sequence[int]) -> None:
        """Judge the drafted chain, of which `right` tokens were right; the row took `taken`."""
        experience = self._experience
        for step in range(min(right + 1, len(self.tokens), len(taken))):
            accepted, bins = step < right, self._bins[step] if self._bins else None
            expected = experience.confidence.rate(bins[0]) if bins else experience.acceptance.value
            if bins:
                experience.confidence.note(bins[0], accepted)
            experience.acceptance.note(accepted)
            self._draft_factor.note(expected, accepted)

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
        """Judge what the lookup knew behind each token that the row took, submitted or not."""
        place, found = 0, self._found[:1]  # the place on the drafted chain, as long as that is right
        for token in taken:
            if not found:
                break
            branches = found[0].branches
            self._note_place(place, branches, token)
            on_chain = place < min(len(self.tokens), len(self._found) - 1) and self.tokens[place] == token
            place = place + 1 if on_chain else len(self.tokens)
            found = [self._found[place]] if on_chain else [one for one in branches if one.token == token]
        self._count(taken, counts)

    def _note_place(self, place: int, branches: Sequence[Branch], token: int) -> None:
        if not branches:
            return
        calibration, bins = self._experience.evidence, [self._bin(place, branch) for branch in branches]
        expected = min(sum(calibration.rate(bin_) for bin_ in bins), 1.0)
        self._lookup_factor.note(expected, any(branch.token == token for branch in branches))
        for branch, bin_ in zip(branches, bins, strict=True):
            calibration.note(bin_, branch.token == token)

    def _count(self, taken: Sequence[int], counts: Counts) -> None:
        """Count the places that the row came to where something of the lookup was submitted."""
        tree, node = self.tree, ROOT
        guessed = tree.looked_up & self.submitted
        for token in taken:
            following = tree.children(node)
            node = next((child for child in following if tree.tokens[child] == token), ROOT)
            counts.guessed += not guessed.isdisjoint(following)
            counts.guessed_right += node in guessed
            if node == ROOT:
                return
