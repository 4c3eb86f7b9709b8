"""A design from texts to a folder: what it refuses, what it writes, and that the folder serves."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from fakes import VOCAB, tiny_model
from rich.console import Console
from safetensors.torch import load_file
from test_design_distilling import predictable_model
from toys import END, word_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_osd
from hf_osd.cli.app import app
from hf_osd.design.blueprints import Blueprint
from hf_osd.design.candidates import Candidate, named, promising
from hf_osd.design.command import DesignCommand
from hf_osd.design.designing import design_draft
from hf_osd.design.gathering import gather
from hf_osd.design.recipe import Recipe
from hf_osd.design.vocabulary import most_used
from hf_osd.errors import ConfigError, InputError, PromptSourceError, UnsupportedModelError
from hf_osd.evaluation.machine import quiet

NAMES = {"1-layer", "2-layer", "1-layer-24-wide", "1-layer-tokens", "2-layer-tokens"}
RECIPE = Recipe(steps=30, matrix_rate=0.06, vector_rate=0.02, warmup_steps=5, batch_tokens=300, evaluations=3)
_SEVERAL = """
import sys
from rich.console import Console
from test_design import END, RECIPE, design_draft, predictable_model, word_tokenizer
target = predictable_model()
target.generation_config.eos_token_id = END
options = dict(prompts=[sys.argv[1]], recipe=RECIPE, plot=False, console=Console(width=200))
design = design_draft(target, word_tokenizer(), sys.argv[2], **options)
print("sum", sum(weight.double().sum().item() for weight in design.draft.parameters()), flush=True)
"""
runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def prompt_file(path, count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(7, VOCAB, (5,), generator=generator).tolist() for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": " ".join(f"w{token}" for token in row)}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A design of a tiny target, and the folder it wrote."""
    folder = tmp_path_factory.mktemp("design")
    target, console = predictable_model(), Console(record=True, width=200, force_terminal=False, quiet=False)
    target.generation_config.eos_token_id = END
    prompts = [prompt_file(folder / "prompts.jsonl")]
    with quiet(), console.capture():
        design = design_draft(
            target, word_tokenizer(), folder / "draft", prompts=prompts, recipe=RECIPE, console=console, command="hf"
        )
    return target, design, folder / "draft", prompts


def test_the_folder_loads_and_serves_losslessly(made):
    """Catches a checkpoint that transformers does not load, or that is not the draft that was measured."""
    target, design, folder, _ = made
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(value, design.draft.state_dict()[name]) for name, value in loaded.state_dict().items())
    with hf_osd.OnlineAssistant.from_pretrained(folder, target) as assistant:
        for seed in range(3):
            ids = torch.randint(7, VOCAB, (1, 6), generator=torch.Generator().manual_seed(seed))
            options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
            output = hf_osd.generate(target, ids, online_assistant=assistant, **options)
            assert torch.equal(output, target.generate(ids, **options))
        assert assistant.stats().draft_tokens + assistant.stats().lookup_tokens > 0


def test_nothing_of_the_target_is_in_the_checkpoint(made):
    """Catches an embedding or a head that is written with the draft: most of a real target's weights."""
    target, _, folder, _ = made
    known = {(tuple(value.shape), value.double().sum().item()) for value in target.state_dict().values()}
    for value in load_file(folder / "model.safetensors").values():
        shape = tuple(value.shape)
        assert value.ndim == 1 or (VOCAB not in shape and (shape, value.double().sum().item()) not in known)


def test_the_draft_has_learned(made):
    """Catches a choice, or a folder, of weights from before the distillation."""
    _, design, _, _ = made
    history = design.histories[design.chosen]
    assert max(one.quality.agreement for one in history) > 0.3
    assert set(design.speeds) == {"plain", *design.histories}
    assert all(speed.tokens_per_second > 0 for speed in design.speeds.values())


def test_the_card_says_how_it_was_made(made):
    """Catches a card without the command, the data, the licence or the figures, and one that names local folders."""
    _, design, folder, prompts = made
    card = (folder / "README.md").read_text()
    stated = ("draft for LlamaForCausalLM", "licence of the target", "\nhf\n", "| minute |", "/prompts.jsonl`")
    assert all(words in card for words in stated)
    assert prompts[0] not in card
    assert "{" not in card
    assert card.count(f"| {design.histories[design.chosen][-1].step} |") >= 1
    facts = json.loads((folder / "design.json").read_text())
    assert facts["data"]["texts"] + facts["data"]["held_out"] == 64
    assert {one["name"] for one in facts["candidates"]} == NAMES
    assert (folder / "frontier.png").stat().st_size > 1000


