"""The weights that are live, and those that can take their place."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..records import Observation
from .archive import Archive, Checkpoint, ScoreBook
from .judge import Judge, Score, Weights, token_mean
from .watch import Watch

# Other weights than the initial ones go live after an alarm if their acceptance on the requests that raised it is this
# much higher; and weights are remembered if theirs was for as many requests.
CLEARLY, _MEMORABLE = 0.05, 32


class Incumbent:
    """
    What is live, how it does, and what can be made live again.

    Args:
        initial (`Checkpoint`): The draft before it learned anything.
        archive_size (`int`): Weights of earlier traffic to remember.
        judge (`Judge`): Scores weights.
        publish (`Callable[[Weights, float], None]`): Makes weights live; told the acceptance to expect of them.

    Attributes:
        live (`Checkpoint`): What is live.
        archive (`Archive`): What can be made live again.
        scores (`ScoreBook`): Of all of these.
        watch (`Watch`): Of what is live.
    """

    def __init__(
        self, initial: Checkpoint, archive_size: int, judge: Judge, publish: Callable[[Weights, float], None]
    ) -> None:
        self.live = initial
        self.archive = Archive(initial, archive_size)
        self.scores = ScoreBook(self._score)
        self.watch = Watch()
        self._judge = judge
        self._publish = publish
        self._previous: Checkpoint | None = None
        self._remembered = 0

    def _score(self, checkpoint: Checkpoint, observations: Sequence[Observation]) -> list[Score]:
        return self._judge.scores({} if checkpoint is self.live else checkpoint.weights, observations)

    def acceptance(self, checkpoint: Checkpoint, observations: Sequence[Observation]) -> float:
        """Return the acceptance of some weights on requests, in [0, 1]."""
        scores = self.scores.of(checkpoint, observations)
        return token_mean((score.acceptance, score.positions) for score in scores)

    def go_live(self, checkpoint: Checkpoint, tested: Sequence[Observation]) -> None:
        """
        Make weights live.

        Args:
            checkpoint (`Checkpoint`): The weights.
            tested (`Sequence[Observation]`): Requests that they were tested on. Without any, they are expected to do
                as well as those before.
        """
        expected = self.acceptance(checkpoint, tested) if tested else self.watch.usual
        self._publish(checkpoint.weights, expected)  # first: if that fails, the others stay live
        self.live, self._previous = checkpoint, self.live
        if tested:
            self.begin_watch(tested)

    def restore(self, checkpoint: Checkpoint, tested: Sequence[Observation]) -> None:
        """Make earlier weights live again, which are better on some requests."""
        self.go_live(checkpoint, tested)
        self.archive.use(checkpoint)
        self._previous = None
        self.watch.clear()

    def memorable(self, request: int) -> Checkpoint | None:
        """Return the live weights if they are new and worth remembering for when their traffic comes back."""
        is_new = self.live not in self.archive.all()
        is_worth_it = request - self._remembered >= _MEMORABLE and self.watch.advantage > CLEARLY
        return self.live if is_new and is_worth_it else None

    def remember(self, checkpoint: Checkpoint | None, request: int) -> None:
        """Keep weights that are or were live until a request, if there are any."""
        if checkpoint is None:
            return
        kept = checkpoint.on_cpu()
        self.live = kept if self.live is checkpoint else self.live
        self.archive.add(kept)
        self._remembered = request

    def best_fallback(self, suspects: Sequence[Observation]) -> Checkpoint:
        """Return the earlier weights to go live instead: the initial ones, unless others do clearly better."""
        initial = self.archive.initial
        others = (one for one in (*self.archive.others, self._previous) if one is not None and one is not self.live)
        rates = {one: self.acceptance(one, suspects) for one in (initial, *(others if self.watch.may_risk else ()))}
        best = max(rates, key=lambda one: rates[one])
        return best if rates[best] >= rates[initial] + CLEARLY else initial

    def begin_watch(self, tested: Sequence[Observation]) -> None:
        """Watch what is live from what it and the initial weights made of some requests."""
        live, initial = (self.scores.of(one, tested) for one in (self.live, self.archive.initial))
        self.watch.begin(list(zip(live, initial, strict=True)))

    def keep_scores(self, others: Iterable[Checkpoint], observations: Sequence[Observation]) -> None:
        """Forget all scores but those of these requests."""
        self.scores.keep([self.live, *self.archive.all(), *others], observations)

    def state(self) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, Any]]:
        """Return groups of tensors, which do not change any more, and numbers for JSON."""
        archived = self.archive.all()
        groups: dict[str, Mapping[str, torch.Tensor]] = dict(self.live.on_cpu().groups("live"))
        for index, checkpoint in enumerate(archived):
            groups |= checkpoint.groups(f"archive-{index}")
        return groups, {
            "archived": len(archived),
            "live": next((index for index, checkpoint in enumerate(archived) if checkpoint is self.live), None),
            "remembered": self._remembered,
            "acceptance": self.watch.usual,
            "watch": self.watch.state_dict(),
        }

    def load_state(self, groups: Mapping[str, Mapping[str, torch.Tensor]], numbers: Mapping[str, Any]) -> None:
        """
        Go on from a state.

        Raises:
            KeyError: Something is missing.
        """
        archived = [Checkpoint.from_groups(groups, f"archive-{index}") for index in range(numbers["archived"])]
        self.archive.initial, *self.archive.others = archived
        place = numbers["live"]
        self.live = Checkpoint.from_groups(groups, "live") if place is None else archived[place]
        self._remembered = numbers["remembered"]
        self.watch.load_state_dict(numbers["watch"])
