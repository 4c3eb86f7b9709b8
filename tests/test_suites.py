"""The suites on tiny random models: what they report, not how fast anything is."""

import io
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import tiny_model
from hf_osd.bench.results import SUITES, read_results, write_result
from rich.console import Console
from test_demo_runner import make_model, make_tokenizer

from benchmarks.suites.floor import Floor
from benchmarks.suites.scripted import Script
from benchmarks.suites.shapes import CallRecorder, Shape
from hf_osd import ConfigError, HfOsdError, OnlineStats
from hf_osd.bench import engine, lengths, promise, serving
from hf_osd.bench.command import BenchCommand, _mismatches, run_replot
from hf_osd.bench.figures import ratios, round_breakdown, speedups, summarise
from hf_osd.bench.session import Session, without_eos
from hf_osd.demo.results import PLAIN
from hf_osd.errors import InputError
from hf_osd.evaluation.contenders import CompiledGenerate, Generate, Sample
from hf_osd.evaluation.models import Pair
from hf_osd.evaluation.race import Race, compare, run_race
from hf_osd.evaluation.streams import batches, load_prompt_streams, make_stream, texts_of_length

SECRET = "zanzibar"


def silent(description: str, total: int) -> Callable[[], None]:
    return lambda: None


@pytest.fixture
def session() -> Session:
    pair = Pair(make_model(2, seed=1), make_model(1, seed=2), make_tokenizer())
    stream = make_stream(pair, "letters", ["a", "bcd", "ef"], 8)
    return Session(
        pair=pair,
        streams=[stream],
        floor=Floor({"target": pair.target, "draft": pair.draft}),
        max_new_tokens=8,
        steps=silent,
        next_topic=make_stream(pair, "digits", ["1", "22", "3"], 8),
    )


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
    assert all(one["engine_efficiency"] > 0 for one in found.values())
    assert [*stream["speedup_over"]] == [PLAIN, serving.ASSISTED, fixed]
    assert stream["outputs"] == {"requests": 2, "near_ties": 0, "mismatches": []}
    assert [*stream["assisted_ms_per_token_by_fixed_length"]] == [1, 2, 3, 4, 6, 8]


def test_a_scripted_draft_serves_without_learning_or_lookup(session: Session) -> None:
    """Would catch an engine's cost mixed up with what a random target happens to repeat."""
    scripted = Session(**{**vars(session), "script": Script(session.pair.draft, 1.0)})
    assert not scripted.static().prompt_lookup
    (stream,) = serving.run(scripted)["streams"].values()
    assert serving.ONLINE not in stream["contenders"]
    assert stream["contenders"][serving.STATIC]["acceptance"] in (1.0, None)


def test_the_best_fixed_length_is_set_for_one_contender_alone(session: Session) -> None:
    """Would catch transformers' defaults being measured with another contender's settings."""
    pair = session.pair
    stock = Generate("defaults", pair.target, pair.draft)
    fixed = Generate("fixed", pair.target, pair.draft, serving.fixed_settings(3))
    ours, theirs = fixed.models["draft"], stock.models["draft"]
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
    race = session.race([compiled], session.streams[0].requests, floor=session.floor)
    assert summarise(race, compiled.name)["engine_efficiency"] is None