def test_a_second_run_repeats_nothing(made, monkeypatch):
    """
    Catches a run that was cut off at its end and begins anew: records, starts and steps are all there. Costs that are
    measured again may promise most of another candidate, which would begin anew, too.
    """
    target, design, folder, prompts = made
    monkeypatch.setattr(hf_osd.design.designing, "promising", lambda found: found[-1:])
    monkeypatch.setattr(hf_osd.design.designing, "start", lambda *_: pytest.fail("started again"))
    monkeypatch.setattr(hf_osd.design.recording, "write_shard", lambda *_: pytest.fail("recorded again"))
    monkeypatch.setattr(hf_osd.design.distilling, "_train", lambda *_: pytest.fail("trained again"))
    with quiet():
        again = design_draft(target, word_tokenizer(), folder, prompts=prompts, recipe=RECIPE, plot=False)
    assert again.histories[design.chosen] == design.histories[design.chosen]


def test_bad_input_is_refused_before_any_work(tmp_path, monkeypatch):
    """Catches an hour of recording that ends in an error that was known before."""
    monkeypatch.setattr(hf_osd.design.designing, "record", lambda *_, **__: pytest.fail("recorded"))
    target, tokenizer = tiny_model(layers=4), word_tokenizer()
    few, missing = prompt_file(tmp_path / "few.jsonl", 5), str(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="are too few, of 5 read"):
        design_draft(target, tokenizer, tmp_path / "a", prompts=[few])
    with pytest.raises(PromptSourceError, match="cannot be read"):
        design_draft(target, tokenizer, tmp_path / "a", prompts=[missing])
    with pytest.raises(UnsupportedModelError, match="no draft can be made of the layers of Mamba"):
        design_draft(tiny_model("mamba"), tokenizer, tmp_path / "a", prompts=[few])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another output folder"):
        design_draft(target, tokenizer, tmp_path / "file", prompts=[few])
    with pytest.raises(ConfigError, match="no draft is called '3-layer'; there are 1-layer, 2-layer"):
        design_draft(target, tokenizer, tmp_path / "a", prompts=[few], candidates=["1-layer", "3-layer"])
    assert not (tmp_path / "a").exists()


def test_held_out_prompts_are_not_learned(tmp_path):
    """Catches a draft that is judged by what it has learned, where a file has a prompt twice."""
    source = prompt_file(tmp_path / "a.jsonl", 40)
    twice = prompt_file(tmp_path / "b.jsonl", 40)
    material = gather(tiny_model(eos_token_id=END), word_tokenizer(), [source, twice], 100, tmp_path)
    learned = {tuple(request.prompt_ids.tolist()) for request in material.learned}
    assert len(material.learned) + len(material.held_out) == 40
    assert not learned & {tuple(request.prompt_ids.tolist()) for request in material.held_out}
    assert all(request.head == len(request.prompt_ids) for request in material.held_out)


def test_the_target_may_write_all_prompts_or_a_share(tmp_path):
    """Catches prompts of other sources among those of a draft that was to see none of them."""
    target, limit = tiny_model(eos_token_id=END, initializer_range=1.0), 60
    source = prompt_file(tmp_path / "a.jsonl", 60)
    alone, mixed = (
        gather(target, word_tokenizer(), some, limit, tmp_path) for some in (["target"], ["target", source])
    )
    assert alone.about["prompts_by_the_target"] == len(alone.learned) + len(alone.held_out)
    assert 0 < mixed.about["prompts_by_the_target"] <= limit // 2 < len(mixed.learned) + len(mixed.held_out)


