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
from typing import TYPE_CHECKING, Any

import torch

from ..config import OnlineConfig
from ..errors import LearningError
from ..records import Observation
from .archive import Archive, Checkpoint, ScoreBook
from .collation import teaches
from .gate import Comparison, compare
from .journal import Decision, Drift, Journal, JudgedRequest, UpdateRecord
from .judge import Judge, Score, Weights, token_mean
from .path import LearnedPath
from .rates import LearningRate
from .replay import ReplayBuffer
from .student import Student
from .watch import Alarm, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Other weights than the initial ones go live after an alarm if their acceptance on the requests that raised it is this
# much higher; and weights are remembered if theirs was for as many requests.
_CLEARLY, _MEMORABLE = 0.05, 32
# Standard errors: weights are published above the first, and new ones taken back below minus the second, or after so
# many refusals in a row.
_CERTAIN, _HARMFUL, _REFUSALS = 2.0, 2.5, 12
# Latest requests of an update that test earlier weights and what was learned before they are learned from.
_FRESH = 32
_NUMBERS = ("requests", "fresh", "_remembered", "_drifted", "_refusals")


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
    ) -> None:
        self.replay = replay
        self.journal = journal
        self.rate = LearningRate(config.learning_rate, config.adaptive_learning_rate and config.gate)
        self.student = student
        self.requests = 0
        self.fresh = 0
        self._config = config
        self._publish = publish
        self._judge = Judge(draft, config.max_length, config.batch_size, pause)
        self._live = Checkpoint.of(student.weights(), student.state()).on_cpu()
        self._previous: Checkpoint | None = None
        self.archive = Archive(self._live, config.archive_size)
        self._path = LearnedPath(self._live.weights)
        self._watch = Watch()
        self._scores = ScoreBook(self._score)
        self._latest: deque[Observation] = deque(maxlen=_FRESH)
        self._remembered = 0
        self._drifted: int | None = None  # the request at which the traffic changed last
        self._refusals = 0

    @property
    def acceptance(self) -> float:
        """Mean acceptance of the live draft over the latest requests, in [0, 1]."""
        return self._watch.usual

    # Requests.

    def take(self, observations: Sequence[Observation]) -> None:
        """Judge the live weights by new requests, fall back where others are better, and keep what can be learned."""
        waiting = deque(observations)
        try:
            while waiting:  # scored together, and again where other weights went live in between
                self._take_together(waiting)
        finally:  # where that fails, at least nothing to learn from is lost
            self._keep(waiting)
        self._scores.keep([self._live, *self.archive.all()], [*self.replay.held, *self._latest])

    def _take_together(self, waiting: deque[Observation]) -> None:
        live = self._scores.of(self._live, waiting)
        initial = self._scores.of(self.archive.initial, waiting) if self._config.gate else live
        for mine, theirs in zip(live, initial, strict=True):
            if self._take_one(waiting.popleft(), mine, theirs):
                return

    def _keep(self, observations: Iterable[Observation]) -> None:
        for observation in observations:
            if teaches(observation, self._config.positions):
                self.replay.add(observation)

    def _score(self, checkpoint: Checkpoint, observations: Sequence[Observation]) -> list[Score]:
        return self._judge.scores({} if checkpoint is self._live else checkpoint.weights, observations)

    def _take_one(self, observation: Observation, live: Score, initial: Score) -> bool:
        """Note one request; whether other weights went live."""
        self.requests += 1
        self.fresh += 1
        self._latest.append(observation)
        self.journal.add(JudgedRequest(self.requests, live.acceptance, live.positions, live.accepted))
        self._keep([observation])
        alarm = self._watch.add(observation, live, initial)
        return alarm is not None and self._config.gate and self._react(alarm)

    def is_due(self) -> bool:
        """Whether it is time for an update: sooner after the traffic has changed."""
        every = self._config.update_every
        if self._drifted is not None and self.requests - self._drifted < 2 * every:
            every = max(1, every // 2)
        return self.fresh >= every and len(self.replay) > 0

    # Falling back.

    def _react(self, alarm: Alarm) -> bool:
        suspects = self._watch.suspects(alarm)
        self._latest = deque(suspects, maxlen=_FRESH)  # the others are of what was before
        best, acceptance = self._best_fallback(suspects)
        react = self._note_loss if alarm == "loss" else self._note_drift
        return react(suspects, best, acceptance)

    def _best_fallback(self, suspects: Sequence[Observation]) -> tuple[Checkpoint, float]:
        """Earlier weights, and their acceptance: the initial ones, unless others do clearly better."""
        others = [one for one in (*self.archive.others, self._previous) if one is not None and one is not self._live]
        tried = (self.archive.initial, *(others if self._watch.may_risk else []))
        initial, *found = ((one, self._acceptance(one, suspects)) for one in tried)
        best = max(found, key=lambda pair: pair[1], default=initial)
        return best if best[1] >= initial[1] + _CLEARLY else initial

    def _acceptance(self, checkpoint: Checkpoint, observations: Sequence[Observation]) -> float:
        scores = self._scores.of(checkpoint, observations)
        return token_mean((score.acceptance, score.positions) for score in scores)

    def _note_loss(self, suspects: Sequence[Observation], best: Checkpoint, acceptance: float) -> bool:
        """
        The live weights have lost too much: the initial ones go live, or others that are clearly better still.

        The training copy stays: if this was a hiccup, it soon passes the gate again; if not, it is rolled back.
        """
        changed = self._watch.has_changed
        reason = f"the live weights lose against the initial ones: acceptance is {acceptance:.2f} with earlier ones"
        self._restore(best, suspects, reason)
        if changed:
            self._turn_page(len(suspects))
        return True

    def _note_drift(self, suspects: Sequence[Observation], best: Checkpoint, acceptance: float) -> bool:
        """The traffic has changed: remember the weights for what it was, and look for better ones."""
        live, usual = self._acceptance(self._live, suspects), self._watch.usual
        self.journal.add(Drift(self.requests, live, usual))
        logger.info("The traffic has changed: acceptance was %.2f, is %.2f.", usual, live)
        self.rate.restart()
        self._drifted = self.requests
        switches = acceptance >= live + _CLEARLY
        if switches:
            self._restore(best, suspects, f"the traffic has changed: acceptance is {acceptance:.2f} with earlier ones")
            self._go_on_from(best)
        else:
            self._remember()
            self._begin_watch(suspects)
        self._turn_page(len(suspects))
        return switches

    def _turn_page(self, keep: int) -> None:
        """Only so many of the latest requests count from now on."""
        self.replay.turn_page(keep)
        self._path.restart()

    def _remember(self) -> None:
        """Keep the live weights for when their traffic comes back, if they are new and were worth it."""
        is_new = self._live not in self.archive.all()
        if is_new and self.requests - self._remembered >= _MEMORABLE and self._watch.advantage > _CLEARLY:
            self._live = self._live.on_cpu()
            self.archive.add(self._live)
            self._remembered = self.requests

    def _restore(
        self,
        checkpoint: Checkpoint,
        tested: Sequence[Observation],
        reason: str,
        comparison: Comparison | None = None,
    ) -> None:
        """Make earlier weights live again, because of how they do on some requests."""
        self.archive.use(checkpoint)
        self._remember()
        self._switch(checkpoint, tested)
        self._previous = None
        self._watch.clear()
        self._note("restored", reason, comparison=comparison)

    def _switch(self, checkpoint: Checkpoint, tested: Sequence[Observation]) -> None:
        expected = self._acceptance(checkpoint, tested) if tested else self.acceptance
        self._publish(checkpoint.weights, expected)  # first: if that fails, the others stay live
        self._live, self._previous = checkpoint, self._live
        if tested:
            self._begin_watch(tested)

    def _begin_watch(self, tested: Sequence[Observation]) -> None:
        live, initial = (self._scores.of(one, tested) for one in (self._live, self.archive.initial))
        self._watch.begin(list(zip(live, initial, strict=True)))

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

    def _test(self, observations: Sequence[Observation]) -> None:
        initial = self._scores.of(self.archive.initial, observations)
        self._path.test(lambda weights: self._judge.scores(weights, observations), initial)

    def _try_archived(self, fresh: Sequence[Observation]) -> None:
        live = self._scores.of(self._live, fresh)
        tried = self.archive.all() if self._watch.may_risk else [self.archive.initial]
        others = [checkpoint for checkpoint in tried if checkpoint is not self._live]
        compared = [(compare(self._scores.of(checkpoint, fresh), live), checkpoint) for checkpoint in others]
        better = [pair for pair in compared if pair[0].is_better(_needed(pair[0]))]
        if better:
            comparison, checkpoint = max(better, key=lambda pair: pair[0].gain)
            self._restore(checkpoint, fresh, "earlier weights are certainly better on the latest requests", comparison)
            self._go_on_from(checkpoint)

    def finish_update(self, loss: float, seconds: float) -> Decision:
        """
        Decide about what an update has made of the training copy.

        Args:
            loss (`float`): Mean loss of its steps, in nats.
            seconds (`float`): Time that it took.

        Returns:
            `str`: What was decided; see [`UpdateRecord`].

        Raises:
            LearningError: There are weights that are not finite. The training copy is back at the live weights.
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
            compare(scores, self._scores.of(one, held)) for one in (self._live, self.archive.initial)
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
        if comparison.gain > 0.0 and promise.is_better(_needed(promise)):
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
        self._switch(checkpoint, tested)

    def roll_back(self) -> None:
        """Take the training copy back to the live weights; an adapter, to what led to them, however far they went."""
        self._go_on_from(self._live)

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

    def failed(self, error: Exception) -> None:
        """Note that an update failed, and forget what it did to the training copy."""
        self.roll_back()
        self._note("failed", str(error))

    # Saving.

    def state(self) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, Any]]:
        """Return groups of tensors, which do not change any more, and numbers for JSON."""
        student = {name: tensor.to("cpu", copy=True) for name, tensor in self.student.state(base=True).items()}
        groups: dict[str, Mapping[str, torch.Tensor]] = {"student": student, "average": self._path.on_cpu()}
        archived = self.archive.all()
        groups |= self._live.on_cpu().groups("live")
        for index, checkpoint in enumerate(archived):
            groups |= checkpoint.groups(f"archive-{index}")
        return groups, {name: getattr(self, name) for name in _NUMBERS} | {
            "archived": len(archived),
            "live": next((index for index, checkpoint in enumerate(archived) if checkpoint is self._live), None),
            "rate": self.rate.value,
            "path": self._path.state_dict(),
            "acceptance": self.acceptance,
            "watch": self._watch.state_dict(),
        }

    def load_state(self, groups: Mapping[str, Mapping[str, torch.Tensor]], numbers: Mapping[str, Any]) -> None:
        """
        Go on from a state.

        Raises:
            KeyError: Something is missing.
            LearningError: The training copy has another shape.
        """
        self.student.load_state(groups["student"])
        archived = [Checkpoint.from_groups(groups, f"archive-{index}") for index in range(numbers["archived"])]
        self.archive.initial, *self.archive.others = archived
        place = numbers["live"]
        self._previous = None
        self._path.initial = self.archive.initial.weights
        self._path.load_state(groups["average"], numbers["path"])
        self._live = Checkpoint.from_groups(groups, "live") if place is None else archived[place]
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        self.rate.value = numbers["rate"]
        self._watch.load_state_dict(numbers["watch"])


def _needed(comparison: Comparison) -> float:
    """Standard errors that make sure of a gain: more while the spread of few requests is unknown."""
    return _CERTAIN + 4.0 / max(comparison.requests, 1)
