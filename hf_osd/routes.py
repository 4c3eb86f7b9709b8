"""`Routes`: the drafts of an assistant by route, which of them serves a prompt, and how they are kept."""

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .config import OnlineConfig
from .drafts.adapters import base_of
from .drafts.sharing import copy_beside
from .drafts.wrapping import is_peft, unwrap
from .errors import InputError, LearningError
from .learning.online import OnlineLearner
from .learning.resuming import resume, snapshot_of
from .learning_draft import LearningDraft
from .records import Observation
from .route_folders import ROUTER, check_directory, folder_of, save_routes
from .routing.prompt import Prompt
from .routing.router import Router, route_of
from .serving.experience import Experience
from .serving.sequences import Sequences
from .storage import Snapshot, StateDirectory
from .team import Team
from .tokenizing import GivenTokenizers, Tokenizers

logger = logging.get_logger(__name__)


class Routes(Mapping[str, LearningDraft]):
    """
    The drafts by route, in the order in which they came. Routes are added as requests ask for them.

    Args:
        drafts (`Mapping[str, PreTrainedModel]`): Those to begin with.
        target (`PreTrainedModel`): The model they draft for.
        config (`OnlineConfig`): Settings of all; with `state_dir`, each route has a folder of its own in there.
        router (`Router`, *optional*): Chooses among them; `None` for one draft that serves everything.
        most (`int`): Drafts at most.
        tokenizer, target_tokenizer (*optional*): Of the drafts and of the target; see [`OnlineAssistant`].

    Attributes:
        first (`LearningDraft`): The first one.
        router (`Router`, *optional*): As given.
        tokenizers (`Tokenizers`): Of the target and of the drafts.

    Raises:
        LearningError: The state directory is of other drafts, or of a router that lacks something in it.
        StateError: It is that of a single draft, and there is a router, or the other way round; or it cannot be used.
    """

    def __init__(
        self,
        drafts: Mapping[str, PreTrainedModel],
        target: PreTrainedModel,
        config: OnlineConfig,
        router: Router | None,
        most: int,
        tokenizer: GivenTokenizers = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.router, self._config, self._most = router, config, most
        self._target = weakref.ref(target)
        self._lock = threading.Lock()
        self._drafts: dict[str, LearningDraft] = {}
        self._likes: dict[str, str] = {}  # which route each that was not given began from
        self._mixed = Experience()
        self._heard = self._kept = 0  # what the router was told of, and how much of it the disk knows
        self._disk: StateDirectory | None = None
        self._knows_router = False  # from the state directory
        inside = {name: unwrap(given) for name, given in drafts.items()}
        self.tokenizers = Tokenizers(target, inside, target_tokenizer, tokenizer)
        if config.learn and config.state_dir is not None:
            check_directory(Path(config.state_dir), None if router is None else next(iter(drafts)))
        try:
            for name, given in drafts.items():
                self._add(name, given, target, [model for other, model in inside.items() if other != name])
            if router is not None and config.state_dir is not None:
                self._go_on(Path(config.state_dir))
        except BaseException:  # which keeps what it has seen alive, and so the directories of these drafts
            self.close()
            raise
        self.first = next(iter(self._drafts.values()))
        self._mixed = self.first.experience.of_another_draft()

    def __getitem__(self, name: str) -> LearningDraft:
        return self._drafts[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._drafts])  # another thread may add one

    def __len__(self) -> int:
        return len(self._drafts)

    def _add(self, name: str, given: Any, target: PreTrainedModel, others: Sequence[PreTrainedModel]) -> None:
        config, beside = self._config, next(iter(self._drafts.values()), None)
        if self.router is not None and config.state_dir is not None:
            config = replace(config, state_dir=Path(config.state_dir) / folder_of(name))
        self._drafts[name] = LearningDraft(name, given, target, config, self.tokenizers, beside, others)

    # Which draft serves a prompt.

    def team(self, target: PreTrainedModel, sequences: Sequences, keys: Sequence[str] | None) -> Team:
        """
        Return the drafts that serve a batch.

        Args:
            target (`PreTrainedModel`): The model that is served.
            sequences (`Sequences`): The batch.
            keys (`Sequence[str]`, *optional*): The routes that the caller asks for, by row.

        Raises:
            InputError: There are keys, and no routes.
        """
        if self.router is None:
            if keys is not None:
                raise InputError(
                    f"osd_route={keys[0]!r} names a route, and this assistant has none: make it with drafts={{...}}, "
                    "or with a router"
                )
            return Team(["" for _ in range(sequences.batch)], {"": self.first}, self._mixed)
        names = []
        with self._lock:
            for row in range(sequences.batch):
                read = sequences.text(row)[0] if sequences.sources is None else sequences.sources[row]
                prompt = Prompt(read, target)
                names.append(self.route(prompt, None if keys is None else keys[row]))
        return Team(names, self, self._mixed)

    def route(self, prompt: Prompt, key: str | None = None) -> str:
        """Return the route of a prompt, which has a draft from now on. Not thread-safe."""
        assert self.router is not None
        self._heard += 1
        name, like = route_of(self.router, prompt, key, list(self._drafts), self._most)
        if like is None:
            return name
        try:
            self._begin(name, like)
        except Exception as error:  # such as no memory: the request must not fail for that
            self._most = len(self._drafts)
            logger.warning("No further draft can be made; routes have to do with these.", exc_info=error)
            return like
        return name

    def note(self, names: Sequence[str], outcomes: Sequence[tuple[int, int]]) -> None:
        """Tell the router, for each row of a batch, how many tokens were accepted, and how many judged."""
        if self.router is not None:
            with self._lock:
                self._heard += len(names)
                for name, (accepted, judged) in zip(names, outcomes, strict=True):
                    self.router.note(name, accepted, judged)

    def _begin(self, name: str, nearest: str) -> None:
        """Make a draft for a new route: a fork of another one, with all that it has learned."""
        target, like = self._target(), self._like(name, nearest)
        if target is None:
            raise LearningError(f"route {name!r} cannot begin: the target is gone")
        parent = self._drafts[like]
        self.tokenizers.fork(name, like)
        self._add(name, _copy_of(parent), target, [one.draft for one in self._drafts.values()])
        try:
            self._take_over(name, like, target)
        except BaseException:
            self._drafts.pop(name).learner.close()
            raise
        self._likes.setdefault(name, like)
        logger.info("Route %r has a draft of its own from now on, which began as that of %r.", name, like)

    def _like(self, name: str, nearest: str) -> str:
        """Return the route whose draft a new one begins from: as before, where the state directory knows of it."""
        like = self._likes.get(name, nearest)
        while like not in self._drafts:
            if like not in self._likes:
                raise LearningError(f"route {name!r} cannot begin from {like!r}, which is not there")
            like = self._likes[like]
        return like

    def _take_over(self, name: str, like: str, target: PreTrainedModel) -> None:
        """Begin with all that another draft has learned, and with those requests kept so far that are of the route."""
        online, parent = self._drafts[name].learner, self._drafts[like].learner
        if online.learner is None or parent.learner is None or self._drafts[name].has_begun:
            return  # nothing learns, or the disk knows more
        with parent.at_rest():
            resume(online.learner, snapshot_of(parent.learner), self._requests_of(name, target))
        online.learner.branch_off()
        online.keep_requests()

    def _requests_of(self, name: str, target: PreTrainedModel) -> list[Observation]:
        """Take the requests of a new route out of the replay buffers of the others."""
        assert self.router is not None
        routes, found = list(self._drafts), []
        for learner in (one.learner.learner for one in self._drafts.values() if one.reads_as(self._drafts[name])):
            if learner is not None:
                requests = learner.replay.observations()
                read = (one.prompt_ids if one.source_ids is None else one.source_ids for one in requests)
                nearest = [self.router.nearest(Prompt(ids, target), routes) for ids in read]
                kept = [one for one, route in zip(requests, nearest, strict=True) if route != name]
                found += [one for one, route in zip(requests, nearest, strict=True) if route == name]
                learner.replay.load_state_dict(kept, learner.replay.state_dict())
        return found

    # Keeping.

    def _go_on(self, folder: Path) -> None:
        """Go on from what the state directory holds, if anything, and keep it up to date from now on."""
        self._disk = StateDirectory(folder / ROUTER, collect=self._collect, flush_seconds=self._config.flush_seconds)
        snapshot, _ = self._disk.load()
        if snapshot is not None:
            self._resume(snapshot, folder)
            self.load_router(snapshot)
            self._knows_router = True

    def _resume(self, snapshot: Snapshot, folder: Path) -> None:
        """Make the routes again that were made while serving, as far as there is room."""
        likes = {name: like for name, like in snapshot.numbers["likes"].items() if name not in self._drafts}
        for name in snapshot.numbers["routes"]:
            if name not in self._drafts and name not in likes:
                raise LearningError(
                    f"{folder} keeps the draft of route {name!r}, which was passed: pass it again, or use another "
                    "state directory"
                )
        self._likes, room = likes, max(self._most - len(self._drafts), 0)
        for name, like in [*likes.items()][:room]:
            self._begin(name, like)
        if len(likes) > room:
            without = [*likes][room:]
            logger.warning(
                "max_routes leaves no room for the drafts of routes %s; others serve in their place.", without
            )

    def load_router(self, snapshot: Snapshot) -> None:
        """
        Have the router go on from a saved state, unless the state directory has a newer one.

        That of another kind of router is left alone.

        Raises:
            LearningError: Something is missing in it.
        """
        kind = type(self.router).__name__
        if self.router is None or self._knows_router or snapshot.numbers["kind"] != kind:
            return
        try:
            self.router.load_state(snapshot.tensors.get("router", {}), snapshot.numbers["router"])
        except KeyError as error:
            raise LearningError(f"a {kind} cannot go on from what was saved of it: {error!r}") from error

    def _collect(self) -> Snapshot | None:
        with self._lock:
            if self._heard == self._kept:
                return None
            self._kept = self._heard
            return self._snapshot()

    def _snapshot(self) -> Snapshot:
        assert self.router is not None
        tensors, numbers = self.router.state()
        about = {"kind": type(self.router).__name__, "router": numbers, "likes": dict(self._likes)}
        return Snapshot({"router": tensors} if tensors else {}, {**about, "routes": list(self._drafts)})

    def save(self, directory: Path, state: Path) -> None:
        """Write every draft and its state to a folder of its own, and what the router knows."""
        snapshot = None
        if self.router is None:
            self.first.save(directory, state)
        else:
            with self._lock:
                snapshot = self._snapshot()
            for name in snapshot.numbers["routes"]:
                folder = directory / folder_of(name)
                self._drafts[name].save(folder, folder / state.name)
        save_routes(state, snapshot)  # last: until then, what was saved before counts

    def close(self) -> None:
        """Stop learning, and leave the disk to others."""
        with self._lock:
            self._most = 0  # a request in flight begins no other route
        learners = [self._drafts[name].learner for name in self]
        for end in (OnlineLearner.end, OnlineLearner.settle, OnlineLearner.close):
            for learner in learners:  # each step for all of them, so that none waits for the work of another
                end(learner)
        if self._disk is not None:
            self._disk.close()


