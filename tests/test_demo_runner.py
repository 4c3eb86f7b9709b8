"""The demo from prompts to files, on tiny random models."""

import errno
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_osd.config import OnlineConfig
from hf_osd.demo import command as demo_command
from hf_osd.demo.command import DemoCommand
from hf_osd.demo.results import CONTENDERS, ONLINE, PLAIN, STATIC
from hf_osd.demo.runner import run_demo
from hf_osd.errors import ConfigError, InputError, UnsupportedModelError
from hf_osd.evaluation import models as evaluation_models
from hf_osd.evaluation.encoding import encode_prompts
from hf_osd.evaluation.models import Pair, load_pair
from hf_osd.learning.selector import Selector

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
SECRET = "zanzibar"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE
    )


def make_model(layers: int, seed: int) -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def pair() -> Pair:
    return Pair(make_model(2, seed=1), make_model(1, seed=2), make_tokenizer())


@pytest.fixture
def folders(pair: Pair, tmp_path: Path) -> dict[str, str]:
    """Save the pair and a file of prompts, and return the options that name them."""
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{SECRET} {n}"}) + "\n" for n in range(9)))
    return {
        "target": str(tmp_path / "target"),
        "assistant": str(tmp_path / "draft"),
        "prompts": str(tmp_path / "prompts.jsonl"),
    }


