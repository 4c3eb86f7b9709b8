"""
Fill the tables of docs/laboratory.md, docs/routing.md and README.md from the results that the benchmarks wrote.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; TABLES says what NAME is.

    python -m benchmarks.tables          # write
    python -m benchmarks.tables --check  # fail where a table and its results differ
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "docs" / "laboratory.md", ROOT / "docs" / "routing.md", ROOT / "README.md")
RESULTS = ROOT / "benchmarks" / "results"

DOMAINS = {"spider": "text to SQL", "python": "code", "gsm8k": "maths", "general": "general", "finance": "finance"}
DOMAINS |= {"summaries": "code to docstring"}
RATES = {f"algorithm_1@{float(rate)}": f"Algorithm 1, {rate}" for rate in ("1e-4", "3e-4", "1e-3", "3e-3")}
NAMES = {
    "static": "static draft",
    **RATES,
    "defaults": "**defaults**",
    "lora": "LoRA, `peft_config={}`",
    "offline": "offline, three epochs",
}
Stream = Mapping[str, Any]


@cache
def streams(name: str) -> Mapping[str, Stream]:
    """Return the streams of a result, by name."""
    found: Mapping[str, Stream] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["streams"]
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; the first cell of the header is empty."""
    lines = [["", *header], ["---"] * (len(header) + 1), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def rate(value: float | None, form: str = ".3f") -> str:
    """Return a rate without its leading zero; nothing for none."""
    return "" if value is None else re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{form}}")


def final(stream: Stream, recipe: str) -> float | None:
    """Return the acceptance over the last quarter."""
    run = stream["recipes"].get(recipe)
    return run and float(run["final_acceptance"])


def goal(stream: Stream, name: str) -> float | None:
    """Return what a goal came to with the defaults; `None` where it has no figure."""
    value: float | None = stream["recipes"]["defaults"]["goals"].get(name)
    return value


def share(stream: Stream) -> str:
    """Return after how many requests the defaults are where Algorithm 1 at its best ends."""
    value = goal(stream, "share_to_reach_algorithm_1")
    return "not reached" if value is None else f"{round(value * stream['requests'])} ({value:.0%})"


def domains(found: Mapping[str, Stream]) -> str:
    """Final acceptance by recipe, and how the defaults do against the goals."""
    columns = list(found.values())
    recipes = [recipe for recipe in NAMES if any(recipe in stream["recipes"] for stream in columns)]
    rows = [[NAMES[recipe], *(_cell(stream, recipe) for stream in columns)] for recipe in recipes]
    rows.append(["requests until Algorithm 1's best final rate", *map(share, columns)])
    worst = [rate(goal(stream, "worst_window_above_static"), "+.4f") for stream in columns]
    rows.append(["worst window of 100 against static", *worst])
    return table([DOMAINS.get(name, name.partition("-")[0]) for name in found], rows)


def _cell(stream: Stream, recipe: str) -> str:
    """A final rate, bold where it is the best of all that learn as requests come."""
    online = [final(stream, one) or 0.0 for one in NAMES if one not in ("static", "offline")]
    value = final(stream, recipe)
    best = recipe not in ("static", "offline") and value == max(online)
    return f"**{rate(value)}**" if best else rate(value)


def segments(stream: Stream) -> str:
    """Acceptance by part of a stream, the worst window, and the change on return."""
    header = [label for label, _, _ in stream["segments"]] + ["worst window of 100 against static"]
    returns = stream["kind"] == "return"
    rows = []
    for recipe, run in stream["recipes"].items():
        goals = run["goals"] or {}
        row = [NAMES[recipe], *map(rate, run["acceptance_by_segment"])]
        row.append(rate(goals.get("worst_window_above_static"), "+.4f"))
        rows.append([*row, rate(goals.get("change_on_return"), "+.3f")] if returns else row)
    return table([*header, "change on return"] if returns else header, rows)


