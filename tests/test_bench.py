"""`hf-osd bench` on tiny random models: what it reports, refuses and keeps, not how fast anything is."""

import errno
import io
import json
import math
import os
import string
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from seq2seq import encoder_decoder
from test_demo_runner import make_model, make_tokenizer
from tongues import tokenizer

from hf_osd import OnlineStats
from hf_osd.bench import command as bench_command
from hf_osd.bench import serving
from hf_osd.bench.command import BenchCommand
from hf_osd.bench.compiled import CompiledGenerate, try_compiling
from hf_osd.bench.figures import has_mismatch, ratios, rounded, speedups, summarise
from hf_osd.bench.plots import draw_serving, write_plot
from hf_osd.bench.serving import PLAIN
from hf_osd.bench.session import Session
from hf_osd.drafts.features import FeatureDraft
from hf_osd.errors import ConfigError
from hf_osd.evaluation.contenders import Generate, Sample
from hf_osd.evaluation.models import Pair, load_pair
from hf_osd.evaluation.race import Race
from hf_osd.evaluation.streams import make_stream

SECRET = "zanzibar"
TIMES = {"ms_per_token": 1.0, "total_seconds": 1.0, "acceptance": 0.5}
ABOUT = {
    "models": {"kind": "given", "parameters": {"target": 1, "draft": 1}, "dtype": "float32"},
    "machine": {"processor": "a $\\frac"},
    "threads": 1,
}

ODD = {"object": object(), "nan": math.nan, "bytes": b"x", "empty": "", "number": [3], "empty text": [""]}


def silent(description: str, total: int) -> Callable[[], None]:
    return lambda: None


def fail(error: BaseException) -> Any:
    def failing(*arguments: Any, **options: Any) -> None:
        raise error

    return failing


@pytest.fixture
def session() -> Session:
    pair = Pair(make_model(2, seed=1), make_model(1, seed=2), make_tokenizer())
    stream = make_stream(pair, "letters", ["a", "bcd", "ef"], 8)
    return Session(pair=pair, streams=[stream], max_new_tokens=8, steps=silent)


def test_serving_reports_every_contender_with_equal_outputs(session: Session) -> None:
    """Would catch a contender that is left out of a table, or whose output is not compared."""
    (stream,) = serving.run(session)["streams"].values()
    found = stream["contenders"]
    fixed = next(name for name in found if name.startswith("transformers assisted, ") and name != serving.ASSISTED)
    assert [*found] == [
        PLAIN, serving.ASSISTED, fixed, serving.LOOKUP, serving.STATIC, serving.ONLINE,
    ]  # fmt: skip
    assert {one["tokens"] for one in found.values()} == {found[PLAIN]["tokens"]}
    assert all(len(one["seconds_by_request"]) == 2 for one in found.values())  # the third prompt warms up
    assert [*stream["speedup_over"]] == [PLAIN, serving.ASSISTED, fixed]
    assert stream["outputs"] == {"requests": 2, "near_ties": 0, "mismatches": []}
    assert [*stream["assisted_ms_per_token_by_fixed_length"]] == [1, 2, 3, 4, 6, 8]


def test_a_draft_that_transformers_cannot_take_sits_out_of_its_assisted_generation(session: Session) -> None:
    """Would catch a draft that runs without the states it reads, and so makes transformers look slow."""
    pair = replace(session.pair, draft=FeatureDraft.of(session.pair.target))
    (stream,) = serving.run(replace(session, pair=pair))["streams"].values()
    assert [*stream["contenders"]] == [PLAIN, serving.LOOKUP, serving.STATIC, serving.ONLINE]
    assert [*stream["speedup_over"]] == [PLAIN]
    assert stream["outputs"]["mismatches"] == []


