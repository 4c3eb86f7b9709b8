"""`LearningDraft`: one draft with its live weights, its learner, and what its requests have measured."""

import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ._compat import is_offloaded
from .config import OnlineConfig
from .drafts.compatibility import check_draft, check_pair, proposable
from .drafts.features import FeatureDraft
from .drafts.sharing import shared_with
from .drafts.translation import Translation
from .drafts.wrapping import unwrap
from .errors import InputError, LearningError, UnsupportedError, UnsupportedModelError
from .journal import Journal
from .learning.online import OnlineLearner
from .records import Observation
from .reporting import write_report
from .serving.engine import Engine
from .serving.experience import Experience
from .serving.lookup import RecentOutputs
from .serving.stopwatch import STAGES
from .serving.weights import LiveWeights, describe
from .stats import OnlineStats
from .tokenizing import Tokenizers

logger = logging.get_logger(__name__)


class LearningDraft:
    """
    One draft of an [`OnlineAssistant`], which serves and learns on its own.

    Args:
        route (`str`): Its name.
        given (`PreTrainedModel`): The draft, as the user passed it. Its weights are updated in place.
        target (`PreTrainedModel`): The model it drafts for. Never changed.
        config (`OnlineConfig`): Settings.
        tokenizers (`Tokenizers`): Of the target and of the drafts.
        beside (`LearningDraft`, *optional*): Another one of the same assistant. They share what has been measured of
            target and traffic, and learn one at a time.
        others (`Sequence[PreTrainedModel]`, *optional*): All other drafts of the assistant. What a draft shares with
            them, such as the base under adapters, is not trained.

    Attributes:
        given (`PreTrainedModel`): As passed.
        draft (`PreTrainedModel`): The model inside.
        config (`OnlineConfig`): As passed.
        frozen (`frozenset[str]`): Parameters that it shares with the target or with others, which are not trained.
        weights (`LiveWeights`): Guards the live weights.
        experience (`Experience`): What requests have measured.
        learner (`OnlineLearner`): Teaches it.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its own, where that is known.
        translation (`Translation`, *optional*): How it reads the target's tokens, where its tokenizer differs.

    Raises:
        UnsupportedModelError: See [`OnlineAssistant`].
    """

    def __init__(
        self,
        route: str,
        given: PreTrainedModel,
        target: PreTrainedModel,
        config: OnlineConfig,
        tokenizers: Tokenizers,
        beside: "LearningDraft | None" = None,
        others: Sequence[PreTrainedModel] = (),
    ) -> None:
        self.given, self.draft, self.config = given, unwrap(given), config
        check_draft(target, self.draft)
        if isinstance(self.draft, FeatureDraft) and (beside is None or self.draft.target is not target):
            self.draft.borrow(target)  # a fork has done so, and keeps the vocabulary of its parent
        self.experience: Experience = (
            Experience(outputs=RecentOutputs(config.recent_outputs))
            if beside is None
            else beside.experience.of_another_draft()
        )
        self._target = weakref.ref(target)  # a draft kept for a target must not keep the target alive
        self._lock = threading.Lock()
        self._totals: Counter[str] = Counter()
        self._misfit: tuple[str, str] | None = None  # message and cause
        self.tokenizer = tokenizers.of(route, self.draft, target)
        self.translation: Translation | None = None
        try:
            self.translation = tokenizers.translation(route, self.draft, target)
            check_pair(target, self.draft, self.translation)
        except UnsupportedError as error:
            self.leave_out(error)
        self._checked = weakref.WeakSet([target])  # targets that the draft was checked against
        self.frozen = shared_with(self.draft, target).union(*(shared_with(self.draft, one) for one in others))
        self.weights = LiveWeights(self.draft, self.frozen)
        learns = config.learn and self._misfit is None and self._can_learn()
        self.learner: OnlineLearner = OnlineLearner(
            self.draft,
            config if learns else replace(config, learn=False),
            self._publish,
            target=target if config.needs_target else None,
            frozen=self.frozen,
            proposed=proposable(target, self.translation),
            throttle=None if beside is None else beside.learner.throttle,
        )

    def reads_as(self, other: "LearningDraft") -> bool:
        """Whether another draft could learn from the requests kept for this one: it reads the same of them."""
        layers = [getattr(one.draft, "state_layers", ()) for one in (self, other)]
        return self is not other and self.translation is None and other.translation is None and layers[0] == layers[1]

    @property
    def has_begun(self) -> bool:
        """Whether it has seen requests to learn from, in this process or before, or never learns."""
        learner = self.learner.learner
        return learner is None or learner.requests > 0 or self.learner.has_state

    def _can_learn(self) -> bool:
        plain = all(type(weight) is torch.nn.Parameter for weight in self.draft.parameters())
        if plain and not is_offloaded(self.draft):
            return True
        why = "offloaded" if plain else "quantised, or of another kind that cannot be trained"
        logger.warning("The draft serves but does not learn: its weights are %s.", why)
        return False

    def leave_out(self, error: UnsupportedError) -> None:
        """
        Serve without this draft from now on, and say why.

        Raises:
            UnsupportedError: The error itself, with `OnlineConfig(unsupported="error")`.
        """
        if self.config.unsupported == "error":
            raise error
        logger.warning("%s. Until then the target decodes alone.", str(error))
        self._misfit = str(error), error.cause

    def check_usable(self, target: PreTrainedModel) -> None:
        """Raise `UnsupportedModelError` where the draft cannot draft for a target, whatever the request."""
        if self._misfit is not None:  # a new error each time: its traceback would keep the target alive
            raise UnsupportedModelError(*self._misfit)
        if target not in self._checked:  # another one, or the inner model of a PEFT model
            check_draft(target, self.draft)
            check_pair(target, self.draft, self.translation)
            if not shared_with(self.draft, target) <= self.frozen:
                raise InputError(
                    f"the draft shares weights with {describe(target)}, which learning would change: make an "
                    "OnlineAssistant for this target"
                )
            self._checked.add(target)

    def _publish(self, parameters: Mapping[str, torch.Tensor], acceptance: float) -> None:
        target = self._target()
        if target is not None and not shared_with(self.draft, target) <= self.frozen:
            raise LearningError(
                "the draft was given weights of the target after this assistant was made: make another"
            )
        del target
        self.weights.publish(parameters)
        self.experience.expect(acceptance)

    def observe(self, request: Observation) -> None:
        """Hand a request that this draft has served to its learner, in the draft's own tokens."""
        self.learner.observe(request if self.translation is None else self.translation.observation(request))

    def count(self, engine: Engine, rows: Sequence[int], seconds: float) -> None:
        """
        Count some rows of a batch that is done; times are shared out by generated tokens.

        Args:
            engine (`Engine`): What has decoded the batch.
            rows (`Sequence[int]`): Those that this draft has served.
            seconds (`float`): Of the whole batch.
        """
        lengths, stages = engine.sequences.lengths, engine.watch.totals
        counts = [engine.speculator.counts[row] for row in rows]
        share = sum(lengths[row] for row in rows) / max(sum(lengths), 1)
        accepted = sum(one.accepted for one in counts)
        counted = {
            "requests": len(rows),
            "generated_tokens": sum(lengths[row] for row in rows),
            "target_passes": sum(engine.passes[row] for row in rows),
            "proposed_tokens": sum(one.proposed for one in counts),
            "draft_tokens": sum(one.judged for one in counts),
            "accepted_tokens": accepted,
            "lookup_tokens": sum(one.guessed for one in counts),
            "accepted_lookup_tokens": sum(one.guessed_right for one in counts),
            "accepted_other_tokens": sum(one.others_right for one in counts),
            "submitted_tokens": sum(engine.submitted[row] for row in rows),
            "decode_seconds": share * seconds,
            **{f"{stage}_seconds": share * stages[stage] for stage in STAGES},
        }
        seconds_a_pass = stages["verify"] / max(sum(engine.passes), 1)
        counted["saved_seconds"] = accepted * self.journal.learned_share * seconds_a_pass
        with self._lock:
            self._totals.update(counted)
        self.learner.earn(share * seconds)
        if isinstance(self.draft, FeatureDraft):
            for row in rows:
                self.draft.vocabulary.note(engine.sequences.text(row)[1].tolist())

    def stats(self) -> OnlineStats:
        """Return the counters of this draft as they are now."""
        with self._lock:
            counted: dict[str, Any] = dict(self._totals)
        learned = self.learner.counters
        counted |= {"updates": learned.updates, "failed_updates": learned.failures}
        counted |= {"learned_steps": learned.steps, "learned_positions": learned.positions}
        return OnlineStats(**{**counted, "learn_seconds": learned.seconds})

    @property
    def journal(self) -> Journal:
        """What learning did: scored requests, updates and what went live, changes of the traffic."""
        return self.learner.journal

    def report(self, directory: str | Path, *, window: int = 50, plot: bool = True) -> list[Path]:
        """Write a report of this draft alone; see [`OnlineAssistant.report`]."""
        return write_report(self.journal, self.stats(), directory, window=window, plot=plot)

    def save(self, directory: Path, state: Path) -> None:
        """Write the draft as a plain checkpoint with its tokenizer, and the state of its learner, as of one moment."""
        with self.learner.at_rest():
            with self.weights:
                self.given.save_pretrained(directory)
            self.learner.save(state)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
