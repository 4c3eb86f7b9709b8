"""Distilling a draft offline: what it learns, when it stops, and what an interruption changes."""

import copy
import json
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from fakes import VOCAB, tiny_model

from hf_osd.design.batches import Batches
from hf_osd.design.distilling import distil
from hf_osd.design.history import evaluations_in, is_over, read_history
from hf_osd.design.judging import LONGEST_CHAIN, Quality, judge
from hf_osd.design.recipe import Recipe
from hf_osd.design.recording import record
from hf_osd.design.requests import Request
from hf_osd.design.training import HalvesReader, OfflineCallback, OfflineTrainer
from hf_osd.drafts.features import FeatureDraft
from hf_osd.errors import ConfigError
from hf_osd.learning.student import Student

RECIPE = Recipe(steps=45, matrix_rate=0.06, vector_rate=0.02, warmup_steps=5, batch_tokens=200, evaluations=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target, what it wrote to learn from, and answers of its own to judge by."""
    folder = tmp_path_factory.mktemp("recording")
    target = predictable_model()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (6,), generator=generator) for _ in range(48)]
    options = dict(state_layers=FeatureDraft.of(target).state_layers, max_new_tokens=20)
    learned = record(target, [Request(ids, None, 1) for ids in prompts[8:]], folder, **options)
    held_out = [*record(target, [Request(ids, None, 6) for ids in prompts[:8]], folder, **options)]
    return target, learned, held_out


def predictable_model():
    """A target that says much the same behind the same token, so that other texts tell what it says in these."""
    target = tiny_model(layers=4, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight *= 0.05
    return target


def cold(target, **options):
    torch.manual_seed(0)
    return FeatureDraft.of(target, **options)


def weights(draft):
    return torch.cat([weight.detach().flatten() for weight in draft.parameters()])


def test_acceptance_rises_on_texts_that_were_held_out(world, tmp_path):
    """Catches a distillation that trains nothing, on the wrong positions, or the target with it."""
    target, learned, held_out = world
    before = {name: value.clone() for name, value in target.state_dict().items()}
    draft, told = cold(target), []
    history = distil(draft, learned, held_out, tmp_path, RECIPE, told.append)
    assert [entry.step for entry in history] == [0, 15, 30, 45]
    assert told == history
    assert history[-1].quality.agreement > history[0].quality.agreement + 0.2
    assert history[-1].quality.accepted > history[0].quality.accepted + 0.2
    assert judge(draft, held_out) == max((entry.quality for entry in history), key=lambda one: one.accepted)
    assert read_history(tmp_path) == history
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("after", [1, 2])
def test_an_interruption_changes_nothing(world, tmp_path, after):
    """Catches an optimiser, a rate, an order of texts or a best draft that a resumed run begins anew."""
    target, learned, held_out = world
    whole, resumed = cold(target), cold(target)
    expected = distil(whole, learned, held_out, tmp_path / "whole", RECIPE)

    def stop(evaluation):
        if evaluation.step == 15 * (after + 1):  # before it is saved: the checkpoint of the one before counts
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(copy.deepcopy(resumed), learned, held_out, tmp_path / "cut", RECIPE, stop)
    history = distil(resumed, learned, held_out, tmp_path / "cut", RECIPE)
    assert [(entry.step, entry.loss, entry.quality) for entry in history] == [
        (entry.step, entry.loss, entry.quality) for entry in expected
    ]
    assert torch.equal(weights(resumed), weights(whole))


def test_a_finished_run_is_not_run_again(world, tmp_path):
    """Catches a second call that learns on at a rate of zero, or that forgets what the first one found."""
    target, learned, held_out = world
    first, second = cold(target), cold(target)
    recipe = Recipe(steps=4, warmup_steps=1, batch_tokens=100, evaluations=2)
    history = distil(first, learned, held_out, tmp_path, recipe)
    told = []
    assert distil(second, learned, held_out, tmp_path, recipe, told.append) == history
    assert not told
    assert torch.equal(weights(second), weights(first))


def test_loss_of_halves_is_that_of_the_whole(world, tmp_path, monkeypatch):
    """Catches a step that counts for more or less where only some texts take it; and texts that are left out."""
    target, learned, _ = world
    batch = list(range(6))
    found = {}
    for name, halves in (("all", [(torch.arange(6), 1)]), ("cut", [(torch.arange(4), 1), (torch.arange(4, 6), 1)])):
        trainer = trainer_of(Student(cold(target)), learned, tmp_path)
        inputs = trainer.data_collator([learned[text] for text in batch])
        monkeypatch.setattr(HalvesReader, "groups", lambda self, rows: [(slice(rows), 1)])
        expected = trainer.compute_loss(trainer.model, inputs)
        monkeypatch.setattr(HalvesReader, "groups", lambda self, rows, halves=halves: halves)
        found[name] = trainer.compute_loss(trainer.model, inputs)
        torch.testing.assert_close(found[name], expected)
    monkeypatch.undo()
    rows, steps = zip(*trainer._reader.groups(7), strict=True)
    assert sorted(torch.cat(rows).tolist()) == list(range(7))
    assert [len(some) for some in rows] == [4, 3]
    assert steps == (0, 1)


def trainer_of(student, learned, folder):
    callback = OfflineCallback(RECIPE, lambda: None, lambda history: None)
    return OfflineTrainer(student.model, learned, RECIPE, callback, folder, bf16=False)


def test_a_batch_without_a_finite_gradient_is_left_out(world, tmp_path, monkeypatch, caplog):
    """Catches one batch that turns the weights into nan, as happened on a GPU, and with them the rest of a run."""
    target, learned, held_out = world
    draw = OfflineTrainer._draw

    def poisoned(self, size):
        found = draw(self, size)
        return found if self.state.global_step != 3 else [replace(one, states=one.states * math.nan) for one in found]

    monkeypatch.setattr(OfflineTrainer, "_draw", poisoned)
    history = distil(cold(target), learned, held_out, tmp_path, RECIPE)
    assert "Step 3 is left out" in caplog.text
    assert all(math.isfinite(one.loss) for one in history[1:])
    assert history[-1].quality.agreement > history[0].quality.agreement + 0.2


def test_half_precision_is_trained_in_float32(world, tmp_path):
    """Catches steps that bfloat16 rounds away, and a draft that changes its dtype."""
    target, learned, held_out = world
    draft = cold(copy.deepcopy(target).to(torch.bfloat16))
    recipe = Recipe(steps=3, matrix_rate=1e-4, warmup_steps=1, batch_tokens=100, evaluations=1)
    distil(draft, learned, held_out, tmp_path, recipe)
    assert draft.dtype == torch.bfloat16
    (saved,) = tmp_path.glob("checkpoint-*/model.safetensors")
    from safetensors.torch import load_file

    assert {value.dtype for value in load_file(saved).values() if value.is_floating_point()} == {torch.float32}


def test_a_run_by_the_clock_ends(world, tmp_path):
    """Catches a schedule by minutes that never ends, or whose rate does not fall."""
    target, learned, held_out = world
    recipe = Recipe(minutes=0.02, warmup_steps=1, batch_tokens=100, evaluations=2)
    history = distil(cold(target), learned, held_out, tmp_path, recipe)
    assert history[-1].minutes >= 0.02
    assert is_over(recipe, history)
    assert recipe.rate(50, 0.75) == 0.25
    assert Recipe(warmup_steps=10).rate(4, 0.0) == 0.5


def test_a_run_that_gets_no_better_ends(world, tmp_path):
    """Catches minutes of training after the texts are used up."""
    target, learned, held_out = world
    still = dict(matrix_rate=1e-9, vector_rate=1e-9)
    recipe = Recipe(steps=40, warmup_steps=1, batch_tokens=50, evaluations=20, patience=2, **still)
    history = distil(cold(target), learned, held_out, tmp_path, recipe)
    assert [entry.step for entry in history] == [0, 2, 4]


def test_quality_is_what_a_chain_would_reach(world):
    """Catches hits of other steps or positions: compares with drafting one token after the other."""
    target, _, held_out = world
    draft = cold(target)
    found = judge(draft, held_out[:2])
    first, accepted = [], []
    for one in held_out[:2]:
        ids = torch.cat((one.prompt_ids, one.output_ids))
        vocabulary = draft.vocabulary.tokens(one.prompt_ids.tolist())
        for end in range(len(one.prompt_ids), len(ids)):
            count = 0
            for step in range(min(LONGEST_CHAIN, len(ids) - end)):
                states = torch.nn.functional.pad(one.states[: end - 1].float(), (0, 0, 1, 0))
                text = ids[None, : end + step]
                own = torch.nn.functional.pad(states, (0, 0, 0, step))[None]
                logits = draft(text, states=own, own_steps=step or 0, vocabulary=vocabulary).logits
                said = vocabulary[(logits[step] if step else logits)[0, -1].argmax()]
                if step == 0:
                    first.append(bool(said == ids[end]))
                if said != ids[end + step]:
                    break
                count += 1
            if len(ids) - end >= LONGEST_CHAIN:
                accepted.append(count)
    assert found.agreement == pytest.approx(sum(first) / len(first))
    assert found.accepted == pytest.approx(sum(accepted) / len(accepted))
    assert len(found.chances) == LONGEST_CHAIN


def test_quality_of_nothing_is_nothing(world):
    """Catches a division by zero where no held-out text fits."""
    assert judge(cold(world[0]), []) == Quality(0.0, 0.0, (0.0,) * LONGEST_CHAIN)


def test_batches_hold_every_text_once_in_an_epoch():
    """Catches texts that are never learned, batches beyond their size, and an order that a resumed run lacks."""
    lengths = torch.randint(5, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches, again = Batches(lengths, 256, seed=3), Batches(lengths, 256, seed=3)
    taken = []
    for number in range(1000):
        batch = batches[number]
        assert len(batch) * max(lengths[text] for text in batch) <= 256
        taken += batch
        if len(taken) % 200 == 0:
            break
    assert sorted(taken) == list(range(200))
    assert again[40] == Batches(lengths, 256, seed=3)[40]
    assert [batches[n] for n in range(60, 70)] == [again[n] for n in range(60, 70)]
    assert [*islice(Batches([999], 256), 2)] == [[0], [0]]


def test_bad_numbers_are_refused():
    """Catches a recipe that fails after the recording."""
    for name, value in {"minutes": 0, "steps": 0, "matrix_rate": -1.0, "evaluations": 0, "patience": "x"}.items():
        with pytest.raises(ConfigError, match=name):
            Recipe(**{name: value})


def test_history_survives_json(world, tmp_path):
    """Catches figures that a second run cannot read."""
    target, learned, held_out = world
    distil(cold(target), learned, held_out, tmp_path, Recipe(steps=1, batch_tokens=50, evaluations=1))
    entries = json.loads((tmp_path / "history.json").read_text())
    assert [entry["step"] for entry in entries] == [0, 1]
    assert [one.to_dict() for one in evaluations_in(entries)] == [
        {**entry, "chances": tuple(entry["chances"])} for entry in entries
    ]