@torch.no_grad()
def _copy_of(parent: LearningDraft) -> Any:
    """Copy a draft as it was before it learned anything, over the same memory of all that is not trained."""
    source: Any = parent.given if is_peft(parent.given) else parent.draft
    shared = {id(weight) for name, weight in parent.draft.named_parameters() if name in parent.frozen}
    untrained = base_of(source).union(name for name, weight in source.named_parameters() if id(weight) in shared)
    with parent.weights:
        copied = copy_beside(source, untrained).eval()
    parameters, learner = dict(unwrap(copied).named_parameters()), parent.learner.learner
    for name, weight in (learner.candidates.static.weights if learner is not None else {}).items():
        parameters[name].copy_(weight)
    return copied


def check_names(drafts: Mapping[str, Any]) -> None:
    """
    Refuse a mapping of drafts that is none.

    Raises:
        InputError: It is empty, a name is no text, or one model is under two names.
    """
    if not drafts or not all(isinstance(name, str) and name for name in drafts):
        raise InputError(f"drafts must map names of routes to drafts, got {list(drafts)!r}")
    models = [id(draft) for draft in drafts.values() if not isinstance(draft, str)]
    if len(set(models)) < len(models):
        raise InputError("drafts has one model under two routes, which would learn for both: pass a copy")