def test_the_best_fixed_length_is_set_for_one_contender_alone(session: Session) -> None:
    """Would catch transformers' defaults being measured with another contender's settings."""
    pair = session.pair
    stock = Generate("defaults", pair.target, pair.draft)
    fixed = Generate("fixed", pair.target, pair.draft, serving.fixed_settings(3))
    ours, theirs = fixed.draft, stock.draft
    assert ours is not None
    assert theirs is not None
    assert ours.generation_config.num_assistant_tokens == 3
    assert theirs.generation_config.num_assistant_tokens is None is pair.draft.generation_config.num_assistant_tokens
    assert ours.lm_head.weight is pair.draft.lm_head.weight


def test_a_sample_counts_its_own_request_alone(session: Session) -> None:
    """Would catch counters of the whole stream, or of the stream so far, in the figures of one request."""
    with ExitStack() as stack:
        ours = session.assisted(stack, "ours", session.static(draft_length=2, draft_length_schedule="constant"))
        (_, first), (_, second) = (ours.answer(session.streams[0].requests[0], **session.options) for _ in range(2))
        stats = ours.assistant.stats()
    assert (first.drafted, first.accepted, first.passes) == (second.drafted, second.accepted, second.passes)
    assert first.drafted > 0
    assert stats - OnlineStats() == stats
    assert stats.draft_tokens == 2 * second.drafted
    assert sum(second.stages.values()) <= second.seconds
    with pytest.raises(TypeError, match="unsupported operand"):
        stats - 1


def test_the_static_cache_serves_request_after_request(session: Session) -> None:
    """Would catch a cache that still holds the last request; compilation itself is transformers'."""
    pair, options = session.pair, session.options
    compiled = CompiledGenerate("static cache", pair.target, capacity=40, compiles=False)
    for request in session.streams[0].requests * 2:
        expected, _ = Generate(PLAIN, pair.target).answer(request, **options)
        found, sample = compiled.answer(request, **options)
        assert torch.equal(found, expected)
        assert sample.tokens == expected.numel()


def test_ratios_and_speedups_point_the_right_way() -> None:
    """Would catch a slower contender that is reported as a faster one."""
    race = Race([{"plain": Sample(10, 1.0), "slow": Sample(10, seconds)} for seconds in (2.0, 3.0)])
    figures = {name: summarise(race, name) for name in ("plain", "slow")}
    assert ratios(figures, "plain") == {"plain": 1.0, "slow": 2.5}
    assert speedups(figures, "plain") == {"plain": 1.0, "slow": pytest.approx(0.4)}


def test_mismatches_are_found_wherever_a_race_reports_them() -> None:
    """Would catch exit code 0 for a wrong output of the second stream."""
    assert has_mismatch({"streams": [{"outputs": {"mismatches": []}}, {"outputs": {"mismatches": [1]}}]})
    assert not has_mismatch({"streams": [{"outputs": {"mismatches": []}}]})


