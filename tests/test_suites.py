"""The developers' suites on tiny random models: what they report, not how fast anything is."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_demo_runner import make_model, make_tokenizer

from benchmarks.suites import engine, lengths, promise, serving
from benchmarks.suites.command import SuitesCommand, run_replot
from benchmarks.suites.engine import round_breakdown, texts_of_length, without_eos
from benchmarks.suites.floor import Floor, Watch, Watched
from benchmarks.suites.results import SUITES, read_results
from benchmarks.suites.scripted import Script
from benchmarks.suites.session import Session
from benchmarks.suites.shapes import Shape
from hf_osd.bench.compiled import CompiledGenerate
from hf_osd.bench.serving import ONLINE, STATIC
from hf_osd.evaluation.contenders import Sample
from hf_osd.evaluation.models import Pair
from hf_osd.evaluation.race import run_race
from hf_osd.evaluation.streams import make_stream

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


def test_every_contender_is_held_against_its_own_forwards(session: Session) -> None:
    """Would catch a contender whose forwards are not seen, and one without a floor that is said to have one."""
    (stream,) = serving.run(session)["streams"].values()
    assert all(one["engine_efficiency"] > 0 for one in stream["contenders"].values())
    assert "peers" not in stream
    compiled = CompiledGenerate("static cache", session.pair.target, capacity=40, compiles=False)
    _, figures = session.measure([compiled], session.streams[0].requests)
    assert figures["contenders"]["static cache"]["engine_efficiency"] is None


def test_a_scripted_draft_serves_without_learning_or_lookup(session: Session) -> None:
    """Would catch an engine's cost mixed up with what a random target happens to repeat."""
    scripted = Session(**{**vars(session), "script": Script(session.pair.draft, 1.0), "learns": False})
    assert not scripted.static().prompt_lookup
    (stream,) = serving.run(scripted)["streams"].values()
    assert ONLINE not in stream["contenders"]
    assert stream["contenders"][STATIC]["acceptance"] in (1.0, None)


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


def test_a_round_is_a_forward_of_the_target() -> None:
    """Would catch stages divided by tokens, or by forwards of the draft."""
    stages = {"draft": 0.4, "verify": 0.8, "accept": 0.0, "record": 0.0, "bookkeeping": 0.2}
    forwards = [Shape("target", 1, 3, 0, 3)] * 4 + [Shape("draft", 1, 1, 0, 1)] * 8
    assert round_breakdown([Watched(10, 1.0, stages=stages, forwards=forwards)]) == pytest.approx(
        {"draft": 100.0, "verify": 200.0, "accept": 0.0, "record": 0.0, "bookkeeping": 50.0}
    )


class Noted:
    """A contender that notes its turns."""

    def __init__(self, name: str, turns: list[str], target: Any) -> None:
        self.name, self.turns, self.target = name, turns, target

    def answer(self, inputs: Any, **options: Any) -> tuple[torch.Tensor, Sample]:
        self.turns.append(self.name)
        return torch.tensor([[5, 6]]), Sample(2, 1.0)


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
    contenders = [Noted(name, turns, session.pair.target) for name in "ab"]
    requests = session.streams[0].requests[:1] * 33
    race = run_race(contenders, requests, {}, answer=Watch(Turns(turns), len(requests)))
    assert turns[:10] == ["a", "floor", "b", "floor"] * 2 + ["b", "a"]
    assert turns.count("floor") == 2 * (1 + 11)  # of every third request, and of the one that warms up
    assert [one.efficiency for one in race.samples("a")[:4]] == [0.5, None, None, 0.5]


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
    assert SuitesCommand(**options).run(Console(file=screen, width=160))
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


def test_a_scripted_pair_runs_the_suites_that_it_can(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch the path of the run at true scale, which no machine without a GPU takes in full."""
    monkeypatch.setattr(engine, "AXES", {"batch": (1,), "draft_length": (2,), "context": (16,)})
    monkeypatch.setattr(engine, "BASE", engine.Point(batch=1, draft_length=2, context=16))
    made = {
        "target": None, "assistant": None, "models": "scripted", "target_shape": "32x2", "draft_shape": "16x1",
        "vocabulary": 5000, "acceptance": 1.0,
    }  # fmt: skip
    assert SuitesCommand(**options | made, plot=False).run(Console(file=io.StringIO()))
    (_, first), (_, second) = read_results(options["output"])
    assert (first["suite"], second["suite"]) == ("serving", "engine")
    assert first["about"]["models"]["acceptance"] == 1.0
    (point,) = second["figures"]["axes"]["batch"]
    assert point["contenders"][engine.OURS]["acceptance"] == 1.0
    assert not list(options["output"].glob("*.png"))
