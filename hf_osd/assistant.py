"""`OnlineAssistant`: a draft with its replay buffer and its trainer. Only this module joins serving and learning."""

import json
import random
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ._compat import execution_device, is_offloaded
from .config import OnlineConfig
from .drafts.compatibility import check_draft, check_pair, check_target, made_draft, proposable
from .drafts.features import FeatureDraft
from .drafts.sharing import shared_with
from .drafts.translation import Translation
from .drafts.wrapping import unwrap
from .errors import ClosedError, InputError, LearningError, UnsupportedError, UnsupportedModelError
from .journal import Journal
from .learning.online import OnlineLearner
from .records import Observation
from .reporting import write_report
from .saving import load_config, load_draft, load_tokenizer, saved_config, translation_of
from .serving.engine import Engine
from .serving.experience import Experience
from .serving.recording import Recorder
from .serving.states import TargetStates
from .serving.stopwatch import STAGES
from .serving.weights import LiveWeights, describe
from .stats import OnlineStats
from .storage.files import write_file
from .storage.identity import STATE_FOLDER

logger = logging.get_logger(__name__)


class Request:
    """
    One call of `generate`, which the assistant counts and records.

    Attributes:
        recorder (`Recorder`, *optional*): Records rounds while serving; `None` where nothing is to be recorded.
    """

    def __init__(self, assistant: "OnlineAssistant", recorded_rows: list[bool], states: TargetStates | None) -> None:
        self._assistant = assistant
        self.observations: list[Observation] = []
        self.recorder = (
            Recorder(assistant.config.top_k_teacher, recorded_rows, self.observations.append, states)
            if any(recorded_rows)
            else None
        )

    def finish(self, engine: Engine, seconds: float) -> None:
        """Count the request, and make its observations."""
        self._assistant._count(engine, seconds)
        self._assistant._note_tokens(engine)
        if self.recorder is not None:
            self.recorder.finish(engine.sequences)


