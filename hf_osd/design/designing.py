"""Makes a draft for a target: gathers and records texts, weighs drafts, distils, measures, chooses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafts.features import FeatureDraft, default_state_layers
from ..drafts.machine import digest
from ..drafts.starting import start
from ..drafts.states import layers_of
from ..evaluation.contenders import Sample
from ..evaluation.encoding import end_tokens
from ..evaluation.output import try_output, writing
from ..storage.files import write_file
from .blueprints import Blueprint, blueprints, make_draft, settled
from .candidates import Candidate, named, promising, weigh
from .costs import target_costs
from .display import Display
from .distilling import distil
from .gathering import ANSWER_TOKENS, Material, gather, own_prompts
from .history import Evaluation
from .processes import first_alone, is_first, shared
from .recipe import Recipe
from .recording import record
from .requests import Request, template_tokens
from .results import Design
from .shards import Recording
from .speed import PLAIN, measure_speeds
from .vocabulary import most_used

if TYPE_CHECKING:
    from rich.console import Console

WORK = "work"
"""Folder beside the draft with recorded texts and checkpoints, from which a run resumes. Can be deleted afterwards."""

_TIMED = 13  # held-out prompts that are answered to time drafts; the first one warms up


def design_draft(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    *,
    prompts: Sequence[str] = (),
    texts: int = 2000,
    candidates: Sequence[str] = (),
    recipe: Recipe | None = None,
    plot: bool = True,
    console: "Console | None" = None,
    command: str = "hf_osd.design_draft(...)",
) -> Design:
    """
    Make a draft for a decoder-only target, offline, and write it to a folder.

    The draft borrows the target's embedding and output head, and proposes from the tokens that are used most. Whether
    it reads the target's hidden states or tokens alone, how many layers it has and how wide they are follows from what
    a token costs here. Its layers start as copies of the target's. A run that is cut off goes on where it
    was when it is called again with the same arguments.

    Args:
        target (`PreTrainedModel`): The target, where it is going to run. Never changed.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        output (`str` or `Path`): Folder to write; made if missing. Its folder `work` holds what a run resumes from.
        prompts (`Sequence[str]`, *optional*): Files and data sets of prompts, with answers or without, like those the
            draft is going to serve; see [`~hf_osd.design.texts.load_texts`]. `"stdlib"` stands for the documented
            functions of Python's standard library, and `"target"` for prompts that the target writes itself. Without
            any, both of these.
        texts (`int`, defaults to 2000): How many texts to record, at most.
        candidates (`Sequence[str]`, *optional*): Names of the drafts to consider, such as `"1-layer"`, where the draft
            is going to serve on another machine than this one. All, if left out.
        recipe (`Recipe`, *optional*): How to distil; defaults to `Recipe()`, which takes 15 minutes.
        plot (`bool`, defaults to `True`): Whether to draw `frontier.png`, which needs matplotlib.
        console ([`~rich.console.Console`], *optional*): Where to say how far it is; nowhere if left out.
        command (`str`, *optional*): What the model card says that it was made by.

    Returns:
        [`~hf_osd.design.results.Design`]: The draft, and what was found on the way.

    Raises:
        PromptSourceError: A source cannot be read.
        InputError: Too few texts fit into the target's context.
        UnsupportedModelError: No draft can be made of this architecture, or the target has no chat template to write
            prompts with.
        ConfigError: The folder cannot be written, or no draft has such a name.

    Example:

    ```python
    >>> import hf_osd
    >>> design = hf_osd.design_draft(target, tokenizer, "draft", prompts=["my.jsonl"])
    >>> assistant = hf_osd.OnlineAssistant(design.draft, target)
    ```
    """
    folder, recipe = Path(output), recipe or Recipe()
    try_output(folder)
    simplest = Blueprint((len(layers_of(target)) - 1,))
    make_draft(target, simplest, torch.arange(1))  # raises before the work, if no draft can be made
    plans = named(blueprints(target), candidates)
    designer = _Designer(target, tokenizer, folder / WORK, plans, recipe, Display(console if is_first() else None))
    design = designer.run(prompts, texts, command)
    if is_first():
        with writing(folder):
            design.write(folder, target, plot)
    return design


class _Designer:
    """The stages of a design. With several processes, the first one records and measures; all distil."""

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        work: Path,
        plans: Sequence[Blueprint],
        recipe: Recipe,
        display: Display,
    ) -> None:
        self._target, self._tokenizer = target, tokenizer
        self._work, self._plans, self._recipe, self._display = work, plans, recipe, display

    def run(self, sources: Sequence[str], limit: int, command: str) -> Design:
        """Gather texts, weigh candidates, distil the promising ones, and return that which serves fastest."""
        material = self._gather(sources, limit)
        held_out = self._record("prompts to judge by", material.held_out)
        learned = self._record("texts to learn from", material.learned)
        general = self._general(learned)
        costs, candidates = shared(self._weigh(general, learned) if is_first() else None)
        drafts, histories = {}, {}
        worth_it = self._promising(candidates, learned)
        for one in worth_it:
            draft = self._started(one, general, learned)
            histories[one.name] = self._distil(one, draft, learned, held_out, self._recipe.shared(len(worth_it)))
            drafts[one.name] = draft
        speeds = shared(self._measure(drafts, material.held_out) if is_first() else None)
        chosen = max(drafts, key=lambda name: speeds[name].tokens_per_second)
        made = (drafts[chosen], chosen, candidates, histories, speeds, costs)
        design = Design(*made, data=material.about, recipe=self._recipe, command=command)
        self._display.say(
            f"{chosen}: {speeds[chosen].tokens_per_second:.1f} tokens per second on held-out prompts, plain decoding "
            f"{speeds[PLAIN].tokens_per_second:.1f}: {design.speedup:.2f} times"
        )
        return design

    def _gather(self, sources: Sequence[str], limit: int) -> Material:
        count = own_prompts(self._tokenizer, sources, limit)
        with first_alone(), self._display.progress("prompts by the target", count) as tell:
            return gather(self._target, self._tokenizer, sources, limit, self._work, self._recipe.seed, tell)

    def _record(self, label: str, requests: Sequence[Request]) -> Recording:
        with first_alone(), self._display.progress(label, len(requests)) as tell:
            found = record(
                self._target,
                requests,
                self._work / "recording",
                state_layers=default_state_layers(self._target),
                max_new_tokens=ANSWER_TOKENS,
                tell=tell,
            )
        self._display.say(f"{len(found)} {label}: {sum(found.lengths):,} tokens")
        return found

    def _general(self, learned: Recording) -> torch.Tensor:
        always = {*end_tokens(self._target), *template_tokens(self._tokenizer)}
        return most_used(learned, self._target.config.get_text_config(decoder=True).vocab_size, always)

    def _weigh(self, general: torch.Tensor, learned: Recording) -> tuple[object, list[Candidate]]:
        costs = target_costs(self._target)
        candidates = weigh(self._target, costs, general, self._plans, learned)
        for one in candidates:
            self._display.say(
                f"{one.name}: {1e3 * one.step_seconds:.2f} ms a token, {one.speedup:.2f} times plain decoding if it "
                "learns as well as may be hoped"
            )
        return costs, candidates

    def _promising(self, candidates: list[Candidate], learned: Recording) -> list[Candidate]:
        """Return what to distil. A run that resumes keeps its choice: costs measured again may lead to another one."""
        plans = sorted(one.name for one in candidates)
        path = self._work / f"promising-{digest([learned.name, *plans])}.json"
        with first_alone():
            if not path.is_file():
                write_file(path, json.dumps([one.name for one in promising(candidates)]).encode())
        names = json.loads(path.read_text(encoding="utf-8"))
        return [one for one in candidates if one.name in names]

    def _started(self, candidate: Candidate, general: torch.Tensor, learned: Recording) -> FeatureDraft:
        """Make a draft, started in closed form, or by the weights of an earlier run."""
        path = self._place(candidate, learned) / "start.safetensors"
        with first_alone():
            if not path.is_file():
                made = settled(self._target, candidate.blueprint, learned)
                draft = make_draft(self._target, made, general, learned)
                start(draft, learned)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({name: weight.contiguous() for name, weight in draft.state_dict().items()}, path)
        draft = make_draft(self._target, candidate.blueprint, general, learned)
        draft.load_state_dict(load_file(path))
        return draft

    def _distil(
        self, candidate: Candidate, draft: FeatureDraft, learned: Recording, held_out: Recording, recipe: Recipe
    ) -> list[Evaluation]:
        name = candidate.name
        with self._display.progress(f"distilling {name}", 100) as tell:

            def note(found: Evaluation) -> None:
                tell(100 * recipe.progress(found.step, 60 * found.minutes))
                self._display.evaluation(name, found)

            return distil(draft, learned, [*held_out], self._place(candidate, learned), recipe, note)

    def _place(self, candidate: Candidate, learned: Recording) -> Path:
        """Return the folder of a distillation, which is another one for other texts."""
        return self._work / f"{candidate.name}-{learned.name}"

    def _measure(self, drafts: dict[str, FeatureDraft], held_out: Sequence[Request]) -> dict[str, Sample]:
        prompts = [request.prompt_ids for request in held_out[:_TIMED]]
        prompts = prompts if len(prompts) > 1 else prompts * 2  # one to warm up
        with self._display.progress("timing", len(prompts)) as tell:
            return measure_speeds(self._target, drafts, prompts, tell=tell)