def quarters(columns: Mapping[str, Stream]) -> str:
    """Acceptance by quarter of streams without parts."""
    recipes = [recipe for recipe in NAMES if all(recipe in stream["recipes"] for stream in columns.values())]
    runs = ([stream["recipes"][recipe]["acceptance_by_quarter"] for stream in columns.values()] for recipe in recipes)
    rows = [
        [NAMES[recipe], *(" ".join(map(rate, run)) for run in row)] for recipe, row in zip(recipes, runs, strict=True)
    ]
    return table(list(columns), rows)


def seeds(found: Mapping[str, Stream]) -> str:
    """Final acceptance and worst window of the defaults over seeds: mean, least, most."""
    columns = list(found.values())
    rows = [
        ["static draft", *(rate(final(stream, "static")) for stream in columns)],
        ["**defaults**", *(_spread(_by_seed(stream, "final_acceptance"), ".3f") for stream in columns)],
        [
            "worst window of 100 against static",
            *(_spread(_by_seed(stream, "worst_window_above_static"), "+.4f") for stream in columns),
        ],
    ]
    return table(list(map(_label, found)), rows)


def _by_seed(stream: Stream, figure: str) -> list[float]:
    runs = [run for name, run in stream["recipes"].items() if name.startswith("seeds@")]
    return [{**run, **run["goals"]}[figure] for run in runs]


def _spread(values: Sequence[float], form: str) -> str:
    return f"{rate(statistics.fmean(values), form)} ({rate(min(values), form)} to {rate(max(values), form)})"


def variants(found: Mapping[str, Stream]) -> str:
    """Final acceptance and accepted tokens of variants, each stream by itself."""
    recipes = {recipe: None for stream in found.values() for recipe in stream["recipes"]}
    rows = [[f"`{recipe}`", *(_both(stream, recipe) for stream in found.values())] for recipe in recipes]
    return table([DOMAINS[name] for name in found], rows)


def _both(stream: Stream, recipe: str) -> str:
    run = stream["recipes"].get(recipe)
    return "" if run is None else f"{rate(run['final_acceptance'])} ({run['final_accepted_per_round']:.2f})"


def _quarters() -> str:
    found = streams("learning_streams")
    return quarters({name.partition("-")[0]: one for name, one in found.items() if one["kind"] in ("gradual", "mix")})


def _segments(result: str, start: str) -> str:
    return segments(next(stream for name, stream in streams(result).items() if name.startswith(start)))


def smollm2() -> str:
    """Final acceptance and worst window of a draft that reads its target, on a model that people know."""
    columns = streams("learning_smollm2")
    worst = [stream["recipes"]["feature"]["goals"]["worst_window_above_static"] for stream in columns.values()]
    rows = [
        [label, *(rate(final(stream, recipe)) for stream in columns.values())]
        for label, recipe in (("static draft", "static"), ("**online**", "feature"))
    ]
    rows.append(["worst window of 100 against static", *(rate(value, "+.4f") for value in worst)])
    return table(list(map(_label, columns)), rows)


def live() -> str:
    """Acceptance of requests that were served, by window."""
    found = json.loads((RESULTS / "live_shift.json").read_text(encoding="utf-8"))
    ends = [found["window"] * (index + 1) for index in range(len(found["recipes"]["static"]["acceptance_by_window"]))]
    header = [f"{end - found['window'] + 1} to {end}" for end in ends]
    runs = found["recipes"].items()
    rows = [
        [NAMES[name], *map(rate, run["acceptance_by_window"]), str(run["outputs_that_differ"])] for name, run in runs
    ]
    return table([*header, "outputs that differ"], rows)