class OnlineAssistant:
    """
    A draft model that learns from the requests it helps to serve.

    Holds the live draft, the replay buffer and the trainer. Hand it to [`~hf_osd.generate`]; one assistant may serve
    concurrent calls from several threads.

    Args:
        draft (`PreTrainedModel` or `"auto"`):
            The draft. Its weights are updated in place. `"auto"` makes a [`~hf_osd.drafts.features.FeatureDraft`] of
            the target's last layer, in seconds; it begins without knowledge, and until it has learned, the lookup in
            the text serves.
        target (`PreTrainedModel`):
            The model it drafts for. Never changed.
        config (`OnlineConfig`, *optional*):
            Settings; defaults to what the draft recommends, [`OnlineConfig.for_draft`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            That of the draft, which [`save_pretrained`] saves beside it. Needed only for a draft with another
            tokenizer than the target's.
        target_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            That of the target, likewise. Where the two vocabularies differ in size, tokenizers that are not given are
            loaded from where the models came from.

    Raises:
        UnsupportedModelError: The draft is nothing that generates, has no weights, or is the target itself; or
            `"auto"` cannot make one of this target. With `OnlineConfig(unsupported="error")` also where it cannot work
            for the target: a vocabulary of another size without tokenizers, a state that cannot be restored, an
            encoder. By default such a draft is left out, with a warning, and requests are served by the target's own
            decoding.

    Example:

    ```python
    >>> with OnlineAssistant(draft, target) as assistant:
    ...     output = hf_osd.generate(target, **inputs, online_assistant=assistant, max_new_tokens=64)
    ...     print(assistant.stats().acceptance_rate)
    ```
    """

    def __init__(
        self,
        draft: PreTrainedModel | str,
        target: PreTrainedModel,
        config: OnlineConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_target(target)
        self._given = given = made_draft(draft, target) if isinstance(draft, str) else draft
        self.draft = draft = unwrap(given)
        check_draft(target, draft)
        self.config = config or OnlineConfig.for_draft(draft)
        if isinstance(draft, FeatureDraft):
            draft.borrow(target)
        self.tokenizer = tokenizer
        self.experience = Experience()
        self._target = weakref.ref(target)  # an assistant kept for a target must not keep the target alive
        self._lock = threading.Lock()
        self._random = random.Random(self.config.seed)
        self._totals: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._closed = False
        self._misfit: tuple[str, str] | None = None  # message and cause
        self.translation: Translation | None = None
        try:
            self.translation = translation_of(target, draft, target_tokenizer, tokenizer)
            check_pair(target, draft, self.translation)
        except UnsupportedError as error:
            self._leave_out(error)
        self._checked = weakref.WeakSet([target])  # targets that the draft was checked against
        self._frozen = shared_with(draft, target)
        self.weights = LiveWeights(draft, self._frozen)
        learns = self.config.learn and self._misfit is None and self._can_learn()
        self._learner = OnlineLearner(
            draft,
            self.config if learns else replace(self.config, learn=False),
            self._publish,
            target=target if self.config.needs_target else None,
            frozen=self._frozen,
            proposed=proposable(target, self.translation),
        )

    def _can_learn(self) -> bool:
        plain = all(type(weight) is torch.nn.Parameter for weight in self.draft.parameters())
        if plain and not is_offloaded(self.draft):
            return True
        why = "offloaded" if plain else "quantised, or of another kind that cannot be trained"
        logger.warning("The draft serves but does not learn: its weights are %s.", why)
        return False

    def _leave_out(self, error: UnsupportedError) -> None:
        if self.config.unsupported == "error":
            raise error
        logger.warning("%s. Until then the target decodes alone.", str(error))
        self._misfit = str(error), error.cause

    @classmethod
    def from_pretrained(
        cls,
        draft: str | Path,
        target: PreTrainedModel,
        config: OnlineConfig | None = None,
        *,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> "OnlineAssistant":
        """
        Load a draft from the Hub or a folder, together with what it learned if [`save_pretrained`] wrote it.

        Args:
            draft (`str` or `Path`): Hub id or local folder.
            target (`PreTrainedModel`): The model it drafts for.
            config (`OnlineConfig`, *optional*): Settings; defaults to the saved ones, else to those of the draft.
            target_tokenizer (`PreTrainedTokenizerBase`, *optional*): Defaults to that of where the target came from.
            kwargs: For `AutoModelForCausalLM.from_pretrained`, or `AutoModelForSeq2SeqLM` where the target has an
                encoder and the draft reads text by one; `dtype` and `device_map` default to the target's.

        Raises:
            UnsupportedModelError: See the class.
        """
        kwargs.setdefault("dtype", target.dtype)
        kwargs.setdefault("device_map", execution_device(target))  # not the meta device of an offloaded one
        model = load_draft(draft, has_encoder=target.config.is_encoder_decoder, **kwargs)
        tokenizer = load_tokenizer(str(draft))
        state = Path(draft) / STATE_FOLDER
        if config is None and (state / "config.json").is_file():
            config = load_config(state / "config.json")
        target_tokenizer = target_tokenizer or load_tokenizer(target.config._name_or_path)
        assistant = cls(model, target, config, tokenizer=tokenizer, target_tokenizer=target_tokenizer)
        try:
            if state.is_dir() and not assistant._learner.has_state:  # a state directory is newer
                assistant._learner.load(state)
        except BaseException:
            assistant.close()
            raise
        return assistant

    @property
    def target(self) -> PreTrainedModel | None:
        """The target, or `None` once nobody else uses it."""
        return self._target()

    def check_open(self) -> None:
        """Raise `ClosedError` after [`close`]."""
        if self._closed:
            raise ClosedError("this OnlineAssistant is closed: make a new one")

    def check_usable(self, target: PreTrainedModel) -> None:
        """Raise `UnsupportedModelError` where the draft cannot draft for a target, whatever the request."""
        if self._misfit is not None:  # a new error each time: its traceback would keep the target alive
            raise UnsupportedModelError(*self._misfit)
        if target not in self._checked:  # another one, or the inner model of a PEFT model
            check_draft(target, self.draft)
            check_pair(target, self.draft, self.translation)
            if not shared_with(self.draft, target) <= self._frozen:
                raise InputError(
                    f"the draft shares weights with {describe(target)}, which learning would change: make an "
                    "OnlineAssistant for this target"
                )
            self._checked.add(target)

    def fall_back(self, error: UnsupportedError, rows: int, *, without: str = "speculation") -> None:
        """
        Count prompts that are served without the draft or without speculation, and say why, once for each reason.

        Args:
            error (`UnsupportedError`): What is in the way.
            rows (`int`): Prompts.
            without (`str`, defaults to `"speculation"`): What they are served without. `"the draft"` leaves the
                lookup.

        Raises:
            UnsupportedError: The error itself, with `OnlineConfig(unsupported="error")`.
        """
        if self.config.unsupported == "error":
            raise error
        with self._lock:
            first = not self._reasons[error.cause]
            self._reasons[error.cause] += rows
            if without == "speculation":  # the engine counts all others
                self._totals["requests"] += rows
        if first:
            why = str(error)  # a handler that keeps the record must not keep the request alive
            logger.warning("Served without %s, and so will be others for the same reason: %s.", without, why)

    @contextmanager
    def request(self, rows: int, records: bool = True, states: TargetStates | None = None) -> Iterator[Request]:
        """
        Open one call of `generate`. On leaving it without an error, its observations go to the learner.

        Args:
            rows (`int`): Prompts in the batch.
            records (`bool`, defaults to `True`): Whether the request may be learned from.
            states (`TargetStates`, *optional*): Hidden states of the target, for a draft that reads them.

        Raises:
            ClosedError: The assistant is closed.
        """
        self.check_open()
        request = Request(self, self._choose_rows(rows) if records else [False] * rows, states)
        with self._learner.serving():
            yield request
        seen = request.observations
        for observation in seen if self.translation is None else map(self.translation.observation, seen):
            self._learner.observe(observation)

    def _publish(self, parameters: Mapping[str, torch.Tensor], acceptance: float) -> None:
        target = self.target
        if target is not None and not shared_with(self.draft, target) <= self._frozen:
            raise LearningError(
                "the draft was given weights of the target after this assistant was made: make another"
            )
        del target
        self.weights.publish(parameters)
        self.experience.expect(acceptance)

    def _choose_rows(self, rows: int) -> list[bool]:
        fraction = self.config.record_fraction if self._learner.takes_requests else 0.0
        with self._lock:
            return [self._random.random() < fraction for _ in range(rows)]

    def _count(self, engine: Engine, seconds: float) -> None:
        counts, stages = engine.speculator.counts, engine.watch.totals
        counted = {
            "requests": engine.sequences.batch,
            "generated_tokens": sum(engine.sequences.lengths),
            "target_passes": engine.target_passes,
            "proposed_tokens": counts.proposed,
            "draft_tokens": counts.judged,
            "accepted_tokens": counts.accepted,
            "lookup_tokens": counts.guessed,
            "accepted_lookup_tokens": counts.guessed_right,
            "accepted_other_tokens": counts.others_right,
            "submitted_tokens": engine.submitted,
            "decode_seconds": seconds,
            **{f"{stage}_seconds": stages[stage] for stage in STAGES},
        }
        seconds_a_pass = stages["verify"] / max(engine.target_passes, 1)
        counted["saved_seconds"] = counts.accepted * self.journal.learned_share * seconds_a_pass
        with self._lock:
            self._totals.update(counted)

    def _note_tokens(self, engine: Engine) -> None:
        if isinstance(self.draft, FeatureDraft):
            for row in range(engine.sequences.batch):
                self.draft.vocabulary.note(engine.sequences.text(row)[1].tolist())

    def stats(self) -> OnlineStats:
        """Return the counters as they are now."""
        with self._lock:
            counted: dict[str, Any] = dict(self._totals)
            reasons = {reason: count for reason, count in self._reasons.items() if count}
        counted |= {"fallbacks": sum(reasons.values()), "fallback_reasons": reasons}
        learned = self._learner.counters
        counted |= {"updates": learned.updates, "failed_updates": learned.failures}
        counted |= {"learned_steps": learned.steps, "learned_positions": learned.positions}
        return OnlineStats(**{**counted, "learn_seconds": learned.seconds})

    @property
    def journal(self) -> Journal:
        """What learning did: scored requests, updates and what went live, changes of the traffic."""
        return self._learner.journal

    def report(self, directory: str | Path, *, window: int = 50, plot: bool = True) -> list[Path]:
        """
        Write `report.json` and `report.png`: acceptance by request, updates, what went live, learning rate and
        changes of the traffic. No prompts and no tokens; see [`~hf_osd.reporting.write_report`].

        Args:
            directory (`str` or `Path`): Folder to write; made if missing.
            window (`int`, defaults to 50): Requests of the moving average.
            plot (`bool`, defaults to `True`): Whether to draw the PNG, which needs matplotlib.

        Returns:
            `list[Path]`: The files.
        """
        return write_report(self.journal, self.stats(), directory, window=window, plot=plot)

    def update(self) -> None:
        """
        Learn from what is recorded, now, whatever `update_every` says, in this thread. The result goes live if what
        was learned so far leads.

        Raises:
            LearningError: Nothing is recorded yet, or the update failed; the live draft is as before.
            ClosedError: The assistant is closed.
        """
        self.check_open()
        self._learner.update()

    def save_pretrained(self, directory: str | Path) -> None:
        """
        Save the draft as a plain transformers checkpoint, and what is needed to go on learning beside it.

        The state holds the replay buffer, and so the token ids of recorded prompts.

        Args:
            directory (`str` or `Path`): Folder to write; made if missing.
        """
        directory = Path(directory)
        state = directory / STATE_FOLDER
        with self._learner.at_rest():
            with self.weights:
                self._given.save_pretrained(directory)
            self._learner.save(state)
        write_file(state / "config.json", json.dumps(saved_config(self.config), indent=2).encode() + b"\n")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    def close(self) -> None:
        """Stop learning. The draft stays as it is. Closing twice is fine."""
        self._closed = True
        self._learner.close()

    def __enter__(self) -> "OnlineAssistant":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
