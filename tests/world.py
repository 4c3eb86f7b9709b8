"""A supervisor whose judge reads scores from a table, and whose training is a change of version."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from traffic import Live, request

from hf_osd.config import OnlineConfig
from hf_osd.learning.journal import Journal
from hf_osd.learning.judge import Judge, Score, Weights
from hf_osd.learning.path import LearnedPath
from hf_osd.learning.replay import ReplayBuffer
from hf_osd.learning.student import Student
from hf_osd.learning.supervisor import Supervisor
from hf_osd.records import Observation

# Its first value names a version of the weights, the initial ones are version 0; its second is how far they lie on the
# way to that version.
MARK = "model.norm.weight"
EVERY = 4
# Acceptance by kind of request, its number, version of the weights, and how far they go.
Table = Callable[[int, int, int, float], float]


class World:
    """Requests of some kind and a number, versions of the weights, and what the supervisor makes of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, table: Table, seed: int = 0, **settings: Any) -> None:
        self.table = table
        self.live = Live(seed=seed)
        self._marks(self.live.draft)[:2] = 0.0
        self.refuses_to_publish = False
        self.count = 0
        self.expected = 0.0  # acceptance of what was published last
        self.judged: list[tuple[int, int]] = []  # version and number of the request
        config = OnlineConfig(**{"update_every": EVERY, **settings})
        self.replay = ReplayBuffer(config.replay_size, holds_out=config.gate)
        self.journal = Journal()
        student = Student(self.live.draft)
        parts = (self.replay, self.journal, self.publish, lambda: None)
        self.supervisor = Supervisor(self.live.draft, student, config, *parts)
        monkeypatch.setattr(Judge, "scores", lambda judge, weights, requests: self.scores(weights, requests))
        _keep_versions_whole(monkeypatch)

    @staticmethod
    def _marks(model: torch.nn.Module) -> torch.Tensor:
        return dict(model.named_parameters())[MARK].data

    def scores(self, weights: Weights, requests: Sequence[Observation]) -> list[Score]:
        version, mixing = (weights[MARK] if weights else self._marks(self.live.draft))[:2].tolist()
        numbers = [tuple(map(int, request.prompt_ids)) for request in requests]
        self.judged += [(int(version), number) for _, number in numbers]
        rates = [self.table(kind, number, int(version), mixing) for kind, number in numbers]
        return [Score(rate, 5 * rate, 12) for rate in rates]

    def publish(self, weights: Mapping[str, torch.Tensor], acceptance: float) -> None:
        if self.refuses_to_publish:
            raise RuntimeError("no room")
        self.live.publish(weights, acceptance)
        self.expected = acceptance

    @property
    def version(self) -> int:
        """Of the live draft."""
        return int(self._marks(self.live.draft)[0])

    @property
    def mixing(self) -> float:
        """How far the live draft has gone on the way to its version."""
        return float(self._marks(self.live.draft)[1])

    @property
    def copy(self) -> int:
        """Version of the training copy."""
        return int(self._marks(self.supervisor.student.model)[0])

    @property
    def decisions(self) -> list[str]:
        return [update.decision for update in self.journal.updates]

    def take(self, kind: int, count: int, at_once: bool = False) -> None:
        made = []
        for _ in range(count):
            self.count += 1
            made.append(replace(request(0), prompt_ids=torch.tensor([kind, self.count])))
        for part in [made] if at_once else [[one] for one in made]:
            self.supervisor.take(part)

    def train(self, version: int) -> str:
        """An update that makes the training copy another version."""
        self.supervisor.begin_update()
        self._marks(self.supervisor.student.model)[:2] = torch.tensor([version, 1.0])
        return self.supervisor.finish_update(0.5, 0.1)

    def learn(self, kind: int, version: int, tested: int = 2 * EVERY) -> str:
        """An update and, unless that goes live, requests that test what it has led to, and another one."""
        if self.train(version) == "published":
            return "published"
        self.take(kind, tested)
        return self.train(version)

    def archived(self) -> list[int]:
        return [int(one.weights[MARK][0]) for one in self.supervisor.archive.all()]

    def saved_version(self) -> int:
        """Of what a restart would take for the live weights."""
        groups, _ = self.supervisor.state()
        return int(groups["live"][MARK][0])


def _keep_versions_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are names: neither their average nor what lies between them means anything."""
    follow, at = LearnedPath.follow, LearnedPath.at

    def follow_latest(path: LearnedPath, weights: Weights) -> None:
        follow(path, weights)
        path.average[MARK][0] = weights[MARK][0]

    def at_latest(path: LearnedPath, mixing: float) -> dict[str, torch.Tensor]:
        found = at(path, mixing)
        found[MARK][0] = path.average[MARK][0]
        return found

    monkeypatch.setattr(LearnedPath, "follow", follow_latest)
    monkeypatch.setattr(LearnedPath, "at", at_latest)


def table(**rates: Sequence[float]) -> Table:
    """Acceptance by kind (`kind1=...`) and version, however far they go."""
    return lambda kind, number, version, mixing: rates[f"kind{kind}"][version]


def published(monkeypatch: pytest.MonkeyPatch, rates: Table, **settings: Any) -> World:
    """A world in which version 1 was published for requests of kind 1."""
    world = World(monkeypatch, rates, **settings)
    world.take(1, 48)
    assert world.learn(1, 1) == "published"
    return world


# Each version knows one kind of requests.
FOUR = table(
    kind1=(0.2, 0.9, 0.2, 0.2), kind2=(0.2, 0.2, 0.9, 0.2), kind3=(0.2, 0.2, 0.2, 0.9), kind4=(0.2, 0.8, 0.2, 0.2)
)


def visit(world: World, kind: int, requests: int = 48) -> None:
    """Traffic of a kind until its version of the weights is live, trained if it is not known, and then some more."""
    world.take(kind, requests)
    if world.version != kind:
        assert world.learn(kind, kind) == "published"
        world.take(kind, requests)