def test_figures_survive_the_way_through_json() -> None:
    """Would catch figures that JSON changes: integer names, tuples, digits that say nothing."""
    found = rounded({"sweep": {3: 1.23456789}, "seconds": (1, 2.0), "none": None})
    assert found == json.loads(json.dumps(found)) == {"sweep": {"3": 1.23457}, "seconds": [1, 2.0], "none": None}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A tiny pair, a file of prompts and a folder, as options."""
    for name, model in (("target", make_model(2, seed=1)), ("draft", make_model(1, seed=2))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "p.txt").write_text(f"{SECRET} one\ntwo\nthree\n")
    return {
        "target": str(tmp_path / "target"), "assistant": str(tmp_path / "draft"), "prompts": [str(tmp_path / "p.txt")],
        "requests": 2, "max_new_tokens": 4, "device": "cpu", "output": tmp_path / "out", "plot": False,
    }  # fmt: skip


def test_a_run_leaves_a_json_and_a_plot_but_no_prompt(options: dict[str, Any]) -> None:
    """Would catch any break between options, figures, tables and plots, and prompts that reach the disk."""
    screen, folder = io.StringIO(), options["output"]
    assert BenchCommand(**options | {"plot": True}).run(Console(file=screen, width=160))
    document = json.loads((folder / "serving.json").read_text())
    assert SECRET not in (folder / "serving.json").read_text()
    assert document["suite"] == "serving"
    assert {*document["about"]} == {"command", "options", "models", "threads", "machine", "versions"}
    assert document["about"]["models"]["parameters"]["target"] > 0
    assert (folder / "serving.png").read_bytes().startswith(b"\x89PNG")
    for word in ("serving: p", "over plain", "tokens/pass", "Plot:"):
        assert word in screen.getvalue()
    assert "efficiency" not in screen.getvalue()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["encoders", "two tokenizers"])
def test_other_pairs(options: dict[str, Any], tmp_path: Path, kind: str, batch: int) -> None:
    """Would catch contenders that cut answers, pad sources or tokenize otherwise: outputs would not be equal."""
    words, draft = make_tokenizer(), make_model(1, seed=2)
    if kind == "encoders":
        draft = encoder_decoder("bart", 7, dtype=torch.float32, vocab_size=259)
        encoder_decoder("bart", dtype=torch.float32, vocab_size=259).save_pretrained(tmp_path / "target")
    else:
        words = tokenizer(string.ascii_lowercase)
        draft.resize_token_embeddings(len(words))
    for made in (draft, words):
        made.save_pretrained(tmp_path / "draft")
    (tmp_path / "p.txt").write_text("one\ntwenty\nthree\nfourteen\n")
    screen = io.StringIO()
    assert BenchCommand(**options | {"batch": batch}).run(Console(file=screen, width=160))
    assert (serving.ASSISTED in screen.getvalue()) == (batch == 1)
    if kind == "encoders":
        with pytest.raises(ConfigError, match="compiled=True does not go with a target that has an encoder"):
            BenchCommand(**options, compiled=True).compiles(load_pair(options["target"], options["assistant"], "cpu"))


@pytest.mark.parametrize("name", [field.name for field in fields(BenchCommand)])
@pytest.mark.parametrize("value", [*ODD.values()], ids=[*ODD])
def test_every_option_is_checked_when_it_is_set(name: str, value: Any) -> None:
    """Would catch an option that is added without a rule, and one that fails after the models were loaded."""
    with pytest.raises(ConfigError, match=f"^{name} must be .*, got "):
        BenchCommand(**{name: value})


def test_without_a_compiler_nothing_is_measured(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a run that measures all contenders but the last, which needs a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function: fail(RuntimeError("No working\nC++ compiler found")))
    monkeypatch.setattr(bench_command, "load_pair", fail(AssertionError("too late")))
    with pytest.raises(ConfigError, match="nothing can be compiled here: No working C\\+\\+ compiler found"):
        BenchCommand(**options, compiled=True).run(Console(file=io.StringIO()))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    try_compiling("cpu")


def test_figures_that_cannot_be_written_are_printed(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a full disk that takes the figures with it, and the name of a stream that looks like markup."""
    monkeypatch.setattr(bench_command, "write_json", fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    name = Path(options["prompts"][0]).with_name("[b].txt")
    Path(options["prompts"][0]).rename(name)
    screen = io.StringIO()
    with pytest.raises(ConfigError, match=r"cannot write to .*out' \(No space left on device\)"):
        BenchCommand(**options | {"prompts": [str(name)]}).run(Console(file=screen, width=160))
    assert "serving: [b]" in screen.getvalue()


def test_the_output_is_tried_before_anything_is_loaded(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch hours of measurements whose figures have no place to go."""
    options["output"].write_text("x")
    monkeypatch.setattr(bench_command, "load_prompt_streams", fail(AssertionError("too late")))
    with pytest.raises(ConfigError, match="cannot write to"):
        BenchCommand(**options).run(Console(file=io.StringIO()))


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("name", ["$\\frac{", "[/b]", "日本", "a$b$c"])
def test_names_of_files_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    """Would catch a dollar in a file's name that is taken for mathematics, at the end of a run."""
    document = {"about": ABOUT, "figures": {"streams": {name: {"contenders": {"plain": TIMES}}}}}
    assert write_plot(document, draw_serving, tmp_path / "serving.png").stat().st_size > 0
