"""
What is done with what was learned: every decision between a recorded request and new live weights.

Each request first judges the live weights, then teaches. Three questions follow from it, each with an answer that
bounds the harm: has the traffic changed (drift), are the live weights worse than others that we have (fall back), and
which weights on the way to what was learned are better than the live ones (the gate)? Not covered: when this runs; see
`loop.py`.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from ..config import OnlineConfig
from ..errors import LearningError
from ..records import Observation
from .archive import Archive, Checkpoint
from .collation import teaches
from .doubt import Cause, Doubt, Drop, Suspension, Verdict
from .gate import Comparison, compare
from .incumbent import CLEARLY, Incumbent
from .journal import Decision, Drift, Journal, JudgedRequest, UpdateRecord
from .judge import Judge, Score, Weights
from .path import LearnedPath
from .rates import LearningRate
from .replay import ReplayBuffer
from .student import Student
from .watch import Alarm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What training led to is taken back where it is worse by so many standard errors, or refused so many times in a row.
_HARMFUL, _REFUSALS = 2.5, 12
# Latest requests of an update that test earlier weights and what was learned before they are learned from.
_FRESH = 32
_NUMBERS = ("requests", "fresh", "_drifted", "_refusals")
_WHY: dict[Alarm, str] = {
    "loss": "the live weights lose against the initial ones",
    "drift": "the traffic may have changed",
}


class Supervisor:
    """
    Judges, compares, publishes and falls back, for one draft. Used by the training thread alone, except `acceptance`.

    Args:
        draft ([`~transformers.PreTrainedModel`]): The live draft; only read.
        student (`Student`): Its training copy.
        config (`OnlineConfig`): Settings.
        replay (`ReplayBuffer`): Where judged requests go.
        journal (`Journal`): Where decisions are noted.
        publish (`Callable[[Weights, float], None]`): Makes weights live; told the acceptance to expect of them.
        pause (`Callable[[], object]`): Called after each forward pass.
        vocab_size (`int`, *optional*): Tokens of the target, where the draft has more; it proposes no others.
    """

    def __init__(
        self,
        draft: "PreTrainedModel",
        student: Student,
        config: OnlineConfig,
        replay: ReplayBuffer,
        journal: Journal,
        publish: Callable[[Weights, float], None],
        pause: Callable[[], object],
        vocab_size: int | None = None,
    ) -> None:
        self.replay = replay
        self.journal = journal
        self.rate = LearningRate(config.learning_rate, config.adaptive_learning_rate and config.gate)
        self.student = student
        self.requests = 0
        self.fresh = 0
        self._config = config
        self._judge = Judge(draft, config.max_length, config.batch_size, pause, vocab_size)
        initial = Checkpoint.of(student.weights(), student.state()).on_cpu()
        self._incumbent = Incumbent(initial, config.archive_size, self._judge, publish)
        self._watch, self._scores = self._incumbent.watch, self._incumbent.scores
        self._path = LearnedPath(initial.weights)
        self._latest: deque[Observation] = deque(maxlen=_FRESH)
        self._doubt: Doubt | None = None
        self._drifted: int | None = None  # the request at which the traffic changed last
        self._refusals = 0
        self._in_update = False

    @property
    def acceptance(self) -> float:
        """Mean acceptance of the live draft over the latest requests, in [0, 1]."""
        return self._watch.usual

    @property
    def archive(self) -> Archive:
        """Weights that can be made live again."""
        return self._incumbent.archive

    # Requests.

    def take(self, observations: Sequence[Observation]) -> None:
        """Judge the live weights by new requests, fall back where others are better, and keep what can be learned."""
        waiting = deque(observations)
        try:
            while waiting:  # scored together, and again where other weights went live in between
                self._take_together(waiting)
        finally:  # where that fails, at least nothing to learn from is lost
            self._keep(waiting)
        self._incumbent.keep_scores(self._contenders(), [*self.replay.held, *self._latest])

    def _take_together(self, waiting: deque[Observation]) -> None:
        if self._doubt is not None and self._doubt.live is not self._incumbent.live:
            self._doubt = None  # an update has found better ones
        columns = [self._scores.of(checkpoint, waiting) for checkpoint in self._contenders()]
        for scores in zip(*columns, strict=True):
            if self._take_one(waiting.popleft(), *scores):
                return

    def _contenders(self) -> tuple[Checkpoint, Checkpoint, Checkpoint]:
        """Live, initial and suspended weights, or the live ones in the place of those that do not matter."""
        live = self._incumbent.live
        suspended = self._doubt.suspended if self._doubt is not None else None
        return live, self.archive.initial if self._config.gate else live, suspended or live

    def _keep(self, observations: Iterable[Observation]) -> None:
        for observation in observations:
            if teaches(observation, self._config.positions, self._judge.known):
                self.replay.add(observation)

    def _take_one(self, observation: Observation, live: Score, initial: Score, suspended: Score) -> bool:
        """Note one request; whether other weights went live."""
        self.requests += 1
        self.fresh += 1
        self._latest.append(observation)
        judged = live.acceptance, live.positions, live.accepted, initial.accepted
        self.journal.add(JudgedRequest(self.requests, *judged))
        self._keep([observation])
        alarm = self._watch.add(observation, live, initial)
        if not self._config.gate:
            return False
        doubt, verdict = self._doubt, None
        if doubt is not None:
            verdict = doubt.add(observation, live, suspended, self._watch.length(live))
        if alarm == "loss" or (alarm == "drift" and doubt is None):
            return self._react(alarm)
        return doubt is not None and verdict is not None and self._resolve(doubt, verdict)

    def is_due(self) -> bool:
        """Whether it is time for an update: sooner after the traffic has changed, later while that is not sure."""
        every = self._config.update_every
        if self._drifted is not None and self.requests - self._drifted < 2 * every:
            every = max(1, every // 2)
        return self.fresh >= every and len(self.replay) > 0 and self._doubt is None

    # Falling back.

    def _react(self, alarm: Alarm) -> bool:
        """
        Do what is urgent: the initial weights go live where the live ones lose, or others that are clearly better.

        The training copy stays: if this was a hiccup, it soon passes the gate again; if not, it is rolled back.
        """
        suspects, leaving = self._watch.suspects(alarm), self._incumbent.live
        is_change = alarm == "drift" or self._watch.has_changed or self._doubt is not None
        cause = self._cause(alarm, suspects)
        best = self._incumbent.best_fallback(suspects)
        acceptance = self._incumbent.acceptance(best, suspects)
        if alarm == "drift" and acceptance < self._incumbent.acceptance(leaving, suspects) + CLEARLY:
            self._doubt = Drop(cause, leaving)
            return False
        self._restore(best, suspects, f"{_WHY[alarm]}: acceptance is {acceptance:.2f} with earlier weights")
        if is_change:
            self._doubt = Suspension(cause, best, leaving)
        else:  # bad luck, or bad weights: the gate will tell
            self._latest = deque(suspects, maxlen=_FRESH)
            self._incumbent.remember(cause.memorable, self.requests)
        return True

    def _cause(self, alarm: Alarm, suspects: Sequence[Observation]) -> Cause:
        """What an alarm rests on, and one before it that is in doubt still."""
        memorable = self._incumbent.memorable(self.requests)
        if self._doubt is None:
            return Cause(suspects, self._watch.before(alarm), memorable)
        first = self._doubt.cause
        return Cause(self._doubt.requests, first.before, first.memorable or memorable)

    def _resolve(self, doubt: Doubt, verdict: Verdict) -> bool:
        """Believe an alarm, or take back what it led to; whether other weights went live."""
        before = self._incumbent.live
        if verdict == "so":
            self._believe(doubt)
        elif doubt.suspended is not None and self._may_serve(doubt.suspended):
            self._bring_back(doubt.suspended)
        self._watch.clear("drift")
        self._doubt = None
        return self._incumbent.live is not before

    def _may_serve(self, checkpoint: Checkpoint) -> bool:
        return self._watch.may_risk or checkpoint is self.archive.initial

    def _bring_back(self, checkpoint: Checkpoint) -> None:
        self._restore(checkpoint, list(self._latest), "the alarm was chance: they are ahead again")
        if not self._path.count:  # an update has taken the training copy back meanwhile
            self._go_on_from(checkpoint)

    def _believe(self, doubt: Doubt) -> None:
        """The traffic has changed."""
        live, before = self._incumbent.live, fmean(doubt.cause.before)
        now = self._incumbent.acceptance(doubt.suspended or live, doubt.requests)
        self.journal.add(Drift(self.requests, now, before))
        logger.info("The traffic has changed: acceptance was %.2f, is %.2f.", before, now)
        self._incumbent.remember(doubt.cause.memorable, self.requests)
        self._incumbent.begin_watch(doubt.requests)
        if doubt.suspended is not None and live is not self.archive.initial:
            self._go_on_from(live)
        self._begin_anew(doubt.requests)

    def _begin_anew(self, requests: Sequence[Observation]) -> None:
        """Other traffic begins with these requests: what came before tests nothing any more."""
        self._latest = deque(requests, maxlen=_FRESH)
        self._drifted = self.requests
        self.rate.restart()
        self.replay.turn_page(len(requests))
        self._path.restart()

    def _restore(
        self,
        checkpoint: Checkpoint,
        tested: Sequence[Observation],
        reason: str,
        comparison: Comparison | None = None,
    ) -> None:
        """Make earlier weights live again, because of how they do on some requests."""
        self._incumbent.restore(checkpoint, tested)
        self._note("restored", reason, comparison=comparison)

    # Updates.

    def begin_update(self) -> None:
        """
        Test what was learned so far, and earlier weights, by the requests that are learned from next.

        Traffic may come back so slowly, or to weights so mixed, that no alarm is raised.
        """
        fresh = list(self._latest)[-self.fresh :] if self.fresh else []
        self.fresh = 0
        if self._config.gate:
            self._test(fresh)
            self._try_archived(fresh)
        self._in_update = True

    def _test(self, observations: Sequence[Observation]) -> None:
        initial = self._scores.of(self.archive.initial, observations)
        self._path.test(lambda weights: self._judge.scores(weights, observations), initial)

    def _try_archived(self, fresh: Sequence[Observation]) -> None:
        live = self._scores.of(self._incumbent.live, fresh)
        tried = self.archive.all() if self._watch.may_risk else [self.archive.initial]
        others = [checkpoint for checkpoint in tried if checkpoint is not self._incumbent.live]
        compared = [(compare(self._scores.of(checkpoint, fresh), live), checkpoint) for checkpoint in others]
        better = [pair for pair in compared if pair[0].is_certain()]
        if better:
            comparison, checkpoint = max(better, key=lambda pair: pair[0].gain)
            memorable = self._incumbent.memorable(self.requests)
            self._restore(checkpoint, fresh, "earlier weights are certainly better on the latest requests", comparison)
            self._incumbent.remember(memorable, self.requests)
            self._go_on_from(checkpoint)
            if checkpoint is not self.archive.initial:  # its traffic is back
                self._begin_anew(fresh)

    def finish_update(self, loss: float, seconds: float) -> Decision:
        """
        Decide about what an update has made of the training copy.

        Args:
            loss (`float`): Mean loss of its steps, in nats.
            seconds (`float`): Time that it took.

        Returns:
            `str`: What was decided; see [`UpdateRecord`].

        Raises:
            LearningError: There are weights that are not finite.
        """
        weights = self.student.weights()
        broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
        if broken:
            self.rate.follow("rolled back")
            raise LearningError(f"weights are not finite after the update: {broken[0]}")
        if self._config.gate:
            self._path.follow(weights)
            decision, reason, comparison, mixing = self._pass_gate()
        else:
            self._go_live(weights, [], [])
            decision, reason, comparison, mixing = "published", "there is no gate", None, 1.0
        self._refusals = self._refusals + 1 if decision == "refused" else 0
        self._note(decision, reason, loss, comparison, mixing, seconds)
        self.rate.follow(decision, mixing)
        self._in_update = False
        return decision

    def _pass_gate(self) -> tuple[Decision, str, Comparison, float]:
        """Go as far on the way to what was learned as paid so far, if held-out requests do not speak against it."""
        held = self.replay.held
        if self._path.count == 1:  # no request has tested it yet
            self._test(held)
        mixing, promise = self._path.best()
        candidate = self._path.at(mixing)
        scores = self._judge.scores(candidate, held)
        comparison, with_initial = (
            compare(scores, self._scores.of(one, held)) for one in (self._incumbent.live, self.archive.initial)
        )
        decision, reason = self._decide(promise, comparison, with_initial)
        if decision == "published":
            self._go_live(candidate, held, scores)
        elif decision == "rolled back":
            self.roll_back()
        return decision, reason, comparison, mixing

    def _decide(self, promise: Comparison, comparison: Comparison, with_initial: Comparison) -> tuple[Decision, str]:
        if not comparison.requests or not promise.requests:
            return "held", "there is nothing to test it on yet"
        if comparison.gain > 0.0 and promise.is_certain():
            if not self._watch.may_risk:
                return "held", "better on held-out requests, but live weights have lost too much lately"
            return "published", "better on held-out requests"
        if with_initial.is_worse(_HARMFUL):
            return "rolled back", "certainly worse on held-out requests"
        if comparison.gain >= 0.0:
            return "held", "not certainly better on held-out requests"
        if self._refusals + 1 >= _REFUSALS:
            return "rolled back", "worse on held-out requests many times in a row"
        return "refused", "worse on held-out requests"

    def _go_live(self, weights: Weights, tested: Sequence[Observation], scores: Sequence[Score]) -> None:
        checkpoint = Checkpoint.of(weights, self.student.state())
        self._scores.note(checkpoint, tested, scores)
        self._incumbent.go_live(checkpoint, tested)

    def roll_back(self) -> None:
        """Take the training copy back to the live weights; an adapter, to what led to them, however far they went."""
        self._go_on_from(self._incumbent.live)

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        self.student.load_state(checkpoint.state)
        self._path.restart()

    def _note(
        self,
        decision: Decision,
        reason: str,
        loss: float | None = None,
        comparison: Comparison | None = None,
        mixing: float | None = None,
        seconds: float = 0.0,
    ) -> None:
        if decision not in ("published", "held"):
            logger.info("An update of the draft was %s: %s.", decision, reason)
        gain, uncertainty = (comparison.gain, comparison.uncertainty) if comparison is not None else (None, None)
        rate = self.rate.value
        self.journal.add(UpdateRecord(self.requests, decision, reason, loss, rate, gain, uncertainty, mixing, seconds))

    def failed(self, error: BaseException) -> None:
        """Note a failure; one in an update may have touched the training copy, which goes back to the live weights."""
        if self._in_update:
            self.roll_back()
            self._in_update = False
        self._note("failed", str(error))

    # Saving.

    def state(self) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, Any]]:
        """Return groups of tensors, which do not change any more, and numbers for JSON."""
        student = {name: tensor.to("cpu", copy=True) for name, tensor in self.student.state(base=True).items()}
        groups, numbers = self._incumbent.state()
        numbers |= {name: getattr(self, name) for name in _NUMBERS}
        numbers |= {"rate": self.rate.value, "path": self._path.state_dict()}
        return {**groups, "student": student, "average": self._path.on_cpu()}, numbers

    def load_state(self, groups: Mapping[str, Mapping[str, torch.Tensor]], numbers: Mapping[str, Any]) -> None:
        """
        Go on from a state.

        Raises:
            KeyError: Something is missing.
            LearningError: The training copy has another shape.
        """
        self.student.load_state(groups["student"])
        self._incumbent.load_state(groups, numbers)
        self._path.initial = self.archive.initial.weights
        self._path.load_state(groups["average"], numbers["path"])
        self.rate.value = numbers["rate"]
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
