"""A finished design: the draft, its figures, and how both are written to a folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafts.features import FeatureDraft
from ..drafts.frontier import Candidate as Point
from ..drafts.frontier import write_frontier
from ..drafts.profiles import Profile
from ..evaluation.contenders import Sample
from ..evaluation.machine import machine, versions
from .candidates import Candidate
from .card import write_card
from .costs import context_for
from .history import Evaluation
from .recipe import Recipe
from .speed import NEW_TOKENS, PLAIN


@dataclass(frozen=True)
class Design:
    """
    A finished design.

    Attributes:
        draft (`FeatureDraft`): The chosen draft, in the target's dtype; it borrows from the target.
        chosen (`str`): Its name: the fastest of those that were distilled.
        candidates (`list[Candidate]`): What was weighed, the most promising one first.
        histories (`dict[str, list[Evaluation]]`): Of those that were distilled, by name.
        speeds (`dict[str, Sample]`): Of these, and of `"plain"` decoding, on held-out prompts.
        costs (`Profile`): Of the target's passes.
        data (`Mapping[str, Any]`): What it was made of, in figures.
        recipe ([`~hf_osd.design.recipe.Recipe`]): How each was distilled.
        command (`str`): What made it.
    """

    draft: FeatureDraft
    chosen: str
    candidates: list[Candidate]
    histories: dict[str, list[Evaluation]]
    speeds: dict[str, Sample]
    costs: Profile
    data: Mapping[str, Any]
    recipe: Recipe
    command: str

    @property
    def speedup(self) -> float:
        """Tokens per second of the draft over those of plain decoding."""
        plain = self.speeds[PLAIN].tokens_per_second
        return self.speeds[self.chosen].tokens_per_second / plain if plain else 0.0

    def facts(self, target: PreTrainedModel) -> dict[str, Any]:
        """Return all of it as plain data, with the machine and the versions."""
        config = self.draft.config
        return {
            "target": _public_name(config.target) or type(target).__name__,
            "command": self.command,
            "dtype": str(target.dtype).removeprefix("torch."),
            "draft": {
                "name": self.chosen,
                "layers": config.text_config.num_hidden_layers,
                "state_layers": config.state_layers,
                "parameters": sum(weight.numel() for weight in self.draft.parameters()),
                "general_tokens": config.general_tokens,
            },
            "data": dict(self.data),
            "recipe": asdict(self.recipe),
            "pass_seconds": self.costs.seconds(1, context_for(target), 1),
            "candidates": [{"name": one.name, **asdict(one)} for one in self.candidates],
            "histories": {name: [one.to_dict() for one in history] for name, history in self.histories.items()},
            "tokens_per_second": {name: speed.tokens_per_second for name, speed in self.speeds.items()},
            "new_tokens": NEW_TOKENS,
            "machine": machine(target.device) | {"threads": torch.get_num_threads()},
            "versions": versions(),
        }

    def write(self, folder: Path, target: PreTrainedModel, plot: bool) -> None:
        """
        Write a folder that `from_pretrained` loads: the draft, its model card, `design.json` and `frontier.png`.

        Args:
            folder (`Path`): Where; made if missing.
            target (`PreTrainedModel`): The target.
            plot (`bool`): Whether to draw the picture, which needs matplotlib.

        Raises:
            OSError: A file cannot be written.
        """
        facts = self.facts(target)
        self.draft.save_pretrained(folder)
        (folder / "design.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        write_card(folder, facts, self.histories[self.chosen])
        if plot:
            write_frontier(self.costs, self._points(), folder / "frontier.png", context=context_for(target))

    def _points(self) -> list[Point]:
        steps = {one.name: one.step_seconds for one in self.candidates}
        return [
            Point(name, steps[name], max(one.quality.agreement for one in history))
            for name, history in self.histories.items()
        ]


def _public_name(target: str) -> str:
    """Return a Hub id as it is, and the name of a folder of this machine without its path."""
    return Path(target).resolve().name if target and Path(target).exists() else target
