"""
The method of online learning, from a recorded request to live weights: observe, score, select, publish, train.

Every candidate is scored on a request before anything is learned from it. So no candidate is scored on what it has
learned, no request is held out, and the selector notices at once when other weights have become better: after an
update that did harm, or a change of the traffic. Not covered: when and where this runs; see `online.py`, `worker.py`.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from .._compat import import_quietly
from ..budget import Budget
from ..config import OnlineConfig
from ..drafts.starting import solve_again
from ..errors import LearningError
from ..journal import Counters, Decision, Drift, Journal, JudgedRequest, UpdateRecord
from ..precision import multiplies_bfloat16
from ..records import Observation
from ..storage.identity import sample
from .candidates import ALPHAS, HALF, WHOLE, Candidates, Checkpoint
from .features import reader_of
from .pace import Pace
from .reading import base_model, teaches
from .replay import ReplayBuffer
from .scoring import DROP_REQUESTS, Score, Scorer, Weights, has_dropped, token_mean
from .selector import MEMORY, STATIC, Selector
from .student import Student
from .throttle import Throttle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .trainer import OnlineGKDTrainer

logger = logging.get_logger(__name__)

USUAL = 32  # latest scored requests, over which a candidate's acceptance and the usual length are means
MEMORABLE = 32  # requests that a leader has to lead for to be frozen when it gives way
WORTH_FREEZING = 0.05  # gain in acceptance on the static draft that it needs for that
TRAINER = f"{__package__}.trainer"  # imported once it is needed: it imports TRL, which takes seconds
SAVED = ("requests", "_fresh", "_led")  # attributes that a saved state holds

Publish = Callable[[Weights, float], None]


class Learner:
    """
    Learns a draft from requests. Not thread-safe: one thread works at a time.

    Args:
        draft ([`~transformers.PreTrainedModel`]): The live draft; only read.
        config (`OnlineConfig`): Settings.
        throttle (`Throttle`): Its clock counts the time of learning.
        publish (`Callable[[Mapping[str, torch.Tensor], float], None]`): Makes weights live.
        give_way (`Callable[[], float]`): Called between parts of the work; returns the seconds since the last call.
        is_stopped (`Callable[[], bool]`): Whether to end with the step in progress.
        target, frozen, proposed: See [`~hf_osd.learning.online.OnlineLearner`].

    Attributes:
        journal (`Journal`): What happened.
        counters (`Counters`): The same in numbers.
        budget (`Budget`): What learning may cost.
        replay (`ReplayBuffer`): The latest requests.
        live (`Checkpoint`): The live checkpoint.
        initial (`Mapping[str, torch.Tensor]`): A sample of the static draft's weights, which tells drafts apart.
    """

    def __init__(
        self,
        draft: "PreTrainedModel",
        config: OnlineConfig,
        throttle: Throttle,
        publish: Publish,
        give_way: Callable[[], float],
        is_stopped: Callable[[], bool],
        target: "PreTrainedModel | None" = None,
        frozen: Collection[str] = (),
        proposed: int | torch.Tensor | None = None,
    ) -> None:
        self.journal, self.counters, self.budget = Journal(), Counters(), Budget(config.learning_share)
        bounds = config.replay_size * config.max_length, config.max_state_bytes
        self.replay = ReplayBuffer(config.replay_size, config.seed, *bounds)
        self.give_way, self._is_stopped = give_way, is_stopped
        self._draft, self.config, self._throttle, self._publish = draft, config, throttle, publish
        self._target, self._proposed, self.frozen = target, proposed, frozen
        self.initial = sample(draft.named_parameters())
        self._scorer = Scorer(draft, config.max_length, config.batch_size, give_way, proposed)
        self.requests = self._fresh = self._led = 0  # of these: recorded since an update, scored under this leader
        self._waiting_since: float | None = None  # of the update in progress, by the throttle's clock
        self.start()

    def start(self) -> None:
        """Begin with the live draft as it is, and with nothing learned."""
        config = self.config
        self.student = Student(self._draft, config.peft_config, config.seed, self.frozen)
        self.live = Checkpoint.of(self.student.weights(), self.student.state()).on_cpu()
        self.candidates, self.selector = Candidates(self.live, config.archive_size, config.gate), Selector()
        self._trainer: OnlineGKDTrainer | None = None
        self._moments: Mapping[int, Any] = {}  # of a restored optimiser, until there is a trainer
        self._usual: deque[dict[str, Score]] = deque(maxlen=USUAL)
        self._pace = self._new_pace()

    def _new_pace(self) -> Pace:
        return Pace(self.config.learning_rate, self.config.adaptive_learning_rate and self.config.gate)

    def start_from(self, weights: Weights) -> None:
        """Make weights live, and begin with these."""
        self._publish(weights, 0.0)
        self.start()

    def branch_off(self) -> None:
        """Count anew, and find out anew what there is to gain: from now on this is the draft of other traffic."""
        self.counters = Counters()
        self._pace.begin_trial()

    # Observe.

    def earn(self, seconds: float) -> None:
        """Have a request that took some seconds pay for learning, as much as there seems to be to gain."""
        self.budget.earn(seconds, self._pace.eagerness)

    def learn(self, requests: Sequence[Observation]) -> None:
        """Score new requests, select what is live, keep them for replay, and train if an update is due."""
        began = self._throttle.now()
        first = self.requests + 1
        self.requests, self._fresh = self.requests + len(requests), self._fresh + len(requests)
        try:
            self._select(first, self._score(requests))
        finally:  # whatever fails, the requests are there to learn from
            for request in requests:
                if teaches(request, self.config.positions, self._scorer.known):
                    self.replay.add(request)
        if self._is_due():
            self.train(waiting_since=None if self.config.background else began)

    def _is_due(self) -> bool:
        is_time = self._fresh >= self.config.update_every and len(self.replay) > 0
        return is_time and not self._is_stopped() and self.budget.allows_training()

    # Score.

    def _score(self, requests: Sequence[Observation]) -> list[dict[str, Score]]:
        """Score all candidates on new requests; none, if the budget leaves no time for it."""
        if not requests or not self.budget.allows_scoring():
            return []
        began = self._throttle.now()
        found = self._scorer.scores(self.candidates.to_score(self._draft.dtype), requests)
        self.budget.spend(0.0, scoring=self._throttle.now() - began)
        return found

    # Select.

    def _select(self, first: int, scored: Sequence[dict[str, Score]]) -> None:
        """Count the scores of requests, numbered from `first`, and switch to another leader if there is one."""
        before = self.selector.leader
        for number, scores in enumerate(scored, first):
            live, static = scores[before], scores[STATIC]
            self.journal.add(JudgedRequest(number, live.acceptance, live.positions, live.accepted, static.accepted))
            self._usual.append(scores)
            self._led += 1
            if self.config.gate:
                self.selector.add({name: score.acceptance * self._length(score) for name, score in scores.items()})
        self._look_for_drop(before)
        if self.selector.leader != before:
            self._switch(before, self.selector.leader)

    def _length(self, score: Score) -> float:
        """Return how long a request is, in requests of the usual length."""
        usual = sum(scores[STATIC].positions for scores in self._usual) / len(self._usual)
        return score.positions / max(usual, 1.0)

    def _switch(self, before: str, leader: str) -> None:
        """Make another candidate live. If it is an earlier one, traffic has changed, or training has done harm."""
        was_live, expected = self.live, self.expected(before)
        gain = self.expected(leader) - expected
        try:
            self._go_live(leader)
        except BaseException:
            self.selector.leader = before
            raise
        if leader in ALPHAS:
            self.counters.updates += 1
            self._note("published", f"{leader} of what is learned leads", gain=gain)
            return
        self._note("restored", f"the {leader} weights lead", gain=gain)
        if self._is_memorable(before):
            self._freeze(before, was_live)
        self._led = 0
        self._pace.begin_anew()
        if leader in self.candidates.frozen:
            self.candidates.use(leader)
            self.go_on_from_live()

    def _is_memorable(self, leader: str) -> bool:
        """Whether learned weights that give way have led long and well enough to be kept."""
        has_learned = leader != STATIC and leader not in self.candidates.frozen
        return has_learned and self._led >= MEMORABLE and self.selector.stay > WORTH_FREEZING * self._led

    def _freeze(self, name: str, checkpoint: Checkpoint) -> None:
        frozen = self.candidates.freeze(checkpoint)
        if frozen is not None:
            self.selector.enter(frozen, like=name)
        for surplus in self.candidates.surplus():
            if surplus != self.selector.leader:
                del self.candidates.frozen[surplus]
                self.selector.leave(surplus)

    def _look_for_drop(self, leader: str) -> None:
        """Begin anew with rate and means where a drop of acceptance says that the traffic has changed."""
        rates = [scores[leader].acceptance for scores in self._usual if leader in scores]
        if has_dropped(rates):
            now, before = rates[-DROP_REQUESTS:], rates[:-DROP_REQUESTS]
            self.journal.add(Drift(self.requests, fmean(now), fmean(before)))
            self._pace.begin_anew()
            self._usual = deque(list(self._usual)[-DROP_REQUESTS:], maxlen=USUAL)

    def expected(self, name: str | None = None) -> float:
        """Return the acceptance of a candidate, by default the leader, on the latest scored requests."""
        name = name or self.selector.leader
        found = (scores[name] for scores in self._usual if name in scores)
        return token_mean((score.acceptance, score.positions) for score in found)

    # Publish.

    def _go_live(self, name: str) -> None:
        latest = self.student.state()
        chosen = Checkpoint.of(self.candidates.weights(name), self.candidates.origin(name, latest))
        self._publish(chosen.weights, self.expected(name))  # if that fails, the others stay live
        self.live = chosen

    # Train.

    def train(self, waiting_since: float | None = None) -> None:
        """
        Run one update: take back what did harm, take some steps, and make the result live if learned weights lead.

        Args:
            waiting_since (`float`, *optional*): Since when a request waits for it, by the throttle's clock; such an
                update may end early.

        Raises:
            LearningError: There is nothing to learn from, or weights are not finite.
        """
        if not len(self.replay):
            raise LearningError("no request has anything to learn from")
        self._fresh, self._waiting_since, began = 0, waiting_since, self._throttle.now()
        self._pace.spend_by(max(map(self.expected, self.candidates.names())) - self.expected(STATIC))
        self._take_back_harm()
        self._solve()
        trainer = self._trainer = self._trainer or self._make_trainer()
        loss = trainer.update(self.config.steps_per_update, self._pace.learning_rate)
        if self._is_stopped():
            return
        weights = self.student.weights()
        broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
        if broken:
            self._pace.slow_down()
            raise LearningError(f"weights are not finite after the update: {broken[0]}")
        self.counters.last_loss = loss
        self._take_over(weights, loss, self._throttle.now() - began)

    def _solve(self) -> None:
        """Put a closed-form solution into the training copy of a cold draft, where one is due and all is trained."""
        found = solve_again(self._draft, base_model(self.student.model), self.replay.observations())
        state = self.student.state()
        if found and found.keys() <= state.keys():
            self.student.load_state({**state, **found})

    def _take_back_harm(self) -> None:
        """Go on from the live weights at a lower rate, if what is learned has lost as much as is counted."""
        if self.selector.leader != WHOLE and self.selector.sums.get(WHOLE, 0.0) <= -MEMORY:
            self._pace.slow_down()
            self.go_on_from_live()
            self._note("rolled back", "what training led to has lost too much against the live weights")

    def go_on_from_live(self) -> None:
        """Have training go on from the live weights, which become what is learned if they were learned."""
        self.student.load_state(self.live.state)
        is_learned = self.selector.leader in ALPHAS
        self.candidates.restart(self.live.weights if is_learned else {})
        if is_learned:
            self.selector.enter(WHOLE, like=self.selector.leader)
            self.selector.leader = WHOLE
            self.selector.enter(HALF, like=STATIC)
        for name in self.selector.sums.keys() - set(self.candidates.names()):
            self.selector.leave(name)
        self._moments = {}
        if self._trainer is not None:
            self._trainer.load_optimizer_state({})

    def _make_trainer(self) -> "OnlineGKDTrainer":
        bf16 = self._draft.dtype == torch.bfloat16 and multiplies_bfloat16(self._draft.device)
        model, reader = self.student.model, reader_of(self.student.model, self._proposed)
        trainer: Any = import_quietly(TRAINER)
        parts = self.config, trainer.UpdateCallback(self), self._target, bf16, reader
        made: OnlineGKDTrainer = trainer.OnlineGKDTrainer(model, self.replay.sample, *parts)
        if self._moments:
            made.load_optimizer_state(self._moments)
        return made

    def _take_over(self, weights: Weights, loss: float, seconds: float) -> None:
        """Take the weights of an update into what is learned, and make that live if the selector follows it."""
        leader = self.selector.leader
        self.candidates.follow(weights)
        for name in self.candidates.names():
            if name not in self.selector.sums:
                self.selector.enter(name, like=leader)
        if not self.config.gate:
            self.selector.leader = leader = WHOLE
        if leader in ALPHAS:
            self._go_live(leader)
            self.counters.updates += 1
            reason = f"{leader} of what is learned leads"
            self._note("published", reason, loss=loss, seconds=seconds, mixing=ALPHAS[leader])
        else:
            self._note("held", f"the {leader} weights lead", loss=loss, seconds=seconds)
        self._pace.follow(leader)

    # What the trainer asks for.

    def count_step(self, positions: int) -> None:
        """Count a step of the optimiser, and the positions that it learned from."""
        self.counters.steps += 1
        self.counters.positions += positions

    def is_over(self) -> bool:
        """Whether the update in progress has to end with this step."""
        since = self._waiting_since
        return self._is_stopped() or (since is not None and self.budget.is_used_up(self._throttle.now() - since))

    # Failing.

    def failed(self, error: BaseException) -> None:
        """Note a failure, and go on from the live weights with another trainer, since it may have harmed both."""
        self._trainer, self._moments = None, {}
        self.counters.failures += 1
        self._note("failed", str(error) or repr(error))
        self.go_on_from_live()

    def _note(self, decision: Decision, reason: str, **measured: float) -> None:
        logger.debug("An update of the draft was %s: %s.", decision, reason)
        rate = self._pace.learning_rate
        self.journal.add(UpdateRecord(self.requests, decision, reason, learning_rate=rate, **measured))

    # Saving.

    def state(self) -> tuple[dict[str, Weights], dict[str, Any]]:
        """Return what `load_state` needs: groups of tensors, which are not written to any more, and numbers."""
        student = {name: tensor.to("cpu", copy=True) for name, tensor in self.student.state(base=True).items()}
        kept, candidates = self.candidates.state()
        return {**kept, **self.live.on_cpu().groups("live"), "student": student}, {
            "candidates": candidates,
            "selector": self.selector.state_dict(),
            "pace": self._pace.state_dict(),
            "usual": [{name: astuple(score) for name, score in scores.items()} for scores in self._usual],
            "solved": getattr(self._draft.config, "solved", None),
            **{name: getattr(self, name) for name in SAVED},
        }

    def optimizer_state(self) -> Mapping[int, Any]:
        """Return the state of the optimiser by parameter."""
        if self._trainer is None or self._trainer.optimizer is None:
            return self._moments
        state: Mapping[int, Any] = self._trainer.optimizer.state_dict()["state"]
        return state

    def load_state(
        self, groups: Mapping[str, Weights], numbers: Mapping[str, Any], moments: Mapping[int, Any]
    ) -> None:
        """
        Go on from a saved state, whose live weights go live at once.

        Raises:
            KeyError: Something is missing.
            LearningError: The training copy is of another kind. As with any error, nothing has been changed.
        """
        candidates, selector = Candidates(self.live, self.config.archive_size, self.config.gate), Selector()
        candidates.load_state(groups, numbers["candidates"])
        selector.load_state_dict(numbers["selector"])
        usual = [{name: Score(*score) for name, score in scores.items()} for scores in numbers["usual"]]
        pace = self._new_pace()
        pace.load_state_dict(numbers["pace"])
        if selector.leader not in candidates.names():  # half of what is learned is none without the gate
            selector.leader = WHOLE
        saved, live = {name: numbers[name] for name in SAVED}, Checkpoint.from_groups(groups, "live")
        self.student.load_state(groups["student"])  # from here on nothing is missing
        self.candidates, self.selector, self.live = candidates, selector, live
        self._moments, self._pace = moments, pace
        self._usual.extend(usual)
        if numbers.get("solved") is not None:
            self._draft.config.solved = numbers["solved"]
        vars(self).update(saved)
        self._publish(live.weights, self.expected())
