"""What the developers' suites get beside what [`~hf_osd.bench.session.Session`] has: a floor, a script, guests."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_osd.bench import session
from hf_osd.config import OnlineConfig
from hf_osd.evaluation.contenders import Contender
from hf_osd.evaluation.encoding import Inputs
from hf_osd.evaluation.race import Race
from hf_osd.evaluation.streams import Stream

from .floor import Floor, Watch, Watched, watched
from .scripted import Script


@dataclass(frozen=True, kw_only=True)
class Session(session.Session):
    """
    One run of the suites.

    Attributes:
        floor (`Floor`): Replays the pair's forwards.
        next_topic (`Stream`, *optional*): Where the topic of the first stream suddenly changes to.
        script (`Script`, *optional*): What the draft says, where it is scripted: it has nothing to learn then.
        peers (`bool`): Whether other packages take part in `serving`.
        eagle3 (`Path`, *optional*): economize's trained `eagle3`, for these.
    """

    floor: Floor
    next_topic: Stream | None = None
    script: Script | None = None
    peers: bool = False
    eagle3: Path | None = None

    def online(self, **settings: Any) -> OnlineConfig:
        """Return the settings of an assistant; prompt lookup would only find what random weights repeat."""
        return super().online(**settings | ({} if self.script is None else {"prompt_lookup": False}))

    def race(
        self, contenders: Sequence[Contender], requests: Sequence[Inputs], title: str = "", **settings: Any
    ) -> Race:
        """Run a race; a scripted draft is told beforehand what the target is about to say."""
        return super().race(contenders, requests, title, prepare=self._prepare, **settings)

    def measure(
        self, contenders: Sequence[Contender], requests: Sequence[Inputs], title: str = "", **settings: Any
    ) -> tuple[Race, dict[str, Any]]:
        """Run a race whose forwards are noted and replayed; its figures have efficiencies among them."""
        watch = Watch(self.floor, len(requests))
        race, figures = super().measure(contenders, requests, title, answer=watch, **settings)
        for name, found in figures["contenders"].items():
            found |= efficiency(watched(race, name))
        return race, figures

    def _prepare(self, request: Inputs) -> None:
        if self.script is not None:
            self.script.learn_answer(self.pair.target, request, self.options)


def efficiency(samples: Sequence[Watched]) -> dict[str, Any]:
    """
    Return what a contender's forwards alone would have taken.

    `engine_efficiency` is the median, over the requests that were replayed, of the floor of their forwards divided by
    their wall-clock time; `None` where none was.
    """
    shares = [one.efficiency for one in samples if one.efficiency is not None]
    return {
        "engine_efficiency": statistics.median(shares) if shares else None,
        "floor_by_request": [one.floor and round(one.floor, 6) for one in samples] if shares else [],
    }