def test_every_second_answer_is_the_targets_own(tmp_path):
    """Catches a draft that learns from given answers alone, which are not what it will have to propose."""
    rows = [{"prompt": f"w{10 + row} w{7 + row}", "response": "w9 w8"} for row in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    material = gather(tiny_model(eos_token_id=END), word_tokenizer(), [str(tmp_path / "a.jsonl")], 100, tmp_path)
    own = [request.answer_ids is None for request in material.learned]
    assert abs(sum(own) - len(own) / 2) <= 1


def test_documents_are_judged_by_what_follows_their_middle(tmp_path):
    """Catches held-out documents without a prompt, behind which the target would say nothing of them."""
    words = " ".join(f"w{7 + row % 50}" for row in range(400))
    (tmp_path / "a.md").write_text("\n\n".join(f"w{row} {words}" for row in range(7, 57)))
    material = gather(tiny_model(eos_token_id=END), word_tokenizer(), [str(tmp_path / "a.md")], 100, tmp_path)
    assert all(len(request.prompt_ids) > 20 for request in material.held_out)
    assert all(request.head == 1 and request.answer_ids is not None for request in material.learned)


def test_vocabulary_is_what_is_used_most():
    """Catches a vocabulary without the end of an answer, and tokens that are counted by their number."""
    from test_design_recording import texts

    from hf_osd.design.reading import read_texts

    target = tiny_model()
    found = read_texts(target, [*texts(3), torch.tensor([3, 50, 50, 50, 50, 50, 51])], [1] * 4)
    chosen = most_used(found, VOCAB, always=[END, 0], size=10).tolist()
    assert {END, 0, 50} <= set(chosen)
    assert chosen == sorted(chosen)
    assert len(chosen) == 10
    assert most_used(found, VOCAB).tolist() == [*range(VOCAB)]


def test_candidates_that_cannot_catch_up_are_not_distilled():
    """Catches minutes that go into a draft that is too slow, and more than two of them."""
    found = [
        Candidate(Blueprint((1,) * depth), 0.001, speedup)
        for depth, speedup in ((1, 2.0), (2, 1.99), (3, 1.98), (4, 1.5))
    ]
    assert promising(found) == found[:2]
    assert promising([found[0], found[3]]) == found[:1]


def test_named_candidates_alone_are_considered():
    """Catches a draft for this machine in place of the one that was asked for."""
    plans = [Blueprint((3,), (2, 4)), Blueprint((2, 3), (2, 4)), Blueprint((3,))]
    assert named(plans, ["1-layer-tokens", "2-layer"]) == [plans[2], plans[1]]
    assert named(plans, ()) == plans


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "minutes"),
        (["--prompts", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--device", "abacus"], "device must be a torch device"),
    ],
)
def test_the_command_refuses_bad_options(tmp_path, options, message):
    """Catches a traceback in the user's face."""
    target = tmp_path / "target"
    tiny_model(layers=2, dtype=torch.float32).save_pretrained(target)
    word_tokenizer().save_pretrained(target)
    result = runner.invoke(app, ["design", str(target), "--output", str(tmp_path / "draft"), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "draft").exists()


def test_the_command_makes_a_draft(tmp_path):
    """Catches options of the command line that do not arrive, and a target that cannot be loaded by its folder."""
    target = predictable_model()
    target.generation_config.eos_token_id = END
    target.save_pretrained(tmp_path / "target")
    word_tokenizer().save_pretrained(tmp_path / "target")
    prompts = prompt_file(tmp_path / "a.jsonl", 40)
    options = ["--prompts", prompts, "--output", str(tmp_path / "draft"), "--minutes", "0.02", "--no-plot"]
    result = runner.invoke(app, ["design", str(tmp_path / "target"), *options])
    assert result.exit_code == 0, result.output
    assert "tokens per second on held-out prompts" in result.output
    assert json.loads((tmp_path / "draft" / "design.json").read_text())["recipe"]["minutes"] == 0.02
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "draft").config.target == str(tmp_path / "target")
    assert not (tmp_path / "draft" / "frontier.png").exists()


def test_auto_classes_know_the_draft_by_one_import(made):
    """Catches a folder that only the process that made it can load."""
    _, _, folder, _ = made
    code = (
        "import sys, hf_osd.drafts; from transformers import AutoModelForCausalLM; "
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "FeatureDraft"


@pytest.mark.slow
def test_two_processes_make_one_draft(tmp_path):
    """Catches processes that disagree about the time, the candidates or the weights, and so wait for ever."""
    prompts = prompt_file(tmp_path / "a.jsonl", 64)
    script = tmp_path / "run.py"
    script.write_text(_SEVERAL)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script), prompts]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(hf_osd.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command, str(tmp_path / "draft")], capture_output=True, text=True, env=environment, timeout=600
    )
    assert found.returncode == 0, found.stderr
    sums = [line for line in found.stdout.splitlines() if line.startswith("sum")]
    assert len(sums) == 2
    assert sums[0] == sums[1]
    assert found.stdout.count("prompts to judge by") == 1


def test_options_are_checked():
    """Catches a command that fails after it has loaded a model."""
    with pytest.raises(ConfigError, match="texts"):
        DesignCommand(target="x", output="y", texts=0)
    with pytest.raises(ConfigError, match="target"):
        DesignCommand(target="", output="y")


def test_without_prompts_the_target_writes_some(tmp_path):
    """Catches a default that needs data, and prompts that a second run makes anew, others than the first learned."""
    target = tiny_model(eos_token_id=END)
    first, second = (gather(target, word_tokenizer(), [], 60, tmp_path) for _ in range(2))
    assert len([*tmp_path.glob("prompts-*.json")]) == 1
    assert 0 < first.about["prompts_by_the_target"] <= 15
    assert [one.prompt_ids.tolist() for one in first.learned] == [one.prompt_ids.tolist() for one in second.learned]


def test_more_texts_leave_the_others_where_they_are(tmp_path):
    """Catches a recording that begins anew where there are more texts, and prompts that change sides."""
    source, target = prompt_file(tmp_path / "a.jsonl", 90), tiny_model(eos_token_id=END)
    few, many = (gather(target, word_tokenizer(), [source], limit, tmp_path) for limit in (48, 90))

    def described(requests):
        return [(request.prompt_ids.tolist(), request.answer_ids, request.head) for request in requests]

    assert described(many.learned)[: len(few.learned)] == described(few.learned)
    assert described(many.held_out)[: len(few.held_out)] == described(few.held_out)


def test_help_lists_every_option():
    """Catches an option that the command line does not pass on, or names otherwise."""
    text = runner.invoke(app, ["design", "--help"]).output
    for field in fields(DesignCommand):
        assert ("target" if field.name == "target" else f"--{field.name.replace('_', '-')}") in text.lower()
