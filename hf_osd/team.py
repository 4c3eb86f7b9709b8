"""`Team`: the drafts that serve the rows of one batch, one for all of them or several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ._compat import is_compiled
from .drafts.features import FeatureDraft
from .errors import UnsupportedModelError
from .learning_draft import LearningDraft
from .records import Observation
from .serving.choice import choose_draft_decoder
from .serving.decoder import Decoder, context_length
from .serving.encoding import Encoded, draft_preparation
from .serving.engine import Engine
from .serving.experience import Experience
from .serving.grouped_decoder import Group, GroupedDecoder
from .serving.recording import Recorder
from .serving.sequences import Sequences
from .serving.states import TargetStates

MakeDecoder = Callable[[], Decoder]


class Team:
    """
    The drafts of one batch.

    Args:
        names (`Sequence[str]`): The route of each row.
        drafts (`Mapping[str, LearningDraft]`): The draft of each route.
        mixed (`Experience`): What batches of several drafts have measured.

    Attributes:
        names (`list[str]`): The route of each row.
        by_row (`list[LearningDraft]`): The draft of each row.
        groups (`dict[LearningDraft, list[int]]`): The rows of each draft.
        draft (`PreTrainedModel`): The one that speaks for all: that of the shortest context.
        translates (`bool`): Whether all of them read whatever the target does, by a translation.
        weights (`AbstractContextManager`): To hold during a forward of the drafts.
        experience (`Experience`): What such batches have measured.
    """

    def __init__(self, names: Sequence[str], drafts: Mapping[str, LearningDraft], mixed: Experience) -> None:
        self.names, self.by_row = list(names), [drafts[name] for name in names]
        self.groups: dict[LearningDraft, list[int]] = {}
        for row, one in enumerate(self.by_row):
            self.groups.setdefault(one, []).append(row)
        first, is_one = self.by_row[0], len(self.groups) == 1
        bound = [one.draft for one in self.groups if one.translation is None]
        self.translates = not bound
        self.draft: PreTrainedModel = min(bound or [first.draft], key=context_length)
        # Several drafts hold their own, each during its own forward.
        self.weights: AbstractContextManager[Any] = first.weights if is_one else nullcontext()
        self.experience = first.experience if is_one else mixed
        self.config = first.config

    def check_usable(self, target: PreTrainedModel) -> None:
        """Raise `UnsupportedModelError` where one of the drafts cannot draft for a target."""
        for one in self.groups:
            one.check_usable(target)

    def choose_decoder(
        self, target: PreTrainedModel, sequences: Sequences, encoded: Encoded
    ) -> tuple[MakeDecoder, TargetStates | None]:
        """
        Choose the decoder of the drafts, and what they read.

        Args:
            target (`PreTrainedModel`): The model that is served.
            sequences (`Sequences`): The batch.
            encoded (`Encoded`): What the target's encoder has read, and its outputs.

        Raises:
            UnsupportedModelError: One of them cannot decode this batch, or they read different states of the target.
        """
        prompts = sequences.ids[:, : sequences.prompt_length]
        states = self._states(target, sequences)
        vocabulary = self._vocabulary([*prompts.flatten().tolist(), *sequences.eos_token_ids])
        makes: list[tuple[list[int], MakeDecoder, LearningDraft]] = []
        for one, rows in self.groups.items():
            read = encoded if len(self.groups) == 1 else encoded.of_rows(rows)
            own, padding = prompts[rows], [sequences.padding[row] for row in rows]
            with one.weights:  # the trial reads them
                prepared = draft_preparation(one.draft, target, own, padding, read.inputs, read.given)
                trial = prepared, read.config, one.translation
                make = choose_draft_decoder(one.draft, own, padding, sequences.limit, *trial)
            if isinstance(one.draft, FeatureDraft):
                source = states if states is None or len(self.groups) == 1 else states.of_rows(rows)
                make = partial(make, source=source, vocabulary=vocabulary)
            makes.append((rows, make, one))
        if len(makes) == 1:
            return makes[0][1], states
        return partial(_grouped, makes, _vocab_size(target)), states

    def _states(self, target: PreTrainedModel, sequences: Sequences) -> TargetStates | None:
        layers = {one.draft.state_layers if isinstance(one.draft, FeatureDraft) else () for one in self.groups}
        if len(layers) > 1:
            raise UnsupportedModelError(
                "the drafts of one batch read different states of the target", "drafts of a batch read other states"
            )
        (read,) = layers
        if read and is_compiled(target):
            raise UnsupportedModelError(
                f"{type(target).__name__} is compiled, and may not show its states: leave it as it is, or use a draft "
                "that reads tokens alone",
                "target: compiled, its states cannot be read",
            )
        return TargetStates(target, read, sequences.padding, sequences.ids.shape[1]) if read else None

    def _vocabulary(self, besides: Sequence[int]) -> torch.Tensor | None:
        """Return the tokens that drafts which score a part of them score in this batch."""
        drafts = [one.draft for one in self.groups if isinstance(one.draft, FeatureDraft)]
        if len({id(draft.vocabulary) for draft in drafts}) == 1:  # that of one draft, or of its copies
            return drafts[0].vocabulary.tokens(besides)
        parts = {token for draft in drafts for token in draft.vocabulary.tokens(besides).tolist()}
        return torch.tensor(sorted(parts)) if parts else None

    @contextmanager
    def request(self, recorded: Sequence[bool], states: TargetStates | None) -> Iterator["Request"]:
        """
        Open one call of `generate`. On leaving it without an error, its observations go to the learners.

        Args:
            recorded (`Sequence[bool]`): By row, whether it is recorded.
            states (`TargetStates`, *optional*): Hidden states of the target, for drafts that read them.
        """
        request = Request(self, recorded, states)
        with self.by_row[0].learner.serving():  # for the learners of all drafts, which share their throttle
            yield request
        for one, observation in request.observations:
            one.observe(observation)


class Request:
    """
    One call of `generate`, which the drafts count and record.

    Attributes:
        recorder (`Recorder`, *optional*): Records rounds while serving; `None` where nothing is to be recorded.
        observations (`list[tuple[LearningDraft, Observation]]`): What drafts are to learn from, once it is finished.
    """

    def __init__(self, team: Team, recorded: Sequence[bool], states: TargetStates | None) -> None:
        self._team, self._recorded = team, recorded
        self._found: list[Observation] = []
        self.observations: list[tuple[LearningDraft, Observation]] = []
        self.recorder = (
            Recorder(team.config.top_k_teacher, recorded, self._found.append, states) if any(recorded) else None
        )

    def finish(self, engine: Engine, seconds: float) -> None:
        """Count the request, and make its observations."""
        for one, rows in self._team.groups.items():
            one.count(engine, rows, seconds)
        if self.recorder is not None:
            self.recorder.finish(engine.sequences)
            lengths = engine.sequences.lengths
            served = zip(self._team.by_row, self._recorded, lengths, strict=True)
            delivered = (one for one, is_recorded, length in served if is_recorded and length)
            self.observations = list(zip(delivered, self._found, strict=True))


def _grouped(makes: Sequence[tuple[list[int], MakeDecoder, LearningDraft]], vocab_size: int) -> GroupedDecoder:
    """Make the decoder of several drafts; one with a translation can be fed whatever the target can."""
    known = [vocab_size if one.translation is not None else _vocab_size(one.draft) for _, _, one in makes]
    groups = [Group(rows, make(), one.weights, count) for (rows, make, one), count in zip(makes, known, strict=True)]
    return GroupedDecoder(groups, vocab_size)


def _vocab_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)