def test_the_engine_is_measured_along_every_axis(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an axis that varies two settings at once, and contexts that a model does not have."""
    monkeypatch.setattr(engine, "AXES", {"batch": (1, 3), "draft_length": (0, 2), "context": (16, 1024)})
    monkeypatch.setattr(engine, "BASE", engine.Point(batch=1, draft_length=2, context=16))
    eos = session.pair.target.generation_config.eos_token_id
    figures = engine.run(session)
    assert session.pair.target.generation_config.eos_token_id == eos is not None
    assert [point["batch"] for point in figures["axes"]["batch"]] == [1, 3]
    assert [point["draft_length"] for point in figures["axes"]["draft_length"]] == [0, 2]
    assert figures["skipped"] == [{"batch": 1, "draft_length": 2, "context": 1024}]
    one, three = figures["axes"]["batch"]
    assert [*one["contenders"]] == [engine.GENERATE, engine.PLAIN, engine.OURS, engine.STOCK]
    assert [*three["contenders"]] == [engine.GENERATE, engine.PLAIN, engine.OURS]
    assert three["contenders"][engine.OURS]["tokens"] == 3 * 8 * engine.REPEATS
    assert [*one["round_ms"]] == ["draft", "verify", "accept", "record", "bookkeeping"]
    assert one["round_ms"]["verify"] > 0
    assert all(found["engine_efficiency"] > 0 for found in three["contenders"].values())


def test_lengths_are_compared_with_the_best_fixed_one(session: Session) -> None:
    """Would catch a schedule that is compared with itself, or length 0 missing from the candidates."""
    (stream,) = lengths.run(session)["streams"].values()
    assert [*stream["contenders"]] == [
        *map(str, range(9)), "heuristic", "confidence", lengths.DRAFT_ONLY, lengths.MEASURED,
    ]  # fmt: skip
    over = stream["total_time_over_best_fixed_length"]
    assert over[str(stream["best_fixed_length"])] == 1.0 == min(over[str(length)] for length in range(9))
    assert stream["contenders"]["0"]["acceptance"] is None
    assert stream["outputs"]["mismatches"] == []


def test_the_promise_is_tested_on_every_hard_case(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a case that is served with the wrong draft, stream or batch size."""
    monkeypatch.setattr(promise, "BATCH", 2)
    by_name = {case.name: case for case in promise.cases(session)}
    weight = session.pair.draft.lm_head.weight
    assert not torch.equal(by_name["a random draft"].draft.lm_head.weight, weight)
    slow = by_name["a draft as slow as the target"].draft
    assert slow is not session.pair.target
    assert slow.num_parameters() == session.pair.target.num_parameters()
    shifted = by_name["a sudden change of topic"].requests
    assert shifted == [session.streams[0].requests[0], session.next_topic.requests[0]]
    assert by_name["a sudden change of topic, learning"].config.learn
    assert not by_name["a random draft"].config.prompt_lookup
    (batch,) = by_name["batch 2"].requests
    assert len(batch["input_ids"]) == len(by_name["batch 2"].warm_up["input_ids"]) == 2
    assert by_name["batch 2"].warm_up is not batch
    figures = promise.run(session)
    assert [*figures["cases"]] == [*by_name]
    for case in figures["cases"].values():
        assert case["kept"] == (case["ratio"] <= figures["limit"])
        assert case["outputs"]["mismatches"] == []


def test_ratios_and_speedups_point_the_right_way() -> None:
    """Would catch a slower contender that is reported as a faster one."""
    race = Race({"plain": [Sample(10, 1.0), Sample(10, 1.0)], "slow": [Sample(10, 2.0), Sample(10, 3.0)]})
    assert ratios(race, "plain") == {"plain": 1.0, "slow": 2.5}
    figures = {name: summarise(race, name) for name in race.samples}
    assert speedups(figures, "plain") == {"plain": 1.0, "slow": pytest.approx(0.4)}


def test_a_round_is_a_forward_of_the_target() -> None:
    """Would catch stages divided by tokens, or by forwards of the draft."""
    stages = {"draft": 0.4, "verify": 0.8, "accept": 0.0, "record": 0.0, "bookkeeping": 0.2}
    forwards = [Shape("target", 1, 3, 0, 3)] * 4 + [Shape("draft", 1, 1, 0, 1)] * 8
    race = Race({"ours": [Sample(10, 1.0, stages=stages, forwards=forwards)]})
    assert round_breakdown(race, "ours") == pytest.approx(
        {"draft": 100.0, "verify": 200.0, "accept": 0.0, "record": 0.0, "bookkeeping": 50.0}
    )


class Liar:
    """A contender that notes its turns, and says what it is told to."""

    def __init__(self, name: str, turns: list[str], target: Any, said: list[int]) -> None:
        self.name, self.turns, self.said = name, turns, said
        self.models = {"target": target}

    def recorder(self) -> CallRecorder:
        return CallRecorder({})

    def answer(self, inputs: Any, **options: Any) -> tuple[torch.Tensor, Sample]:
        self.turns.append(self.name)
        return torch.tensor([self.said]), Sample(len(self.said), 1.0)


def test_who_goes_first_rotates_and_wrong_outputs_are_found(session: Session) -> None:
    """Would catch a contender that always runs on warm caches, and outputs that nobody compares."""
    turns: list[str] = []
    target = session.pair.target
    said = {"a": [5, 6], "b": [5, 6], "c": [5, 7]}
    contenders = [Liar(name, turns, target, tokens) for name, tokens in said.items()]
    requests = session.streams[0].requests
    race = run_race(contenders, requests, {})
    assert turns == [*"abc", *"abc", *"bca"]  # the first round warms up
    assert [(item.contender, item.position, item.request) for item in race.differences] == [("c", 1, 0), ("c", 1, 1)]
    assert _mismatches({"streams": [{"outputs": {"mismatches": [1]}}]})
    assert not _mismatches({"streams": [{"outputs": {"mismatches": []}}]})


class Turns(Floor):
    """A floor that notes its turns."""

    def __init__(self, turns: list[str]) -> None:
        super().__init__({})
        self.turns = turns

    def seconds(self, shapes: Any) -> float:
        self.turns.append("floor")
        return 0.5


def test_forwards_are_replayed_right_after_their_request_and_not_for_all_of_a_long_stream(session: Session) -> None:
    """Would catch floors measured at another time than their requests, and runs that take twice as long."""
    turns: list[str] = []
    contenders = [Liar(name, turns, session.pair.target, [5, 6]) for name in "ab"]
    race = run_race(contenders, session.streams[0].requests[:1] * 33, {}, floor=Turns(turns))
    assert turns[:10] == ["a", "floor", "b", "floor"] * 2 + ["b", "a"]
    assert turns.count("floor") == 2 * (1 + 11)  # of every third request, and of the one that warms up
    assert [one.efficiency for one in race.samples["a"][:4]] == [0.5, None, None, 0.5]


def test_rows_of_a_batch_are_compared_without_their_padding() -> None:
    """Would catch a tie that is judged on logits behind padding, which are not the row's own."""
    target = tiny_model()
    request = {"input_ids": torch.tensor([[0, 0, 7, 8], [3, 4, 5, 6]]), "attention_mask": torch.ones(2, 4)}
    request["attention_mask"][0, :2] = 0
    outputs = {"plain": torch.tensor([[9, 9], [9, 9]]), "ours": torch.tensor([[9, 1], [9, 9]])}
    (found,) = compare(target, request, outputs, "plain", index=3)
    best, second = target(torch.tensor([[7, 8, 9]])).logits[0, -1].topk(2).values.tolist()
    assert (found.request, found.contender, found.position) == (3, "ours", 1)
    assert found.gap == pytest.approx(best - second)


def test_batches_are_padded_on_the_left_and_full(session: Session) -> None:
    """Would catch requests that are served twice, whose answers prompt lookup knows, and misplaced padding."""
    requests = make_stream(session.pair, "letters", ["a", "bcd", "ef", "g", "hi", "k"], 8).requests
    assert [len(batch["input_ids"]) for batch in batches(requests, 2, pad_token_id=0)] == [2, 2]
    some = make_stream(session.pair, "letters", ["a", "bcd", "ef", "g"], 8, count=1)
    assert [len(some.requests), len(some.spare)] == [1, 2]
    (batch,) = batches(requests, 9, pad_token_id=0)
    assert batch["input_ids"].shape == (5, max(one["input_ids"].shape[1] for one in requests))
    for row in range(5):
        kept = batch["input_ids"][row, batch["attention_mask"][row].bool()]
        assert torch.equal(kept, requests[row]["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == sorted(batch["attention_mask"][row].tolist())


def test_rows_of_one_length_are_different_stretches_of_text(session: Session) -> None:
    """Would catch a batch of equal rows, whose acceptance is that of one request."""
    batch = texts_of_length(session.streams[0].requests, batch=4, length=10)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 10)
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) == 4


def test_eos_comes_back_after_an_error(session: Session) -> None:
    """Would catch a failed point of measurement that lets all later suites run on."""
    config = session.pair.target.generation_config
    with pytest.raises(ZeroDivisionError), without_eos(session.pair):
        raise ZeroDivisionError(config.eos_token_id)
    assert config.eos_token_id == 2


def test_streams_are_named_by_their_files(tmp_path: Path) -> None:
    """Would catch two streams of one file name that overwrite each other's figures."""
    for name in ("maths/stream.txt", "sql/stream.txt", "other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hello\n")
    paths = [str(tmp_path / name) for name in ("maths/stream.txt", "sql/stream.txt")]
    assert [*load_prompt_streams(paths, 1)] == ["maths/stream", "sql/stream"]
    assert [*load_prompt_streams([str(tmp_path / "other.txt")], 1)] == ["other"]
    with pytest.raises(ConfigError, match=r"prompts names a source twice, got .*other\.txt"):
        load_prompt_streams([str(tmp_path / "other.txt")] * 2, 1)


def test_a_stream_needs_a_prompt_that_warms_up(session: Session) -> None:
    """Would catch a request that is timed after it was served already."""
    with pytest.raises(InputError, match="stream 'short' has one prompt that fits"):
        make_stream(session.pair, "short", ["a"], 8)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Save a tiny pair and a file of prompts, and return the options that name them."""
    for name, model in (("target", make_model(2, seed=1)), ("draft", make_model(1, seed=2))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    for name in "pq":
        rows = [json.dumps({"prompt": f"{SECRET} {name}{number}"}) + "\n" for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return {
        "target": str(tmp_path / "target"), "assistant": str(tmp_path / "draft"),
        "prompts": [str(tmp_path / f"{name}.jsonl") for name in "pq"], "requests": 2, "max_new_tokens": 6,
        "device": "cpu", "output": tmp_path / "out",
    }  # fmt: skip


def test_a_run_leaves_json_and_plots_that_can_be_drawn_again(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch any break between options, figures, tables and plots, and prompts that reach the disk."""
    monkeypatch.setattr(engine, "AXES", {"batch": (1, 2), "draft_length": (0, 2), "context": (16,)})
    monkeypatch.setattr(engine, "BASE", engine.Point(batch=1, draft_length=2, context=16))
    monkeypatch.setattr(promise, "BATCH", 2)
    screen, folder = io.StringIO(), options["output"]
    assert BenchCommand(**options).run(Console(file=screen, width=160))
    assert [path.stem for path, _ in read_results(folder)] == [*SUITES]
    for path, document in read_results(folder):
        assert SECRET not in path.read_text()
        assert {"command", "options", "models", "threads", "machine", "versions"} == {*document["about"]}
        assert document["about"]["models"]["parameters"]["target"] > 0
    for word in ("serving: p", "engine: by batch", "draft lengths: p", "a random draft", "Plot:"):
        assert word in screen.getvalue()
    plots = [folder / f"{suite}.png" for suite in SUITES]
    drawn = [plot.read_bytes() for plot in plots]
    for plot in plots:
        plot.unlink()
    run_replot(folder, Console(file=io.StringIO()))
    assert [plot.read_bytes() for plot in plots] == drawn
    assert all(png.startswith(b"\x89PNG") for png in drawn)


def test_figures_survive_the_way_through_json(tmp_path: Path) -> None:
    """Would catch figures that JSON changes: integer names, tuples, digits that say nothing."""
    write_result(tmp_path, "serving", {"threads": 1}, {"sweep": {3: 1.23456789}, "seconds": (1, 2.0), "none": None})
    ((path, document),) = read_results(tmp_path)
    assert path == tmp_path / "serving.json"
    assert document["figures"] == {"sweep": {"3": 1.23457}, "seconds": [1, 2.0], "none": None}


@pytest.mark.parametrize("text", ["", "[]", '{"suite": "engine"}', '{"suite": "engine", "figures": 1, "about": 2}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    """Would catch a traceback out of matplotlib for a file of something else."""
    (tmp_path / "serving.json").write_text(text)
    with pytest.raises(InputError, match=r"serving\.json: not a result of hf-osd bench"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"suites": ["speed"]}, "suites are serving, engine, lengths, promise, got 'speed'"),
        ({"requests": 0}, r"requests must be in \[1, .*, got 0"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be in \[1, .*, got 0"),
        ({"suites": ["promise"], "models": "scripted"}, "models='scripted' says nothing about promise"),
        ({"models": "trained", "target": "x"}, "target='x' means nothing with models='trained'"),
    ],
)
def test_bad_options_are_refused_before_any_work(wrong: dict[str, Any], message: str) -> None:
    """Would catch minutes of measurements before an error that could have come first."""
    with pytest.raises(HfOsdError, match=message):
        BenchCommand(**wrong)


def test_a_scripted_pair_runs_the_suites_that_it_can(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch the path of the run at true scale, which no machine without a GPU takes in full."""
    monkeypatch.setattr(engine, "AXES", {"batch": (1,), "draft_length": (2,), "context": (16,)})
    monkeypatch.setattr(engine, "BASE", engine.Point(batch=1, draft_length=2, context=16))
    made = {
        "target": None, "assistant": None, "models": "scripted", "target_shape": "32x2", "draft_shape": "16x1",
        "vocabulary": 5000, "acceptance": 1.0,
    }  # fmt: skip
    assert BenchCommand(**options | made, plot=False).run(Console(file=io.StringIO()))
    (_, first), (_, second) = read_results(options["output"])
    assert (first["suite"], second["suite"]) == ("serving", "engine")
    assert first["about"]["models"]["acceptance"] == 1.0
    (point,) = second["figures"]["axes"]["batch"]
    assert point["contenders"][engine.OURS]["acceptance"] == 1.0
    assert not list(options["output"].glob("*.png"))
