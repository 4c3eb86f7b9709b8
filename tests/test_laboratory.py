"""The laboratory, `python -m benchmarks.learning`, from recordings to reports: answers, scores, replays, and runs."""

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
from stored import FIELDS
from transformers import PreTrainedModel

from benchmarks import learning
from benchmarks.laboratory import goals, runs, streams
from benchmarks.laboratory.recipes import Recipe
from benchmarks.laboratory.recording import RecordingSettings, read, recorded, write
from benchmarks.laboratory.replay import replay, score
from benchmarks.laboratory.routed import replay_routed
from benchmarks.laboratory.runs import Task, make_tasks, run_all, run_here, run_in_processes
from hf_osd.drafts.features import FeatureDraft
from hf_osd.drafts.states import with_states
from hf_osd.learning.losses import student_outcomes, teacher_outcomes
from hf_osd.learning.scoring import Scorer
from hf_osd.records import Observation

SETTINGS = RecordingSettings(max_new_tokens=10, top_k_teacher=8, batch_size=3)
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
        for name in FIELDS:
            assert torch.equal(getattr(one, name), getattr(other, name))
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


def test_greedy_answers_are_scored_as_the_learner_scores_them(
    draft: PreTrainedModel, recordings: dict[str, list[Observation]]
) -> None:
    """Would catch a laboratory whose figures are not what the learner decides by."""
    requests = recordings["a"]
    scorer = Scorer(draft, max_length=512, batch_size=3)
    for request, found in zip(requests, scorer.scores({"live": {}}, requests), strict=True):
        result, learners = score(draft, request)[0], found["live"]
        assert learners.positions == result.positions
        assert learners.acceptance == pytest.approx(result.agreed / result.positions)
        assert learners.accepted == pytest.approx(result.run / result.positions)


# Drafts that read the target's states.


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, FeatureDraft, list[Observation]]:
    """A target, a draft that reads it and knows few tokens by itself, and requests as the file gives them back."""
    target = tiny_model(layers=4, dtype=torch.float32)
    draft = FeatureDraft.of(target, general=torch.arange(VOCAB // 4))
    settings = dataclasses.replace(SETTINGS, state_layers=draft.state_layers)
    path = tmp_path_factory.mktemp("reading") / "a.parquet"
    made = recorded(path, some_prompts(9), target, settings)
    kept = read(path)[1]
    assert all(torch.equal(one.states, again.states) for one, again in zip(made, kept, strict=True))
    return target, draft, kept


def test_recorded_states_are_those_of_the_text_alone(
    reading: tuple[PreTrainedModel, FeatureDraft, list[Observation]],
) -> None:
    """Would catch states of the padding, of another row, or off by one."""
    _, draft, requests = reading
    bare = [dataclasses.replace(one, states=None) for one in requests]
    for one, alone in zip(requests, with_states(draft, bare), strict=True):
        torch.testing.assert_close(one.states, alone.states, rtol=0.02, atol=0.02)


def test_such_a_draft_is_scored_as_the_learner_scores_it(
    reading: tuple[PreTrainedModel, FeatureDraft, list[Observation]],
) -> None:
    """Would catch choices that are places in the vocabulary, and states of another token."""
    _, draft, requests = reading
    found = Scorer(draft, max_length=512, batch_size=1).scores({"live": {}}, requests)
    for request, learners in zip(requests, found, strict=True):
        result, seen = score(draft, request)
        assert result.agreed == int((seen.draft_ids == request.output_ids).sum())
        assert result.agreed / max(learners["live"].positions, 1) == pytest.approx(learners["live"].acceptance)


def test_a_replay_leaves_the_vocabulary_to_the_next(
    reading: tuple[PreTrainedModel, FeatureDraft, list[Observation]],
) -> None:
    """Would catch a recipe that profits from the tokens that another one has seen."""
    _, draft, requests = reading
    first, second = (replay(draft, requests, Recipe("static", "static", {"learn": False})) for _ in range(2))
    assert first["scores"] == second["scores"]


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


def test_routes_are_replayed_as_each_domain_alone(
    draft: PreTrainedModel, target: PreTrainedModel, recordings: dict[str, list[Observation]]
) -> None:
    """Would catch requests that go to another route's draft, and a route that begins with what others have seen."""
    order = [("a", 0), ("b", 0), ("b", 1), *(("ab"[i % 2], i // 2 + 1 + i % 2) for i in range(14))]
    requests, domains = [recordings[name][i] for name, i in order], [name for name, _ in order]
    found = replay_routed(draft, target, requests, domains, Recipe("by_key", "by_key", FAST, router="key"))
    for name in "ab":
        alone = replay(draft, recordings[name][: domains.count(name)], Recipe("fast", "fast", FAST))
        places = [place for place, domain in enumerate(domains) if domain == name]
        assert [found["scores"]["overlap"][place] for place in places] == alone["scores"]["overlap"]
        about = found["learned"]["routes"][name]
        assert about["requests"] == {name: len(places)}
        assert about["bytes"]["training"] > about["bytes"]["replay"] > 0
    assert found["learned"]["updates"] == 4
    assert found["learned"]["routes"]["first"]["requests"] == {}


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
    monkeypatch.setattr(sys, "argv", ["learning", "--alone", "9"])
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
