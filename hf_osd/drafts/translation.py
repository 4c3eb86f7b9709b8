"""
Between a target's tokens and those of a draft that has another tokenizer.

A token of the target is read as the draft's token of the same bytes, else as several that spell it. What the draft
proposes is limited to tokens that both have (token-level intersection, https://arxiv.org/abs/2502.05202), by a map of
their numbers that is made from their bytes. A token is read the same way wherever it stands, so a text that grows or
rolls back is never encoded again.

Not covered: proposals that join or split tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import UnsupportedModelError
from ..records import Observation
from .pieces import by_bytes, pieces_of, special_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Translation:
    """
    How a draft reads a target's tokens, and which of them it may propose.

    Attributes:
        targets (`torch.LongTensor` of shape `(shared,)`): Tokens of the target that the draft has, ascending.
        drafts (`torch.LongTensor` of shape `(shared,)`): The same tokens, as the draft numbers them.
        sizes (`tuple[int, int]`): Tokens that the target and the draft know, as models.
        begins (`tuple[int, ...]`): What the draft reads before every text; at least one token.
        leads (`frozenset[int]`): What stands for that where the target's tokenizer has put it before a text.
        spellings (`dict[bytes, int]`): The draft's tokens by what they stand for.
        texts (`dict[int, bytes]`): What tokens of the target stand for, where they have no run yet.
        runs (`dict[int, tuple[int, ...]]`): How tokens of the target are read, as far as it is known.
    """

    targets: torch.Tensor
    drafts: torch.Tensor
    sizes: tuple[int, int]
    begins: tuple[int, ...]
    leads: frozenset[int]
    spellings: dict[bytes, int]
    texts: dict[int, bytes]
    runs: dict[int, tuple[int, ...]]

    @classmethod
    def between(
        cls, target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, sizes: tuple[int, int]
    ) -> "Translation":
        """
        Compare two tokenizers, which takes a second or two.

        Args:
            target, draft (`PreTrainedTokenizerBase`): The tokenizers.
            sizes (`tuple[int, int]`): Tokens that the target and the draft know, as models.

        Raises:
            UnsupportedModelError: They have no token in common.
        """
        ours, theirs = (pieces_of(one, size) for one, size in zip((target, draft), sizes, strict=True))
        by_text, spellings = by_bytes(ours), by_bytes(theirs)
        pairs = {by_text[text]: spellings[text] for text in by_text.keys() & spellings.keys()}
        if not pairs:
            raise UnsupportedModelError(
                "the tokenizers of target and draft have no token in common: pick another draft",
                "draft: another tokenizer",
            )
        both = _marks(target, draft).items()
        marks = {token: own for token, own in both if token < sizes[0] and own < sizes[1]}
        proposed = {own: token for token, own in reversed(marks.items())}  # the first of several that are read alike
        pairs |= {token: own for own, token in proposed.items()}
        leads, silent = frozenset(target("")["input_ids"]), (target.pad_token_id, target.unk_token_id)
        names = {
            token: name.encode() for token, name in special_tokens(target).items() if token not in {*leads, *silent}
        }
        return cls(
            targets=torch.tensor(sorted(pairs)),
            drafts=torch.tensor([pairs[token] for token in sorted(pairs)]),
            sizes=sizes,
            begins=_begins(draft, sizes[1]),
            leads=leads,
            spellings=spellings,
            texts=names | {token: piece.text for token, piece in ours.items()},
            runs={token: (own,) for token, own in (marks | pairs).items()},
        )

    def run(self, token: int) -> tuple[int, ...]:
        """Return the draft's tokens for one of the target's, at least one: a mark for what is no text."""
        found = self.runs.get(token)
        if found is None:
            spelled = tuple(_spelled(self.texts.get(token, b""), self.spellings))
            found = self.runs[token] = spelled or self.begins[-1:]
        return found

    def first(self, token: int) -> tuple[int, ...]:
        """Return what the draft reads, behind `begins`, of the first token of a text."""
        return () if token in self.leads else self.run(token)

    def text(self, tokens: Sequence[int]) -> list[int]:
        """Return what the draft reads of a text of the target's tokens."""
        firsts = (self.first(token) for token in tokens[:1])
        return [*self.begins, *chain.from_iterable(firsts), *chain.from_iterable(map(self.run, tokens[1:]))]

    def observation(self, seen: Observation) -> Observation:
        """
        Return a recorded request as one of the draft's tokens, to be learned from.

        Of several tokens that spell one of the target, only the first has a teacher. Teachers' tokens that the draft
        cannot propose become one that it does not know, its vocabulary's size.
        """
        runs = [self.run(token) for token in seen.output_ids.tolist()]
        places = torch.tensor([place for place, run in enumerate(runs) for _ in run], dtype=torch.long)
        first = torch.tensor([not step for run in runs for step in range(len(run))], dtype=torch.bool)
        unknown = self.sizes[1]
        numbers = torch.full((self.sizes[0] + 1,), unknown).index_copy_(0, self.targets, self.drafts)
        drafted = seen.draft_ids[places]
        return replace(
            seen,
            prompt_ids=torch.tensor(self.text(seen.prompt_ids.tolist())),
            output_ids=torch.tensor(list(chain.from_iterable(runs)), dtype=torch.long),
            teacher_ids=numbers[seen.teacher_ids[places]].masked_fill(~first[:, None], unknown),
            teacher_log_probs=seen.teacher_log_probs[places],
            teacher_tail=seen.teacher_tail[places],
            draft_ids=numbers[drafted].where((drafted >= 0) & first, -1),
            accepted=seen.accepted[places] & first,
        )


def _marks(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> dict[int, int]:
    """Return special tokens that both have: the end of a text, and others by their names."""
    theirs = {name: token for token, name in special_tokens(draft).items()}
    end, own_end = target.eos_token_id, draft.eos_token_id
    ends = {} if end is None or own_end is None else {end: own_end}
    named = {token: theirs[name] for token, name in special_tokens(target).items() if name in theirs}
    return ends | named


def _begins(draft: PreTrainedTokenizerBase, size: int) -> tuple[int, ...]:
    """Return what a tokenizer puts before a text, else the mark of its beginning, or of its end."""
    marks = [token for token in (draft.bos_token_id, draft.eos_token_id, 0) if token is not None]
    return tuple(token for token in draft("")["input_ids"] or marks[:1] if token < size) or (0,)


def _spelled(text: bytes, spellings: dict[bytes, int]) -> Iterable[int]:
    """Yield the longest tokens that spell a text from its beginning on; bytes that none has are left out."""
    place = 0
    while place < len(text):
        ends = range(len(text), place, -1)
        end = next((end for end in ends if text[place:end] in spellings), None)
        if end is not None:
            yield spellings[text[place:end]]
        place = end or place + 1