def test_a_run_leaves_a_table_a_plot_and_all_figures_but_no_prompt(folders: dict[str, str], tmp_path: Path) -> None:
    """Would catch any break between options and files, and prompts that reach the disk."""
    screen, output = io.StringIO(), tmp_path / "runs"
    command = DemoCommand(
        **folders, requests=3, max_new_tokens=12, update_every=2, output=output, device="cpu", budget_seconds=300
    )
    assert command.run(Console(file=screen, width=120))
    assert "All 9 outputs of hf_osd equal the target's own" in screen.getvalue()
    (png,) = output.glob("*.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    (path,) = output.glob("*.json")
    assert SECRET not in path.read_text()
    figures = json.loads(path.read_text())
    assert figures["mismatches"] == 0
    assert figures["about"]["models"]["dtype"] == "float32"
    assert figures["about"]["options"]["update_every"] == 2
    assert torch.__version__.startswith(figures["about"]["versions"]["torch"])
    assert [set(row) for row in figures["requests"]] == [set(CONTENDERS)] * 3
    whole = figures["summary"]["whole_run"]
    assert len({whole[name]["tokens"] for name in CONTENDERS}) == 1  # greedy: all wrote the same
    assert whole[ONLINE]["learning_seconds"] > 0 == whole[STATIC]["learning_seconds"]
    assert whole[PLAIN]["acceptance"] is None
    assert 0 <= (whole[STATIC]["acceptance"] or 0) <= 1 <= whole[STATIC]["tokens_per_target_pass"]


def whole_leads(selector: Selector, scores: Mapping[str, float]) -> str:
    """Follow what is learned, however it does."""
    selector.leader = "whole" if "whole" in scores else "static"
    return selector.leader


def test_contenders_do_not_see_what_the_online_draft_learns(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a static contender that shares weights with the online one, and so hides its gain."""
    # A random pair has little to gain.
    monkeypatch.setattr(Selector, "add", whole_leads)
    before = {name: weight.clone() for name, weight in pair.draft.state_dict().items()}
    seen: list[int] = []
    race = run_demo(
        pair, list("abcdefgh"), OnlineConfig(update_every=1), lambda race: seen.append(len(race.rounds)),
        requests=7, max_new_tokens=8,
    )  # fmt: skip
    assert seen == [*range(1, 8)]
    assert sum(one[ONLINE].updates for one in race.rounds) >= 1
    assert all(torch.equal(weight, before[name]) for name, weight in pair.draft.state_dict().items())


def test_the_budget_ends_the_run_cleanly_after_a_whole_round(pair: Pair) -> None:
    """Would catch a slow machine overrunning the promise of five minutes, or a half-measured request."""
    race = run_demo(pair, ["a", "b", "c", "d"], OnlineConfig(), requests=4, max_new_tokens=4, deadline=0.0)
    assert race.stopped_early
    assert [[*one] for one in race.rounds] == [[*CONTENDERS]]


def test_prompts_use_the_chat_template_and_must_fit(pair: Pair) -> None:
    """Would catch chats flattened by hand, and requests that run out of context at different lengths."""
    chat = [{"role": "user", "content": "hi"}]
    text, same = (pair.tokenizer.decode(one["input_ids"][0]) for one in encode_prompts(pair, ["hi", chat], 8))
    assert text == same == "<bos>[user]hi"
    assert len(encode_prompts(pair, ["hi", "x" * 300], 8)) == 1
    with pytest.raises(InputError, match=r"none of 1 prompts fits .* max_new_tokens=8"):
        encode_prompts(pair, ["x" * 300], 8)
    pair.tokenizer.chat_template = None
    (plain,) = encode_prompts(pair, ["hi"], 8)
    assert pair.tokenizer.decode(plain["input_ids"][0]) == "hi"


@pytest.mark.parametrize("name", ["requests", "max_new_tokens", "draft_length", "update_every", "budget_seconds"])
def test_settings_name_what_is_wrong(name: str) -> None:
    """Would catch a setting of zero that divides by zero, or loops, minutes later."""
    with pytest.raises(ConfigError, match=f"{name} must be .* got 0"):
        DemoCommand(**{name: 0})


def test_a_missing_embedded_pair_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an installation without its models failing in the depths of transformers."""
    monkeypatch.setattr(evaluation_models, "EMBEDDED_PAIR", tmp_path)
    with pytest.raises(UnsupportedModelError, match="cannot load"):
        load_pair(None, None, device="cpu")


def test_the_live_panel_draws_on_a_terminal(folders: dict[str, str], tmp_path: Path) -> None:
    """Would catch a display that only works where no one looks at it."""
    screen = io.StringIO()
    command = DemoCommand(**folders, requests=2, max_new_tokens=4, output=tmp_path / "runs", device="cpu", plot=False)
    assert command.run(Console(file=screen, width=100, force_terminal=True))
    assert "acceptance, online draft" in screen.getvalue()
    assert "2/2" in screen.getvalue()
    assert not list((tmp_path / "runs").glob("*.png"))


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(error: BaseException) -> Any:
    def failing(*arguments: Any, **options: Any) -> None:
        raise error

    return failing


@pytest.mark.parametrize("lost", ["write_json", "write_plot", "run_paths"])
def test_figures_are_printed_where_they_cannot_be_written(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Would catch a run of hours that ends with a full disk and without a figure."""
    monkeypatch.setattr(demo_command, lost, fail(FULL))
    screen = io.StringIO()
    command = DemoCommand(**folders, requests=2, max_new_tokens=4, output=tmp_path / "runs", device="cpu")
    with pytest.raises(ConfigError, match=r"cannot write to .*runs' \(No space left on device\)"):
        command.run(Console(file=screen, width=120))
    assert "All 6 outputs of hf_osd equal the target's own" in screen.getvalue()


def test_figures_are_written_where_they_cannot_be_printed(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a run whose only result was on a terminal that has gone."""
    monkeypatch.setattr(demo_command, "print_report", fail(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        DemoCommand(**folders, requests=2, max_new_tokens=4, output=tmp_path / "runs", device="cpu", plot=False).run()
    assert len(list((tmp_path / "runs").glob("*.json"))) == 1


def test_the_output_is_tried_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch minutes of loading, and hours of measuring, for a folder that is a file."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(demo_command, "load_prompts", fail(AssertionError("too late")))
    with pytest.raises(ConfigError, match="cannot write to"):
        DemoCommand(output=tmp_path / "file", plot=False).run()


@pytest.mark.parametrize("name", [field.name for field in fields(DemoCommand)])
@pytest.mark.parametrize("value", [object(), math.nan, [], b"x", ""], ids=lambda value: type(value).__name__)
def test_every_option_is_checked_when_it_is_set(name: str, value: Any) -> None:
    """Would catch an option that is added without a rule, and one that fails after the models were loaded."""
    with pytest.raises(ConfigError, match=f"^{name} must be .*, got "):
        DemoCommand(**{name: value})


def test_names_that_look_like_markup_are_printed_as_they_are(folders: dict[str, str], tmp_path: Path) -> None:
    """Would catch an error of the terminal's library, about a folder's name, behind a run of hours."""
    screen, output = io.StringIO(), tmp_path / "[" / "b]"
    assert DemoCommand(**folders, requests=2, max_new_tokens=4, output=output, device="cpu", plot=False).run(
        Console(file=screen, width=120)
    )
    assert f"Figures: {output}/demo-" in screen.getvalue()
