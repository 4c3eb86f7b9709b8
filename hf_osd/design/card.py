"""The model card of a designed draft: what it is, how it was made, and what it can do."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .history import Evaluation
from .texts import BY_THE_TARGET, STDLIB

_CARD = """---
library_name: transformers
{base}tags:
- speculative-decoding
- hf-osd
---

# A draft for {target}

It proposes tokens, which `{target}` checks, several in one pass: the output is that model's own, and comes faster.

It is a `FeatureDraft` of hf_osd, with {parameters:.1f}M parameters: {layers}, reading {reads}.
Embedding and output head are the target's, used in place: they are not in this folder, and without its
target the draft is of no use.

```python
import hf_osd
from transformers import AutoModelForCausalLM, AutoTokenizer

target = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{target}")
assistant = hf_osd.OnlineAssistant.from_pretrained("{folder}", target)
inputs = tokenizer("Hello", return_tensors="pt")
output = hf_osd.generate(target, **inputs, online_assistant=assistant, max_new_tokens=64)
```

It goes on learning from what it serves.

## Licence

Its layers began as copies of layers of `{target}`, and it learned from what that model says of the texts below. The
licence of the target applies to it, and so may theirs.

## How it was made

```
{command}
```

| | |
|---|---|
{facts}

## Acceptance by minute of distillation

Of positions in the target's answers to held-out prompts: the share where the draft's first choice is the target's
token, and how many of five tokens, drafted from its own states, the target accepts on average.

{history}

## Speed

Of answers to held-out prompts, one at a time, of up to {new_tokens} tokens. The draft did not learn meanwhile; the
lookup in the text, which `hf_osd.generate` uses by default, is counted in.

{speeds}
"""


def write_card(folder: Path, facts: dict[str, Any], history: Sequence[Evaluation]) -> Path:
    """
    Write `README.md`.

    Args:
        folder (`Path`): Where; must exist.
        facts (`dict`): What `design.json` says; see [`~hf_osd.design.results.Design.facts`].
        history (`Sequence[Evaluation]`): Of the draft's distillation.

    Returns:
        `Path`: The file.
    """
    draft = facts["draft"]
    text = _CARD.format(
        target=facts["target"],
        base=f"base_model: {facts['target']}\n" if "/" in facts["target"] else "",
        folder=folder.name,
        layers="one layer" if draft["layers"] == 1 else f"{draft['layers']} layers",
        parameters=draft["parameters"] / 1e6,
        reads=_reads(draft["state_layers"]),
        command=facts["command"],
        facts="\n".join(f"| {name} | {value} |" for name, value in _about(facts)),
        history=_history(history),
        new_tokens=facts["new_tokens"],
        speeds=_speeds(facts),
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _about(facts: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    data = facts["data"]
    yield "texts", f"{data['texts']}, of which {data['with_given_answers']} had answers; the target wrote the others"
    yield "from", _sources(data)
    yield "held out", f"{data['held_out']} prompts"
    yield "vocabulary", f"{facts['draft']['general_tokens']:,} tokens, besides those of prompts and earlier outputs"
    yield "dtype", facts["dtype"]
    yield from ((name.replace("_", " "), value) for name, value in facts["machine"].items())
    yield from facts["versions"].items()


def _sources(data: dict[str, Any]) -> str:
    """Name files by their last two parts, without the folders of this machine."""
    names = {
        STDLIB: "documented functions of Python's standard library",
        BY_THE_TARGET: f"{data['prompts_by_the_target']} prompts that the target wrote",
    }
    sources = data["sources"] or [STDLIB, *([BY_THE_TARGET] if data["prompts_by_the_target"] else [])]
    return ", ".join(names.get(source) or f"`{'/'.join(Path(source).parts[-2:])}`" for source in sources)


def _history(history: Sequence[Evaluation]) -> str:
    head = ["| minute | step | first token | accepted of five |", "|---|---|---|---|"]
    return "\n".join(
        head
        + [
            f"| {one.minutes:.1f} | {one.step} | {one.quality.agreement:.3f} | {one.quality.accepted:.2f} |"
            for one in history
        ]
    )


def _speeds(facts: dict[str, Any]) -> str:
    rates = facts["tokens_per_second"]
    rows = ["| | tokens per second | over plain |", "|---|---|---|"]
    rows += [f"| {name} | {rate:.1f} | {rate / rates['plain']:.2f} |" for name, rate in rates.items()]
    return "\n".join(rows)


def _reads(state_layers: Sequence[int]) -> str:
    if not state_layers:
        return "tokens alone"
    return f"the target's hidden states after layers {_joined(state_layers)} through a map in front"


def _joined(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
