"""
What is done with what was learned: every decision between a recorded request and new live weights.

Each request first judges the live weights, then teaches. Three questions follow from it, each with an answer that
bounds the harm: has the traffic changed (drift), are the live weights worse than others that we have (fall back), and
are the new weights better than the live ones (the gate)? Not covered: when this runs; see `loop.py`.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..config import OnlineConfig
from ..errors import LearningError
from ..records import Observation
from .archive import Archive, Checkpoint
from .collation import teaches
from .drift import MovingAverage, ShortfallSum
from .gate import Comparison, compare
from .journal import Decision, Drift, Journal, JudgedRequest, UpdateRecord
from .judge import Judge, Score, Weights
from .rates import LearningRate
from .replay import ReplayBuffer
from .student import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Sums of acceptance over requests. The first is what live weights may lose against the initial ones before they give
# way to them: 0.0025 a request over a hundred requests. The second is a drop of half, over two or three requests.
_LOSS_LIMIT, _DROP_LIMIT = 0.25, 0.5
# A request below the long average by less than this is no sign of a change.
_SLACK = 0.1
# Other weights go live after an alarm if their acceptance on the requests that raised it is this much higher.
_CLEARLY = 0.05
# Requests that the long and the short moving average of the acceptance remember.
_LONG, _SHORT = 32, 8
# Standard errors: new weights are published above the first, or the second after live weights did harm; that is also
# what archived weights need, which come up again and again. New ones are taken back below minus the third, or after so
# many refusals in a row.
_BETTER, _CERTAIN, _HARMFUL = 1.0, 2.0, 2.5
_REFUSALS = 12
_LATELY = 32
# Requests between two checkpoints: after less, there is nothing to remember.
_MEMORABLE = 32
# Acceptance that weights must have had above the initial ones to be remembered.
_WORTHWHILE = 0.02
# Latest requests that archived weights are tested on before they are learned from.
_UNTAUGHT = 8
_NUMBERS = ("requests", "fresh", "_live_is_initial", "_live_is_new", "_remembered", "_drifted", "_harmed", "_refusals")


class Supervisor:
    """
    Judges, compares, publishes and falls back, for one draft. Used by the training thread alone, except `acceptance`.

    Args:
        draft ([`~transformers.PreTrainedModel`]): The live draft; only read.
        student (`Student`): Its training copy.
        config (`OnlineConfig`): Settings.
        replay (`ReplayBuffer`): Where judged requests go.
        journal (`Journal`): Where decisions are noted.
        publish (`Callable[[Weights], None]`): Makes weights live.
        pause (`Callable[[], object]`): Called after each forward pass.
    """

    def __init__(
        self,
        draft: "PreTrainedModel",
        student: Student,
        config: OnlineConfig,
        replay: ReplayBuffer,
        journal: Journal,
        publish: Callable[[Weights], None],
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
        self._live = Checkpoint.of(self.student.weights(), self.student.state())
        self._previous: Checkpoint | None = None
        self.archive = Archive(self._live.on_cpu(), config.archive_size)
        self._live_is_initial, self._live_is_new = True, False
        self._remembered = 0
        self._drifted: int | None = None  # the request at which the traffic changed last
        self._refusals = 0
        self._harmed: int | None = None  # ... at which the live weights were found to lose
        self._long, self._short = MovingAverage(_LONG), MovingAverage(_SHORT)
        self._advantage = MovingAverage(_LONG)  # of the live weights over the initial ones
        # Requests since the last update, with what the live weights made of them.
        self._untaught: deque[tuple[Observation, Score]] = deque(maxlen=_UNTAUGHT)
        self._loss, self._drop = ShortfallSum(_LOSS_LIMIT), ShortfallSum(_DROP_LIMIT)

    @property
    def acceptance(self) -> float:
        """Moving average of the live draft's acceptance over the last few requests, in [0, 1]."""
        return self._short.value

    # Requests.

    def take(self, observations: Sequence[Observation]) -> None:
        """Judge the live weights by new requests, fall back where others are better, and keep what can be learned."""
        waiting = list(observations)
        while waiting:  # scored together, and again where other weights went live in between
            live = self._judge.scores({}, waiting)
            initial = live if self._live_is_initial else self._judge.scores(self.archive.initial.weights, waiting)
            for number, (mine, theirs) in enumerate(zip(live, initial, strict=True), start=1):
                if self._take_one(waiting[number - 1], mine, theirs):
                    break
            del waiting[:number]

    def _take_one(self, observation: Observation, live: Score, initial: Score) -> bool:
        """Note one request; whether other weights went live."""
        self.requests += 1
        self.fresh += 1
        self._untaught.append((observation, live))
        self.journal.add(JudgedRequest(self.requests, live.acceptance, live.positions, live.accepted))
        if teaches(observation, self._config.positions):
            self.replay.add(observation)
        usual = self._long.value if self._long.count else live.acceptance
        self._long.add(live.acceptance)
        self._advantage.add(live.acceptance - initial.acceptance)
        self._short.add(live.acceptance)
        if not self._config.gate:
            return False
        dropped = self._drop.add(usual - live.acceptance - _SLACK, observation)
        if self._loss.add(initial.acceptance - live.acceptance, observation):
            return self._note_loss()
        return dropped and self._note_drift(usual)

    def is_due(self) -> bool:
        """Whether it is time for an update: sooner after the traffic has changed."""
        every = self._config.update_every
        if self._drifted is not None and self.requests - self._drifted < 2 * every:
            every = max(1, every // 2)
        return self.fresh >= every and len(self.replay) > 0

    def _note_loss(self) -> bool:
        """
        The live weights have lost too much: the initial ones go live, or others that are clearly better still.

        The training copy stays: if this was a hiccup, it soon passes the gate again; if not, it is rolled back.
        """
        self._harmed = self.requests
        suspects = list(self._loss.requests)
        best, checkpoint = self._best_fallback(suspects)
        self._fall_back(checkpoint, best, suspects, "the live weights lose against the initial ones")
        return True

    def _note_drift(self, usual: float) -> bool:
        """The traffic has changed: remember the weights for what it was, and look for better ones."""
        self.rate.restart()
        self._drifted = self.requests
        suspects = list(self._drop.requests)
        self._drop.clear()
        live = _mean_acceptance(self._judge.scores({}, suspects))
        self.journal.add(Drift(self.requests, live, usual))
        logger.info("The traffic has changed: acceptance was %.2f, is %.2f.", usual, live)
        best, checkpoint = self._best_fallback(suspects)
        switches = best >= live + _CLEARLY
        if switches:
            self._fall_back(checkpoint, best, suspects, "the traffic has changed")
            self.student.load_state(checkpoint.state)
        else:
            self._remember()
            self.replay.turn_page(len(suspects))
            self._short.restart(live)
        self._long.restart(self._short.value)
        return switches

    def _remember(self) -> None:
        """Keep the live weights for when their traffic comes back, if they are new and were worth it."""
        seen = self.requests - self._remembered >= _MEMORABLE
        if seen and self._live_is_new and self._advantage.value > _WORTHWHILE:
            self.archive.add(self._live.on_cpu())
            self._remembered = self.requests
            self._live_is_new = False

    # Falling back.

    def _fall_back(
        self, checkpoint: Checkpoint, acceptance: float, suspects: Sequence[Observation], reason: str
    ) -> None:
        """Make earlier weights live after an alarm; only the requests that raised it count from now on."""
        self._restore(
            checkpoint, f"{reason}: acceptance is {acceptance:.2f} on {len(suspects)} requests with earlier ones"
        )
        self.replay.turn_page(len(suspects))
        self._short.restart(acceptance)

    def _best_fallback(self, suspects: Sequence[Observation]) -> tuple[float, Checkpoint]:
        """Earlier weights, and their acceptance: the initial ones, unless others clearly do better on a few."""
        others = self.archive.others + ([self._previous] if self._previous is not None else [])
        initial, *found = (
            (_mean_acceptance(self._judge.scores(checkpoint.weights, suspects)), checkpoint)
            for checkpoint in (self.archive.initial, *others)
        )
        best = max(found, key=lambda pair: pair[0], default=initial)
        return best if best[0] >= initial[0] + _CLEARLY else initial

    def _restore(self, checkpoint: Checkpoint, reason: str, comparison: Comparison | None = None) -> None:
        """Make earlier weights live again."""
        self._publish(checkpoint.weights)  # first: if that fails, the others stay live
        self.archive.use(checkpoint)
        self._remember()
        self._live, self._previous = checkpoint, None
        self._live_is_initial = checkpoint is self.archive.initial
        self._live_is_new = all(one is not checkpoint for one in self.archive.all())
        self._forget_comparisons()
        self._note("restored", reason, comparison=comparison)

    def _forget_comparisons(self) -> None:
        """What has been found out about the live weights is not about those that have just gone live."""
        self._untaught.clear()
        self._loss.clear()
        self._drop.clear()
        self._advantage.restart(0.0)

    # Updates.

    def begin_update(self) -> None:
        """
        See whether earlier weights do better on the latest requests, before these are learned from.

        Traffic may come back so slowly, or to weights so mixed, that no alarm is raised.
        """
        untaught = list(self._untaught)
        self._untaught.clear()
        self.fresh = 0
        if self._config.gate:
            self._try_archived(untaught)

    def _try_archived(self, untaught: Sequence[tuple[Observation, Score]]) -> None:
        observations, live = [observation for observation, _ in untaught], [score for _, score in untaught]
        found = [
            (compare(self._judge.scores(checkpoint.weights, observations), live), checkpoint)
            for checkpoint in self.archive.all()
            if checkpoint is not self._live
        ]
        better = [pair for pair in found if pair[0].is_better(_CERTAIN)]
        if better:
            comparison, checkpoint = max(better, key=lambda pair: pair[0].gain)
            self._restore(checkpoint, "earlier weights are certainly better on the latest requests", comparison)
            self.student.load_state(checkpoint.state)
            self.replay.turn_page(len(observations))

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
        comparison = self._compare(weights) if self._config.gate else None
        decision, reason = self._decide(comparison)
        if decision == "published":
            self._go_live(weights)
        elif decision == "rolled back":
            self.roll_back()
        self._refusals = self._refusals + 1 if decision == "refused" else 0
        self.rate.follow(decision)
        self._note(decision, reason, loss, comparison, seconds)
        return decision

    def _compare(self, weights: Weights) -> Comparison:
        held = self.replay.held
        return compare(self._judge.scores(weights, held), self._judge.scores({}, held))

    def _decide(self, comparison: Comparison | None) -> tuple[Decision, str]:
        if comparison is None:
            return "published", "there is no gate"
        if not comparison.requests:
            return "held", "there is nothing to test it on yet"
        if comparison.is_better(self._errors_to_publish(comparison)):
            return "published", "better on held-out requests"
        if comparison.is_worse(_HARMFUL):
            return "rolled back", "certainly worse on held-out requests"
        if comparison.gain >= 0.0:
            return "held", "not certainly better on held-out requests"
        if self._refusals + 1 >= _REFUSALS:
            return "rolled back", "worse on held-out requests many times in a row"
        return "refused", "worse on held-out requests"

    def _errors_to_publish(self, comparison: Comparison) -> float:
        """Standard errors that new weights need: more while few requests are held out, whose spread is unknown."""
        errors = _BETTER + 4.0 / comparison.requests
        lately = self._harmed is not None and self.requests - self._harmed < _LATELY
        return max(errors, _CERTAIN) if lately else errors

    def _go_live(self, weights: Weights) -> None:
        checkpoint = Checkpoint.of(weights, self.student.state())
        self._publish(checkpoint.weights)  # first: if that fails, the others stay live
        self._previous, self._live = self._live, checkpoint
        self._live_is_initial, self._live_is_new = False, True

    def roll_back(self) -> None:
        """Take the training copy back to the live weights."""
        self.student.load_state(self._live.state)

    def _note(
        self,
        decision: Decision,
        reason: str,
        loss: float | None = None,
        comparison: Comparison | None = None,
        seconds: float = 0.0,
    ) -> None:
        if decision not in ("published", "held"):
            logger.info("An update of the draft was %s: %s.", decision, reason)
        gain, uncertainty = (comparison.gain, comparison.uncertainty) if comparison is not None else (None, None)
        rate = self.rate.value
        self.journal.add(UpdateRecord(self.requests, decision, reason, loss, rate, gain, uncertainty, seconds))

    def failed(self, error: Exception) -> None:
        """Note that an update failed, and forget what it did to the training copy."""
        self.roll_back()
        self._note("failed", str(error))

    # Saving.

    def state(self) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, Any]]:
        """Return groups of tensors, which do not change any more, and numbers for JSON."""
        student = {name: tensor.to("cpu", copy=True) for name, tensor in self.student.state(base=True).items()}
        named = {"live": self._live.on_cpu()} | {
            f"archive-{index}": checkpoint for index, checkpoint in enumerate(self.archive.all())
        }
        groups: dict[str, Mapping[str, torch.Tensor]] = {"student": student}
        for name, checkpoint in named.items():
            groups |= checkpoint.groups(name)
        return groups, {name: getattr(self, name) for name in _NUMBERS} | {
            "archived": len(named) - 1,
            "rate": self.rate.value,
            "long": [self._long.value, self._long.count],
            "short": [self._short.value, self._short.count],
            "advantage": [self._advantage.value, self._advantage.count],
            "loss": self._loss.total,
            "drop": self._drop.total,
        }

    def load_state(self, groups: Mapping[str, Mapping[str, torch.Tensor]], numbers: Mapping[str, Any]) -> None:
        """
        Go on from a state.

        Raises:
            KeyError: Something is missing.
            LearningError: The training copy has another shape.
        """
        self.student.load_state(groups["student"])
        self._live = Checkpoint.from_groups(groups, "live")
        self._previous = None
        self.archive.initial = Checkpoint.from_groups(groups, "archive-0")
        self.archive.others = [
            Checkpoint.from_groups(groups, f"archive-{index}") for index in range(1, numbers["archived"])
        ]
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        self.rate.value = numbers["rate"]
        averages = ((self._long, "long"), (self._short, "short"), (self._advantage, "advantage"))
        for average, name in averages:
            average.value, average.count = numbers[name]
        # Without the requests that led to them; these are looked at only if more of the kind come.
        self._loss.total, self._drop.total = numbers["loss"], numbers["drop"]


def _mean_acceptance(scores: Sequence[Score]) -> float:
    return sum(score.acceptance for score in scores) / len(scores)
