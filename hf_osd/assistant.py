"""`OnlineAssistant`: the drafts of one target, which learn while they serve. It joins serving and learning."""

import json
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ._compat import execution_device
from .config import OnlineConfig
from .drafts.adapters import by_adapter, carries_adapter
from .drafts.compatibility import check_target, made_draft
from .drafts.wrapping import unwrap
from .errors import ClosedError, InputError, UnsupportedError, check_kind
from .journal import Journal
from .learning.online import OnlineLearner
from .reporting import write_report
from .route_folders import folder_of, saved_routes
from .routes import Routes, check_names
from .routing.router import ByKey, Router
from .saving import load_draft, saved_config, saved_settings
from .serving.experience import Experience
from .serving.weights import LiveWeights
from .stats import OnlineStats
from .storage import Snapshot
from .storage.files import make_private, write_file
from .storage.identity import STATE_FOLDER
from .storage.places import REPLAY, SNAPSHOTS
from .team import Team
from .tokenizing import GivenTokenizers, load_tokenizer, saved_tokenizers, tokenizer_of_target

logger = logging.get_logger(__name__)

_DEFAULT = "default"  # route of the one draft that further ones begin from


class OnlineAssistant:
    """
    One draft, or several, that learn from the requests they help to serve.

    Holds the live drafts, each with its replay buffer and its trainer. Hand it to [`~hf_osd.generate`]; one assistant
    may serve concurrent calls from several threads.

    Args:
        draft (`PreTrainedModel` or `"auto"`, *optional*):
            The draft. Its weights are updated in place. `"auto"` makes a [`~hf_osd.drafts.features.FeatureDraft`] of
            the target's last layer, in seconds; it begins without knowledge, and until it has learned, the lookup in
            the text serves.
        target (`PreTrainedModel`):
            The model it drafts for. Never changed.
        config (`OnlineConfig`, *optional*):
            Settings; defaults to what the draft recommends, [`OnlineConfig.for_draft`].
        drafts (`Mapping[str, PreTrainedModel]` or `peft.PeftModel`, *optional*):
            In place of `draft`: drafts by route, or a model whose adapters are the routes. See `docs/routing.md`.
        router (`Router`, *optional*):
            Chooses the route of each prompt that comes without `osd_route`; see [`~hf_osd.routing`]. Defaults to the
            first of `drafts`. With `draft`, that one is the first route.
        max_routes (`int`, defaults to 8):
            Drafts at most. A new route begins with a copy of the nearest draft; with no room, that one serves it.
        tokenizer (`PreTrainedTokenizerBase` or `Mapping[str, PreTrainedTokenizerBase]`, *optional*):
            That of the draft, or of the drafts by route, which [`save_pretrained`] saves beside it. Needed only for a
            draft with another tokenizer than the target's.
        target_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            That of the target, likewise. Where the two vocabularies differ in size, tokenizers that are not given are
            loaded from where the models came from.

    Attributes:
        routes (`Mapping[str, LearningDraft]`): The drafts by route, each with `stats()`, `journal` and `report()`.
        config (`OnlineConfig`): Settings.

    Raises:
        InputError: Neither a draft nor several, or no target; or another argument is not of its kind.
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
        draft: PreTrainedModel | str | None = None,
        target: PreTrainedModel | None = None,
        config: OnlineConfig | None = None,
        *,
        drafts: Mapping[str, PreTrainedModel | str] | PreTrainedModel | None = None,
        router: Router | None = None,
        max_routes: int = 8,
        tokenizer: GivenTokenizers = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if (draft is None) == (drafts is None) or target is None:
            raise InputError("an OnlineAssistant needs a target, and either draft or drafts")
        check_target(target)
        check_kind("config", config, OnlineConfig)
        check_kind("router", router, Router)
        for one in tokenizer.values() if isinstance(tokenizer, Mapping) else (tokenizer,):
            check_kind("tokenizer", one, PreTrainedTokenizerBase)
        check_kind("target_tokenizer", target_tokenizer, PreTrainedTokenizerBase)
        given = _given({_DEFAULT: draft} if drafts is None else drafts, target)
        if not isinstance(max_routes, int) or max_routes < len(given):
            raise InputError(f"max_routes must be at least the number of drafts, {len(given)}, got {max_routes!r}")
        self.config = config or OnlineConfig.for_draft(unwrap(next(iter(given.values()))))
        self._target = weakref.ref(target)  # an assistant kept for a target must not keep the target alive
        self._lock = threading.Lock()
        self._random = Random(self.config.seed)
        self._undrafted = 0  # prompts that were served without the draft and without speculation
        self._reasons: Counter[str] = Counter()
        self._closed = False
        router = ByKey() if router is None and drafts is not None else router
        self.routes = Routes(given, target, self.config, router, max_routes, tokenizer, target_tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        draft: str | Path,
        target: PreTrainedModel,
        config: OnlineConfig | None = None,
        *,
        router: Router | None = None,
        max_routes: int = 8,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> "OnlineAssistant":
        """
        Load a draft from the Hub or a folder, together with what it learned if [`save_pretrained`] wrote it.

        Args:
            draft (`str` or `Path`): Hub id or local folder, which may hold the drafts of several routes.
            target (`PreTrainedModel`): The model it drafts for.
            config (`OnlineConfig`, *optional*): Settings; defaults to the saved ones, else to those of the draft.
            router (`Router`, *optional*): As for the class; it goes on with what a saved one of its kind knew.
            max_routes (`int`, defaults to 8): As for the class.
            target_tokenizer (`PreTrainedTokenizerBase`, *optional*): Defaults to that of where the target came from,
                or else to what [`save_pretrained`] has kept.
            kwargs: For `from_pretrained` of the draft's Auto class: `AutoModelForCausalLM`, or where target and draft
                have encoders, `AutoModelForSeq2SeqLM` or `AutoModelForSpeechSeq2Seq`. `dtype` and `device_map` default
                to the target's.

        Raises:
            InputError: The folder holds the drafts of another router, and none is given.
            UnsupportedModelError: See the class.
        """
        state = Path(draft) / STATE_FOLDER
        saved = saved_routes(state)
        if saved is not None and router is None and saved.numbers["kind"] != ByKey.__name__:
            raise InputError(f"{draft} holds the drafts of a {saved.numbers['kind']}: pass a router")
        kwargs.setdefault("dtype", target.dtype)
        kwargs.setdefault("device_map", execution_device(target))  # not the meta device of an offloaded one
        names = [] if saved is None else saved.numbers["routes"]
        sources: dict[str, str | Path] = {name: Path(draft) / folder_of(name) for name in names} or {_DEFAULT: draft}
        loaded = {name: load_draft(one, target, **kwargs) for name, one in sources.items()}
        assistant = cls(
            loaded[_DEFAULT] if saved is None else None,
            target,
            saved_settings(state) if config is None else config,
            drafts=None if saved is None else loaded,
            router=router,
            max_routes=max_routes if saved is None else max(max_routes, len(loaded)),
            tokenizer=load_tokenizer(str(draft)) if saved is None else saved_tokenizers(sources),
            target_tokenizer=target_tokenizer or tokenizer_of_target(target, state),
        )
        assistant._go_on({name: Path(one) / STATE_FOLDER for name, one in sources.items()}, saved)
        return assistant

    def _go_on(self, states: Mapping[str, Path], saved: Snapshot | None) -> None:
        """Go on from the states that lie beside loaded drafts, and from what was saved of the router."""
        try:
            for name, state in states.items():
                is_saved = any((state / place).is_dir() for place in (REPLAY, SNAPSHOTS))
                if is_saved and not self.routes[name].has_begun:  # a state directory is newer
                    self.routes[name].learner.load(state)
            if saved is not None:
                self.routes.load_router(saved)
        except BaseException:
            self.close()
            raise

    # Of several drafts, the first.

    @property
    def draft(self) -> PreTrainedModel:
        """The draft."""
        return self.routes.first.draft

    @property
    def weights(self) -> LiveWeights:
        """What guards its live weights."""
        return self.routes.first.weights

    @property
    def experience(self) -> Experience:
        """What its requests have measured."""
        return self.routes.first.experience

    @property
    def _learner(self) -> OnlineLearner:
        return self.routes.first.learner

    @property
    def journal(self) -> Journal:
        """
        What its learning did: scored requests, updates and what went live, changes of the traffic.

        Raises:
            InputError: There are routes, each with a journal of its own.
        """
        if self.routes.router is not None:
            raise InputError("each route has a journal of its own: assistant.routes[NAME].journal")
        return self.routes.first.journal

    # Serving.

    @property
    def target(self) -> PreTrainedModel | None:
        """The target, or `None` once nobody else uses it."""
        return self._target()

    def check_open(self) -> None:
        """Raise `ClosedError` after [`close`]."""
        if self._closed:
            raise ClosedError("this OnlineAssistant is closed: make a new one")

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
            if without == "speculation":  # the drafts count all others
                self._undrafted += rows
        if first:
            why = str(error)  # a handler that keeps the record must not keep the request alive
            logger.warning("Served without %s, and so will be others for the same reason: %s.", without, why)

    def chosen_rows(self, team: Team, may: Sequence[bool]) -> list[bool]:
        """Choose the rows of a batch that are recorded: a part of those that may be, whose draft has time to learn."""
        takes = [is_known and one.learner.takes_requests for one, is_known in zip(team.by_row, may, strict=True)]
        fractions = [self.config.record_fraction if taken else 0.0 for taken in takes]
        with self._lock:
            return [self._random.random() < fraction for fraction in fractions]

    def stats(self) -> OnlineStats:
        """Return the counters as they are now."""
        with self._lock:
            reasons = {reason: count for reason, count in self._reasons.items() if count}
            undrafted = self._undrafted
        routes = {name: self.routes[name].stats() for name in self.routes}
        total = sum(routes.values(), OnlineStats(requests=undrafted))
        return replace(
            total,
            fallbacks=sum(reasons.values()),
            fallback_reasons=reasons,
            routes={} if self.routes.router is None else routes,
        )

    def report(self, directory: str | Path, *, window: int = 50, plot: bool = True) -> list[Path]:
        """
        Write `report.json` and `report.png`: acceptance by request, updates, what went live, learning rate and
        changes of the traffic. No prompts and no tokens; see [`~hf_osd.reporting.write_report`].

        Args:
            directory (`str` or `Path`): Folder to write; made if missing. With routes, each has a folder in there.
            window (`int`, defaults to 50): Requests of the moving average.
            plot (`bool`, defaults to `True`): Whether to draw the PNG, which needs matplotlib.

        Returns:
            `list[Path]`: The files.
        """
        options: dict[str, Any] = {"window": window, "plot": plot}
        if self.routes.router is None:
            return write_report(self.journal, self.stats(), directory, **options)
        folders = {name: Path(directory) / folder_of(name) for name in self.routes}
        return [path for name, folder in folders.items() for path in self.routes[name].report(folder, **options)]

    def update(self) -> None:
        """
        Learn from what is recorded, now, whatever `update_every` says, in this thread. The result goes live if what
        was learned so far leads. Of several drafts, those learn for which anything is recorded.

        Raises:
            LearningError: Nothing is recorded yet, or the update failed; the live draft is as before.
            ClosedError: The assistant is closed.
        """
        self.check_open()
        ready = [one.learner for one in self.routes.values() if one.learner.has_state]
        for learner in ready or [self.routes.first.learner]:
            learner.update()

    def save_pretrained(self, directory: str | Path) -> None:
        """
        Save the draft as a plain transformers checkpoint, its tokenizer where that is known, and what is needed to go
        on learning beside it. With routes, each has a folder of that kind.

        The state holds the replay buffer, and so the token ids of recorded prompts.

        Args:
            directory (`str` or `Path`): Folder to write; made if missing.
        """
        directory = Path(directory)
        state = directory / STATE_FOLDER
        make_private(state)
        self.routes.save(directory, state)
        self.routes.tokenizers.save(state)
        write_file(state / "config.json", json.dumps(saved_config(self.config), indent=2).encode() + b"\n")

    def close(self) -> None:
        """Stop learning. The draft stays as it is. Closing twice is fine."""
        self._closed = True
        self.routes.close()

    def __enter__(self) -> "OnlineAssistant":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _given(drafts: Any, target: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Return drafts by route: those of a mapping, or one for each adapter of a model."""
    if not isinstance(drafts, Mapping):
        if not carries_adapter(drafts):
            raise InputError(f"drafts must be a mapping or a model with adapters, got {type(drafts).__name__}")
        drafts = by_adapter(drafts)
    check_names(drafts)
    return {name: made_draft(one, target) if isinstance(one, str) else one for name, one in drafts.items()}
