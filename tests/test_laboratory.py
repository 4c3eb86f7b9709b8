"""The laboratory of `benchmarks/learning.py`: recordings, streams, scores, replays, and the figures of the goals."""

import copy
import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import VOCAB, tiny_model
from transformers import PreTrainedModel

from hf_osd.learning.losses import student_outcomes, teacher_outcomes
from hf_osd.records import Observation

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():  # a source distribution has the tests, and not the benchmarks
    pytest.skip("needs benchmarks/", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import learning  # noqa: E402
from laboratory import goals, runs, streams  # noqa: E402
from laboratory.curves import Curve, change_on_return, share_to_reach, worst_window  # noqa: E402
from laboratory.recipes import Recipe, choose, load_recipes  # noqa: E402
from laboratory.recording import RecordingSettings, read, recorded, write  # noqa: E402
from laboratory.replay import replay  # noqa: E402
from laboratory.runs import Task, make_tasks, run_all, run_here, run_in_processes  # noqa: E402
from laboratory.scoring import score  # noqa: E402

SETTINGS = RecordingSettings(max_new_tokens=10, top_k_teacher=8, batch_size=3)
SIZES = streams.Sizes(alone=8, segment=4, gradual=40, mix=30, visit=4, back=3)
FAST = {"gate": False, "update_every": 4, "batch_size": 2, "steps_per_update": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def draft() -> PreTrainedModel:
    return tiny_model(seed=5, layers=1, dtype=torch.float32)


def some_prompts(count: int, seed: int = 0) -> list[torch.Tensor]:
    draw = random.Random(seed)
    return [torch.tensor([draw.randrange(3, VOCAB) for _ in range(3 + i % 5)]) for i in range(count)]


@pytest.fixture(scope="module")
def recordings(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Observation]]:
    folder = tmp_path_factory.mktemp("recordings")
    return {
        name: recorded(folder / f"{name}.parquet", some_prompts(12, seed), target, SETTINGS)
        for seed, name in enumerate(("a", "b"))
    }


# Recordings.


def test_answers_are_those_of_each_prompt_alone(target: PreTrainedModel, tmp_path: Path) -> None:
    """Would catch padding that leaks into answers, rows in the order of their length, and teachers off by one."""
    prompts = some_prompts(7)
    found = recorded(tmp_path / "a.parquet", prompts, target, SETTINGS)
    for prompt, one in zip(prompts, found, strict=True):
        text = target.generate(prompt[None], max_new_tokens=10, do_sample=False)[0]
        assert torch.equal(torch.cat((one.prompt_ids, one.output_ids)), text)
        with torch.no_grad():
            log_probs = target(text[None]).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        top = log_probs.topk(8, dim=-1)
        assert torch.equal(one.teacher_ids, top.indices)
        torch.testing.assert_close(one.teacher_log_probs, top.values)
        torch.testing.assert_close(one.teacher_tail, 1 - top.values.exp().sum(-1))
        assert not one.rejected.any()


def test_an_answer_ends_with_its_first_end_of_text(target: PreTrainedModel, tmp_path: Path) -> None:
    """Would catch the padding behind a short answer being scored and learned from as if it were text."""
    (whole,) = recorded(tmp_path / "a.parquet", some_prompts(1), target, SETTINGS)
    ending = copy.deepcopy(target)
    ending.generation_config.eos_token_id = int(whole.output_ids[2])
    first = whole.output_ids.tolist().index(int(whole.output_ids[2]))
    (short,) = recorded(tmp_path / "b.parquet", some_prompts(1), ending, SETTINGS)
    assert torch.equal(short.output_ids, whole.output_ids[: first + 1])
    assert len(short.teacher_ids) == len(short.teacher_tail) == first + 1


def test_a_recording_survives_the_disk_and_is_continued(
    target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch values changed by the file, and prompts that are answered twice, or not again when they changed."""
    asked: list[int] = []
    generate = type(target).generate
    monkeypatch.setattr(
        type(target),
        "generate",
        lambda self, **options: asked.append(len(options["input_ids"])) or generate(self, **options),
    )

    def ask(count: int, settings: RecordingSettings = SETTINGS, seed: int = 0) -> list[Observation]:
        asked.clear()
        return recorded(tmp_path / "a.parquet", some_prompts(12, seed)[:count], target, settings)

    first = ask(5)
    assert sum(asked) == 5
    again = ask(3)
    assert not asked
    for one, other in zip(first, again, strict=False):
        for field in dataclasses.fields(Observation):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name))
    assert len(ask(9)) == 9
    assert sum(asked) == 4
    ask(2, seed=1)
    assert sum(asked) == 2
    ask(2, dataclasses.replace(SETTINGS, temperature=0.7), seed=1)
    assert sum(asked) == 2
    write(tmp_path / "a.parquet", first, "of another target")
    ask(1)
    assert sum(asked) == 1
    assert len(read(tmp_path / "a.parquet")[1]) == 1


# Streams.


def test_a_shift_goes_through_each_domain_in_order() -> None:
    """Would catch shuffled requests, repeated ones, and segments that are off by one."""
    stream = streams.make("shift", {"a": 9, "b": 9}, SIZES)
    assert stream.requests == (*(("a", i) for i in range(4)), *(("b", i) for i in range(4)))
    assert stream.segments == (streams.Segment("a", 0, 4), streams.Segment("b", 4, 8))


def test_a_return_brings_fresh_requests() -> None:
    """Would catch a forgetting test that asks what was already learned by heart."""
    stream = streams.make("return:b,a", {"a": 9, "b": 9}, SIZES)
    assert stream.requests[-3:] == (("b", 4), ("b", 5), ("b", 6))
    assert len(set(stream.requests)) == len(stream.requests)
    assert [(part.label, part.start, part.end) for part in stream.segments] == [("b", 0, 4), ("a", 4, 8), ("b", 8, 11)]
    assert stream.needed() == {"b": 7, "a": 4}


def test_a_gradual_shift_moves_from_the_first_domain_to_the_second() -> None:
    """Would catch a mixture that does not move, moves backwards, or uses a request twice."""
    stream = streams.gradual("a", "b", 400)
    domains = [domain for domain, _ in stream.requests]
    shares = [domains[start : start + 100].count("b") / 100 for start in range(0, 400, 100)]
    assert shares == sorted(shares)
    assert shares[0] < 0.25 < 0.75 < shares[-1]
    for name in ("a", "b"):
        assert [index for domain, index in stream.requests if domain == name] == [*range(domains.count(name))]
    assert stream == streams.gradual("a", "b", 400)


def test_a_mix_has_all_domains_from_the_beginning() -> None:
    """Would catch a mix that is a shift."""
    stream = streams.make("mix", {"a": 99, "b": 99, "c": 99}, SIZES)
    assert {domain for domain, _ in stream.requests[:12]} == {"a", "b", "c"}
    assert len(set(stream.requests)) == SIZES.mix


def test_a_domain_alone_is_as_long_as_its_prompts_last() -> None:
    """Would catch a small domain that cannot be run at all."""
    assert len(streams.make("a", {"a": 5}, SIZES).requests) == 5
    assert len(streams.make("a", {"a": 50}, SIZES).requests) == SIZES.alone


@pytest.mark.parametrize("spec", ["nothing", "shift:a", "shift:a,z", "gradual:a,b,a", "return:c,a", "a:b"])
def test_a_stream_that_cannot_be_is_refused(spec: str) -> None:
    """Would catch a stream that is silently another, or ends in an IndexError after minutes of recording."""
    with pytest.raises(ValueError, match=spec.partition(":")[0]):
        streams.make(spec, {"a": 9, "b": 9, "c": 2}, SIZES)


# Scores.


def test_a_score_is_that_of_one_forward_a_token(
    draft: PreTrainedModel, recordings: dict[str, list[Observation]]
) -> None:
    """Would catch logits off by one, runs that go past the end of an answer, and sums that are means."""
    for request in recordings["a"][:4]:
        result, seen = score(draft, request)
        choices, shared = [], 0.0
        for i in range(len(request.output_ids)):
            with torch.no_grad():
                logits = draft(torch.cat((request.prompt_ids, request.output_ids[:i]))[None]).logits[0, -1:].float()
            choices.append(int(logits.argmax()))
            teacher = (request.teacher_ids[i, None], request.teacher_log_probs[i, None], request.teacher_tail[i, None])
            p, q = teacher_outcomes(*teacher, VOCAB).exp()[0], student_outcomes(logits, teacher[0]).exp()[0]
            shared += sum(min(float(a), float(b)) for a, b in zip(p, q, strict=True))
        agreed = [choice == token for choice, token in zip(choices, request.output_ids.tolist(), strict=True)]
        assert seen.draft_ids.tolist() == choices
        assert seen.accepted.tolist() == agreed
        assert (result.positions, result.agreed) == (len(agreed), sum(agreed))
        assert result.overlap == pytest.approx(shared, abs=1e-4)


def test_runs_are_counted_as_rounds_would_accept(target: PreTrainedModel) -> None:
    """Would catch agreements that count behind a disagreement, and rounds longer than their draft."""
    from laboratory.scoring import run_lengths

    draw = random.Random(0)
    for length in (1, 3, 12):
        agreed = [draw.random() < 0.7 for _ in range(length)]
        expected = 0
        for start in range(length):
            for i in range(start, min(start + 5, length)):
                if not agreed[i]:
                    break
                expected += 1
        assert run_lengths(torch.tensor(agreed), 5) == expected


# Curves and goals.


def test_rates_are_of_tokens_and_not_of_requests() -> None:
    """Would catch a mean of means, in which a request of one token counts as much as one of a thousand."""
    curve = Curve([1, 0, 2, 8], [1, 9, 10, 10])
    assert curve.rate(0, 2) == pytest.approx(0.1)
    assert curve.windows(3) == [pytest.approx(0.15), pytest.approx(0.8)]
    assert curve.quarters() == [1.0, 0.0, 0.2, 0.8]
    assert curve.final() == 0.8


def level(*parts: tuple[float, int]) -> Curve:
    """A curve of so much acceptance for so many requests each."""
    rates = [rate for rate, count in parts for _ in range(count)]
    return Curve([10 * rate for rate in rates], [10] * len(rates))


def test_a_level_is_reached_once_a_window_has_it_and_it_is_kept() -> None:
    """Would catch a lucky window that counts, and a level that is reached before anything was measured."""
    assert share_to_reach(level((0.0, 20), (0.5, 80)), 0.5, width=10) == pytest.approx(0.30)
    assert share_to_reach(level((0.5, 100)), 0.5, width=10) == pytest.approx(0.10)
    assert share_to_reach(level((0.9, 10), (0.1, 40), (0.5, 50)), 0.5, width=10) == pytest.approx(0.60)
    assert share_to_reach(level((0.4, 100)), 0.5, width=10) is None


def test_the_worst_window_is_found_wherever_it_is() -> None:
    """Would catch windows that do not overlap, between which a loss can hide, and the sign the wrong way round."""
    static, online = level((0.5, 60)), level((0.6, 15), (0.4, 10), (0.9, 35))
    assert worst_window(online, static, 10) == pytest.approx(-0.1)
    assert worst_window(online, static, 20) == pytest.approx(0.0)
    assert worst_window(online, static, 100) == pytest.approx((0.6 * 15 + 0.4 * 10 + 0.9 * 35) / 60 - 0.5)


def test_a_return_compares_the_end_of_one_visit_with_the_beginning_of_the_next() -> None:
    """Would catch forgetting that is hidden by the fast relearning after it, or by the slow start of the stream."""
    curve = level((0.0, 20), (0.6, 10), (0.9, 30), (0.5, 10), (0.6, 20))
    assert change_on_return(curve, (0, 30), (60, 90), width=10) == pytest.approx(-0.1)


def run_of(name: str, curve: Curve) -> goals.Run:
    reached = [curve.rate(i, i + 1) * 10 for i in range(len(curve))]
    result: dict[str, Any] = {"scores": {"agreed": reached, "positions": [10] * len(curve)}}
    return goals.Run(Recipe(name, name.partition("@")[0]), result)


def test_the_baseline_is_algorithm_1_at_its_own_best_rate() -> None:
    """Would catch a comparison with a learning rate that Algorithm 1 does badly with."""
    found = [
        run_of("static", level((0.1, 100))),
        run_of("algorithm_1@0.1", level((0.2, 100))),
        run_of("algorithm_1@0.2", level((0.1, 50), (0.4, 50))),
        run_of("defaults", level((0.1, 10), (0.5, 90))),
        run_of("offline", level((0.9, 100))),
    ]
    figures = goals.figures(streams.alone("a", 100), found)
    assert set(figures) == {"algorithm_1@0.1", "algorithm_1@0.2", "defaults"}
    assert figures["defaults"]["final_above_algorithm_1"] == pytest.approx(0.1)
    assert figures["defaults"]["share_to_reach_algorithm_1"] == pytest.approx(0.29)
    assert figures["defaults"]["worst_window_above_static"] == pytest.approx(0.36)
    shifted = goals.figures(streams.shift(["a", "b"], 50), found)["defaults"]
    assert set(shifted) == {"worst_window_above_static"}
    back = goals.figures(streams.returning(["a", "b"], 40, 20), found)["defaults"]
    assert back["change_on_return"] == pytest.approx(0.5 - (0.1 * 10 + 0.5 * 30) / 40)
    assert back["change_on_return_static"] == pytest.approx(0.0)


def test_goals_are_met_in_their_own_direction() -> None:
    """Would catch a bold figure in a table that misses its goal, and a level never reached that counts as fast."""
    assert goals.met("share_to_reach_algorithm_1", 0.25)
    assert goals.met("share_to_reach_algorithm_1", None) is False
    assert not goals.met("final_above_algorithm_1", 0.079)
    assert goals.met("worst_window_above_static", -0.004)
    assert goals.met("change_on_return_static", 0.0) is None


# Recipes.


def test_the_recipes_that_come_along_are_what_they_say() -> None:
    """Would catch a typo in a field, and an Algorithm 1 that is not the paper's."""
    found = {recipe.name: recipe for recipe in load_recipes()}
    algorithm_1 = [recipe for recipe in found.values() if recipe.family == "algorithm_1"]
    assert sorted(recipe.config["learning_rate"] for recipe in algorithm_1) == [1e-4, 3e-4, 1e-3, 3e-3]
    for recipe in algorithm_1:
        config = recipe.online_config()
        assert (config.positions, config.beta, config.update_every, config.steps_per_update) == ("rejected", 0.0, 8, 1)
        assert config.replay_size == config.batch_size == config.update_every
        assert not config.gate
    assert not found["static"].online_config().learn
    assert found["defaults"].config == {}
    assert found["offline"].epochs == 3


def test_a_wrong_recipe_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """Would catch a misspelt field that is dropped, so that a variant is the default under another name."""
    path = tmp_path / "recipes.toml"
    for text in ("[a]\nconfig = { lerning_rate = 1.0 }", "[a]\nconfig = { beta = 7.0 }", "[a]\nconfigs = {}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="'a'"):
            load_recipes(path)
    with pytest.raises(ValueError, match="nothing"):
        choose(load_recipes(), ["nothing"])


# Replays.


def test_each_request_is_scored_before_it_is_learned_from(
    draft: PreTrainedModel, recordings: dict[str, list[Observation]]
) -> None:
    """Would catch requests scored by weights that have seen them, weights that never arrive, and a changed draft."""
    before = copy.deepcopy(draft.state_dict())
    static = replay(draft, recordings["a"], Recipe("static", "static", {"learn": False}))
    online = replay(draft, recordings["a"], Recipe("fast", "fast", FAST))
    assert static["learned"]["updates"] == 0
    assert online["learned"]["updates"] == 3
    assert online["scores"]["overlap"][:4] == static["scores"]["overlap"][:4]
    assert online["scores"]["overlap"][4] != static["scores"]["overlap"][4]
    assert replay(draft, recordings["a"], Recipe("fast", "fast", FAST))["scores"] == online["scores"]
    assert all(torch.equal(weight, before[name]) for name, weight in draft.state_dict().items())


def test_the_offline_line_has_seen_all_it_is_scored_on(
    draft: PreTrainedModel, recordings: dict[str, list[Observation]]
) -> None:
    """Would catch an upper reference that is scored before it is trained, or is trained for too few steps."""
    recipe = Recipe("offline", "offline", {"learning_rate": 1e-2, "batch_size": 2, "gate": False}, epochs=10)
    found = replay(draft, recordings["a"], recipe)
    static = replay(draft, recordings["a"], Recipe("static", "static", {"learn": False}))
    assert (found["learned"]["updates"], found["learned"]["failures"]) == (1, 0)
    assert found["learned"]["steps"] == 60
    assert sum(found["scores"]["overlap"]) > sum(static["scores"]["overlap"]) + 5


# Runs.


def tasks_of(recordings: dict[str, list[Observation]], draft: PreTrainedModel, folder: Path) -> list[Task]:
    chosen = [streams.alone("a", 6), streams.shift(["b", "a"], 3)]
    recipes = [Recipe("static", "static", {"learn": False}), Recipe("fast", "fast", FAST)]
    return make_tasks(chosen, recipes, recordings, draft, folder)


def test_only_what_is_missing_is_run(
    draft: PreTrainedModel, recordings: dict[str, list[Observation]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch an interrupted session that starts again, and results kept that belong to something else."""
    tasks = tasks_of(recordings, draft, tmp_path)
    ran: list[Task] = []

    def run(left: Any) -> Any:
        for task in run_here(left, draft, recordings):
            ran.append(task)
            yield task

    results = run_all(tasks, run)
    assert ran == tasks
    assert len(results["shift-b-a", "fast"]["scores"]["agreed"]) == 6
    ran.clear()
    assert run_all(tasks, run) == results
    assert not ran
    tasks[2].path.write_text("{")
    run_all(tasks, run)
    assert ran == [tasks[2]]
    ran.clear()
    monkeypatch.setattr(runs.fingerprints, "of_sources", lambda: "another version")
    others = tasks_of(recordings, draft, tmp_path)
    run_all(others, run, any_library=True)
    assert not ran
    run_all(others[:1], run)
    assert ran == others[:1]
    with torch.no_grad():
        changed = copy.deepcopy(draft)
        next(changed.parameters()).mul_(2.0)
    ran.clear()
    run_all(tasks_of(recordings, changed, tmp_path)[:1], run, any_library=True)
    assert len(ran) == 1


def test_the_command_records_replays_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch anything between the parts: options, the embedded pair, the reports; and a rerun that runs."""
    monkeypatch.setattr(sys, "argv", ["benchmarks/learning.py", "--alone", "9"])
    prompts = [json.dumps({"prompt": f"Return {number} times the sum.", "other": 1}) for number in range(12)]
    (tmp_path / "sums.jsonl").write_text("\n".join(prompts))
    options = ["--recordings", str(tmp_path / "recordings"), "--output", str(tmp_path), "--alone", "9"]
    options += ["--prompts", f"sums={tmp_path / 'sums.jsonl'}", "--max-new-tokens", "6", "--jobs", "1"]
    options += ["--recipes", "static", "algorithm_1@0.001", "algorithm_1@0.003", "defaults"]
    learning.main(options)
    assert "kept" not in capsys.readouterr().out
    learning.main(options)
    printed = capsys.readouterr().out
    assert printed.count("kept") == 4
    found = json.loads((tmp_path / "learning.json").read_text())
    stream = found["streams"]["sums"]
    assert stream["requests"] == 9
    assert stream["best_algorithm_1"].startswith("algorithm_1@")
    assert set(stream["recipes"]["defaults"]["goals"]) == set(goals.GOALS) - {"change_on_return"}
    assert stream["recipes"]["defaults"]["learned"]["updates"] == 1
    assert "### sums: 9 requests" in (tmp_path / "learning.md").read_text()
    assert (tmp_path / "learning.png").stat().st_size > 10_000
    assert str(tmp_path) not in json.dumps(found)


def test_options_that_make_no_sense_end_the_command_at_once(tmp_path: Path) -> None:
    """Would catch minutes of recording before a typo is noticed."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Hello"}))
    usual = ["--recordings", str(tmp_path / "recordings"), "--output", str(tmp_path / "output")]
    usual += ["--prompts", f"a={tmp_path / 'a.jsonl'}"]
    for options in (["--streams", "nowhere"], ["--recipes", "nothing"], ["--prompts", "no file"]):
        with pytest.raises(SystemExit, match="no"):
            learning.main([*usual, *options])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.slow
def test_processes_find_what_this_one_finds(
    draft: PreTrainedModel, recordings: dict[str, list[Observation]], tmp_path: Path
) -> None:
    """Would catch workers that score other requests or start from another draft."""
    draft.save_pretrained(tmp_path / "draft")
    files = {name: tmp_path / f"{name}.parquet" for name in recordings}
    for name, path in files.items():
        write(path, recordings[name], "")
    here, there = (tasks_of(recordings, draft, tmp_path / name) for name in ("here", "there"))
    expected = run_all(here, lambda left: run_here(left, draft, recordings))
    found = run_all(there, lambda left: run_in_processes(left, str(tmp_path / "draft"), files, 2))
    assert {key: one["scores"] for key, one in found.items()} == {key: one["scores"] for key, one in expected.items()}