def selector() -> str:
    """Final acceptance and worst window of the defaults, by the gate that was and by the selector; equal streams."""
    before = {**streams("learning"), **streams("learning_streams")}
    rows = []
    for name, after in streams("learning_selector").items():
        was = before.get(name)
        if was is None or was["requests"] != after["requests"]:
            continue
        learned = [final(was, one) or 0.0 for one in was["recipes"] if one.startswith("algorithm_1")]
        windows = [rate(goal(stream, "worst_window_above_static"), "+.4f") for stream in (was, after)]
        cells = [final(was, "static"), max(learned), final(was, "defaults"), final(after, "defaults")]
        rows.append([_label(name), *map(rate, cells), *windows])
    return table(["static", "Algorithm 1 at its best", "gate", "selector", "worst, gate", "worst, selector"], rows)


def _label(name: str) -> str:
    return DOMAINS.get(name, name.partition("-")[0])


def real() -> str:
    """Times plain decoding on a real model: the whole run by stream, and the last quarter."""
    found = json.loads((RESULTS / "real_smollm2.json").read_text(encoding="utf-8"))
    names = {
        "transformers lookup": "transformers prompt lookup",
        "lookup alone": "hf_osd, lookup alone",
        "static": "**hf_osd, static draft**",
        "online": "**hf_osd, online draft**, learning counted in",
    }
    parts = [*(stream["whole_run"] for stream in found["streams"].values()), found["geometric_means"]["whole_run"]]
    parts.append(found["geometric_means"]["last_quarter"])
    rows = [[label, *(f"{part[f'{name} over plain']:.2f}" for part in parts)] for name, label in names.items()]
    streams = [DOMAINS[name] for name in found["streams"]]
    return table([*streams, "all (geometric mean)", "the last quarter of all"], rows)


def routes() -> str:
    """Acceptance on a mix of domains by how many drafts there are and what routes to them."""
    (stream,) = streams("learning_routes").values()
    names = {"static": "static draft", "defaults": "one draft", "by_topic": "`ByTopic(4)`", "by_key": "`osd_route`"}
    rows = []
    for recipe, label in names.items():
        run = stream["recipes"][recipe]
        worst = rate((run["goals"] or {}).get("worst_window_above_static"), "+.4f")
        seconds = f"{run['learned']['seconds']:.0f}" if recipe != "static" else ""
        rows.append([label, *map(rate, run["acceptance_by_quarter"]), worst, seconds])
    return table(["1st quarter", "2nd", "3rd", "last", "worst window", "learning, s"], rows)


def mixed_batches() -> str:
    """Seconds of a batch by how many drafts serve its rows."""
    seconds = json.loads((RESULTS / "mixed_batches.json").read_text(encoding="utf-8"))["seconds"]
    return table(list(seconds), [["seconds a batch", *(f"{value:.2f}" for value in seconds.values())]])


TABLES: Mapping[str, Callable[[], str]] = {
    "domains": lambda: domains(streams("learning")),
    "return": lambda: _segments("learning_streams", "return"),
    "shift": lambda: _segments("learning_streams", "shift"),
    "quarters": _quarters,
    "seeds": lambda: seeds(streams("learning_seeds")),
    "smollm2": smollm2,
    "lora": lambda: variants(streams("learning_lora")),
    "variants": lambda: variants(streams("learning_variants")),
    "matched pair": lambda: domains(streams("learning_matched_pair")),
    "encoder-decoder pair": lambda: domains(streams("learning_encoder_decoder")),
    "embedded pair": lambda: domains(streams("learning_embedded_pair")),
    "live": live,
    "hostile": lambda: _segments("learning_hostile", "shift-gsm8k"),
    "real": real,
    "routes": routes,
    "mixed batches": mixed_batches,
    "selector": selector,
}


def filled(text: str, tables: Mapping[str, Callable[[], str]] | None = None) -> str:
    """Return a document with its tables as the results have them; `TABLES` by default."""
    tables = TABLES if tables is None else tables
    pattern = re.compile(r"(<!-- table: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}\n{tables[match[2]]()}\n\n{match[3]}", text)


def main() -> None:
    """Fill the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if options.check and filled(text) != text:
            sys.exit(f"{document.name} differs from its results: run python {Path(__file__).name}")
        document.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
