"""
Which draft is worth it: depth, width, vocabulary and states of drafts for one target, each distilled by as many steps.

For every draft: what a token costs, how often its first token is the target's on streams that it has not seen, and
the speed-up that follows, by measured costs on this machine and by a stated model of a GPU. Three stages, which go on
where an earlier run was: `distil` on one core, `costs` on an idle machine, then the table.

    python -m benchmarks.drafts --target HuggingFaceTB/SmolLM2-135M-Instruct --stream gsm8k.jsonl \
        --stream spider.jsonl --stream python.jsonl --work work \
        --output benchmarks/results/drafts.json --plot docs/figures/drafts.png
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean, mean
from time import process_time
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_osd.design.blueprints import Blueprint
from hf_osd.design.costs import context_for, step_seconds, target_costs
from hf_osd.design.distilling import distil
from hf_osd.design.gathering import ANSWER_TOKENS, gather
from hf_osd.design.judging import Quality, judge
from hf_osd.design.recipe import Recipe
from hf_osd.design.recording import record
from hf_osd.design.requests import Request, encode_texts, template_tokens
from hf_osd.design.shards import Recording
from hf_osd.design.texts import Text
from hf_osd.design.vocabulary import GENERAL, most_used
from hf_osd.drafts.depth import choose_layers
from hf_osd.drafts.features import FeatureDraft, default_state_layers
from hf_osd.drafts.frontier import Candidate, write_frontier
from hf_osd.drafts.prediction import predict
from hf_osd.drafts.profiles import Profile
from hf_osd.drafts.pruning import prune
from hf_osd.drafts.starting import start
from hf_osd.drafts.states import layers_of
from hf_osd.drafts.width import configured_width
from hf_osd.evaluation.encoding import end_tokens
from hf_osd.evaluation.machine import machine
from hf_osd.evaluation.prompts import load_prompts
from hf_osd.records import Observation

from .common import write_result
from .gpu_model import Gpu, Shape, speedup

TOKEN_DEPTHS = (1, 2, 4, 8)
VOCABULARIES = (1024, 2048, 4096, 8192, 16384)  # general tokens, besides those of the prompt; then all
BATCHES = (1, 4)
PLOTTED = ("1 layer", "2 layers", "tokens, 1 layer", "tokens, 4 layers", "tokens, 8 layers")
STREAM_PROMPTS, STREAM_TOKENS = 24, 64
EVALUATIONS = 1
JUDGED = 12  # held-out answers that a distillation is judged by on the way: the streams are looked at once, at the end


@dataclass(frozen=True)
class Plan:
    """A row of the table: what is made, under a name; `widened` times as wide where that is more than the target."""

    name: str
    blueprint: Blueprint
    widened: int = 1


class Slice(Sequence[Observation]):
    """Recorded texts with the states of some of the layers that were recorded."""

    def __init__(self, recording: Sequence[Observation], columns: torch.Tensor | None, lengths: Sequence[int] = ()):
        self.lengths, self.name = list(lengths), ""
        self._recording, self._columns = recording, columns

    def __len__(self) -> int:
        return len(self._recording)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        one = self._recording[index]
        return replace(one, states=None if self._columns is None else one.states[:, self._columns])


class Bench:
    """What all candidates share: a target, texts to learn from, answers to judge by."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.target: Any = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.bfloat16).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(options.target)
        self.count = len(layers_of(self.target))
        self.recorded = tuple(sorted({*default_state_layers(self.target), *self._spread()}))

    def _spread(self) -> tuple[int, ...]:
        """Six layers: two more than by default."""
        default, step = default_state_layers(self.target), self.count // 10
        return tuple(sorted({*default, 3 * step, 7 * step}))

    @cached_property
    def material(self) -> Any:
        """Texts to learn from, and prompts that are held out."""
        return gather(self.target, self.tokenizer, (), self.options.texts, self.work)

    def _record(self, requests: Sequence[Request], tokens: int) -> Recording:
        places = self.work / "recording"
        return record(self.target, requests, places, state_layers=self.recorded, max_new_tokens=tokens)

    @cached_property
    def learned(self) -> Recording:
        """What the target says of the texts to learn from."""
        return self._record(self.material.learned, ANSWER_TOKENS)

    @cached_property
    def held_out(self) -> Recording:
        """Its answers to prompts that are held out."""
        return self._record(self.material.held_out, ANSWER_TOKENS)

    @cached_property
    def streams(self) -> dict[str, Recording]:
        """Its answers to prompts of streams that nothing was learned from, by name."""
        found = {}
        for path in self.options.stream:
            texts = [Text(prompt) for prompt in load_prompts(path, STREAM_PROMPTS)]
            ends = end_tokens(self.target)
            requests = encode_texts(self.tokenizer, texts, ends[0] if ends else None, 512, STREAM_TOKENS)
            asked = [Request(one.prompt_ids, None, len(one.prompt_ids)) for one in requests]
            name = Path(path).parent.name if Path(path).stem == "stream" else Path(path).stem
            found[name] = self._record(asked, STREAM_TOKENS)
        return found

    @cached_property
    def ranking(self) -> torch.Tensor:
        """All tokens, the most used first."""
        always = {*end_tokens(self.target), *template_tokens(self.tokenizer)}
        texts, size = [*self.learned], self.target.config.vocab_size
        kept, order = set(), list[int]()
        for count in (*VOCABULARIES, size):
            some = most_used(texts, size, always, count).tolist()
            order += [token for token in some if token not in kept]
            kept |= set(some)
        return torch.tensor(order)

    def general(self, size: int) -> torch.Tensor:
        """Return the tokens that are used most, in ascending order."""
        return self.ranking[:size].sort().values

    @cached_property
    def chosen_layers(self) -> dict[int, list[int]]:
        """Layers of token drafts by their number: those that are missed most."""
        path = self.work / "layers.json"
        if not path.is_file():
            path.write_text(json.dumps(choose_layers(self.target, TOKEN_DEPTHS, self.learned[:4])))
        return {int(depth): layers for depth, layers in json.loads(path.read_text()).items()}

    def plans(self) -> list[Plan]:
        """Return the rows of the table."""
        last, states, width = self.count - 1, default_state_layers(self.target), configured_width(self.target)
        one = Blueprint((last,), states)
        found = [
            Plan("1 layer", one),
            Plan("2 layers", replace(one, layers=(last - 1, last))),
            Plan("1 layer, half as wide", replace(one, width=width // 2)),
            Plan("1 layer, twice as wide", one, widened=2),
            Plan("1 layer, last state alone", replace(one, state_layers=(self.count,))),
            Plan("1 layer, six states", replace(one, state_layers=self._spread())),
        ]
        tokens = {depth: Blueprint(tuple(layers)) for depth, layers in self.chosen_layers.items()}
        found += [Plan(f"tokens, {depth} layer{'s'[: depth - 1]}", made) for depth, made in sorted(tokens.items())]
        return [*found, Plan("tokens, 4 layers, half as wide", replace(tokens[4], width=width // 2))]

    def sliced(self, recording: Recording, blueprint: Blueprint) -> Slice:
        """Return recorded texts with the states that a draft reads."""
        hidden, read = self.target.config.hidden_size, blueprint.state_layers
        columns = [torch.arange(hidden) + hidden * self.recorded.index(layer) for layer in read]
        return Slice(recording, torch.cat(columns) if columns else None, recording.lengths)

    def make(self, plan: Plan, vocabulary: int = GENERAL) -> FeatureDraft:
        """Return a cold draft."""
        blueprint = plan.blueprint
        source = prune(self.target, blueprint.layers, width=blueprint.width, observations=self.learned[:4])
        for _ in range(plan.widened - 1):
            widen(source)
        torch.manual_seed(0)
        options = {"layers": len(blueprint.layers), "state_layers": blueprint.state_layers}
        return FeatureDraft.of(self.target, source=source, general=self.general(vocabulary), **options)

    def place(self, plan: Plan) -> Path:
        """Return the folder of a draft."""
        return self.work / plan.name.replace(",", "").replace(" ", "-")

    def distilled(self, plan: Plan) -> FeatureDraft:
        """Return a draft after its distillation, which goes on where an earlier run was."""
        draft = self.make(plan)
        learned, held_out = (self.sliced(texts, plan.blueprint) for texts in (self.learned, self.held_out))
        begun = self.place(plan) / "history.json"
        if not begun.is_file():
            start(draft, learned)
        recipe = Recipe(steps=self.options.steps, evaluations=EVALUATIONS)
        judged = [held_out[number] for number in range(JUDGED)]
        distil(draft, learned, judged, self.place(plan), recipe, lambda found: print(plan.name, found, flush=True))
        return draft

    def qualities(self, draft: FeatureDraft, plan: Plan) -> dict[str, Quality]:
        """Judge a draft by every stream."""
        with torch.autocast("cpu", torch.bfloat16):
            return {name: judge(draft, self.sliced(texts, plan.blueprint)) for name, texts in self.streams.items()}


@torch.no_grad()
def widen(model: Any) -> None:
    """Give every feed-forward part of a model of Llama's kin as many neurons again, whose output begins at zero."""
    width = model.config.intermediate_size
    for layer in layers_of(model):
        for name, other in ((name, getattr(layer.mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")):
            more = torch.zeros_like(other.weight)
            if name != "down_proj":
                more.normal_(0.0, other.weight.std().item(), generator=torch.Generator().manual_seed(0))
            other.weight = nn.Parameter(torch.cat((other.weight, more), dim=int(name == "down_proj")))
    model.config.intermediate_size = 2 * width


def distil_all(bench: Bench) -> None:
    """Distil every draft, and judge it by every vocabulary that is to be in the table."""
    plans = [*enumerate(bench.plans())]
    missing = [(number, plan) for number, plan in plans if not (bench.place(plan) / "quality.json").is_file()]
    for number, plan in missing[: bench.options.at_most]:
        began = process_time()
        draft = bench.distilled(plan)
        seconds = process_time() - began
        everything = bench.target.config.vocab_size
        sizes = (*VOCABULARIES, everything) if number == 0 else (GENERAL,)
        if not plan.blueprint.state_layers:
            sizes = (GENERAL, everything)
        found = {}
        for size in sizes:
            judged = bench.make(plan, size)
            weights = {name: value for name, value in draft.state_dict().items() if name != "general"}
            judged.load_state_dict(weights, strict=False)
            found[size] = {name: asdict(one) for name, one in bench.qualities(judged, plan).items()}
            print(plan.name, size, {name: round(one["agreement"], 3) for name, one in found[size].items()}, flush=True)
        report = {"distilling_cpu_seconds": seconds, "by_vocabulary": found}
        (bench.place(plan) / "quality.json").write_text(json.dumps(report, indent=1))


def measure_costs(bench: Bench) -> None:
    """Measure what a token of each draft costs, on a machine that should have nothing else to do."""
    torch.set_num_threads(bench.options.threads)
    found: dict[str, Any] = {"target": target_costs(bench.target, BATCHES).to_dict(), "steps": {}}
    everything = bench.target.config.vocab_size
    for number, plan in enumerate(bench.plans()):
        sizes = (*VOCABULARIES, everything) if number == 0 else (GENERAL, everything)
        for size in sizes:
            draft = bench.make(plan, size)
            steps = {batch: step_seconds(draft, batch) for batch in BATCHES}
            weights = sum(weight.numel() for weight in draft.parameters())
            found["steps"].setdefault(plan.name, {})[size] = {"seconds": steps, "weights": weights}
            print(plan.name, size, steps, flush=True)
    (bench.work / "costs.json").write_text(json.dumps(found, indent=1))


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table."""
    costs = json.loads((bench.work / "costs.json").read_text())
    target, full = Profile.from_dict(costs["target"]), configured_width(bench.target)
    for plan in bench.plans():
        quality = json.loads((bench.place(plan) / "quality.json").read_text())
        width = (plan.blueprint.width or full) * plan.widened
        for size, streams in quality["by_vocabulary"].items():
            step = costs["steps"][plan.name][size]
            yield {
                "name": plan.name,
                "layers": list(plan.blueprint.layers),
                "state_layers": list(plan.blueprint.state_layers),
                "width": width,
                "vocabulary": int(size),
                "weights": step["weights"],
                "distilling_cpu_seconds": quality["distilling_cpu_seconds"],
                "step_ms": {batch: 1e3 * seconds for batch, seconds in step["seconds"].items()},
                "top1": {name: one["agreement"] for name, one in streams.items()},
                "accepted_of_five": {name: one["accepted"] for name, one in streams.items()},
                **predicted(bench, target, plan, int(size), step["seconds"], width / full, streams),
            }


def predicted(
    bench: Bench,
    target: Profile,
    plan: Plan,
    vocabulary: int,
    seconds: dict[str, float],
    width: float,
    streams: dict[str, Any],
) -> dict[str, Any]:
    """Return speed-ups over plain decoding, the geometric mean of the streams: by measured costs and by a GPU's."""
    chances = [one["chances"] for one in streams.values()]
    context, everything = context_for(bench.target), bench.target.config.vocab_size
    here = {
        batch: geometric_mean(
            predict(target, seconds[str(batch)], each, batch=batch, context=context).speedup for each in chances
        )
        for batch in BATCHES
    }
    made = {"layers": len(plan.blueprint.layers), "width": width, "states": len(plan.blueprint.state_layers)}
    gpu = {
        name: speedup(
            Gpu(), shape, chances, vocabulary=shape.vocabulary if vocabulary == everything else vocabulary, **made
        )
        for name, shape in gpu_targets(bench).items()
    }
    return {"speedup": here, "gpu_speedup": gpu}


def gpu_targets(bench: Bench) -> dict[str, Shape]:
    """Return the target itself, and one of the size of Llama-3.1-8B, taken to accept as often as the target here."""
    config, layer = bench.target.config, layers_of(bench.target)[0]
    weights = sum(weight.numel() for weight in layer.parameters())
    itself = Shape(bench.count, config.hidden_size, weights, config.vocab_size)
    return {"itself": itself, "8B": Shape(32, 4096, 218e6, 128_256)}


def plot(bench: Bench, table: Sequence[dict[str, Any]]) -> None:
    """Draw cost against acceptance, for a batch of one."""
    target = Profile.from_dict(json.loads((bench.work / "costs.json").read_text())["target"])
    points = [
        Candidate(row["name"], row["step_ms"]["1"] / 1e3, mean(row["top1"].values()))
        for row in table
        if row["vocabulary"] == GENERAL and row["name"] in PLOTTED
    ]
    write_frontier(target, points, bench.options.plot, context=context_for(bench.target))


def main() -> None:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--stream", action="append", required=True, help="JSON lines of prompts, as often as you like")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=120, help="of each distillation: a minute or two of a core")
    parser.add_argument("--threads", type=int, default=2, help="of the costs; a distillation takes one")
    parser.add_argument("--stage", choices=("all", "distil", "costs", "table"), default="all")
    parser.add_argument("--at-most", type=int, help="drafts to distil in this run")
    parser.add_argument("--work", default="work")
    parser.add_argument("--output")
    parser.add_argument("--plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    if options.stage in ("all", "distil"):
        distil_all(bench)
    if options.stage in ("all", "costs"):
        measure_costs(bench)
    if options.stage in ("all", "table"):
        table = [*rows(bench)]
        about = {
            "machine": machine(bench.target.device),
            "gpu": asdict(Gpu()),
            "gpu_targets": {name: asdict(shape) for name, shape in gpu_targets(bench).items()},
        }
        shared = {"steps": options.steps, "texts": bench.material.about, "threads_of_costs": options.threads}
        write_result({**about, **shared, "rows": table}, options.output)
        if options.plot:
            plot(bench, table)


if __name__ == "__main__":
    main()
