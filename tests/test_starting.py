"""The start of a draft in closed form."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from fakes import ARCHITECTURES, VOCAB, tiny_model

from hf_osd.design.judging import judge
from hf_osd.design.recording import record
from hf_osd.design.requests import Request
from hf_osd.drafts.features import FeatureDraft
from hf_osd.drafts.starting import POSITIONS, is_due, solve, start
from hf_osd.drafts.states import StateTap


def recorded(target, folder, draft, count=60):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (6,), generator=generator) for _ in range(count)]
    return record(
        target, [Request(ids, None, 1) for ids in prompts], folder, state_layers=draft.state_layers, max_new_tokens=20
    )


def entering(draft, ids, states):
    """What enters the draft's first layer."""
    seen = []
    stack = next(module for module in draft.body.modules() if isinstance(module, torch.nn.ModuleList))
    hook = stack[0].register_forward_pre_hook(
        lambda module, inputs, options: seen.append([*inputs, *options.values()][0]), with_kwargs=True
    )
    draft(ids[None, :-1], states=torch.nn.functional.pad(states, (0, 0, 1, 0))[None, :-1])
    hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "mistral", "gemma3"])
@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_layers_are_fed_as_the_target_feeds_them(kind, layers, tmp_path):
    """Catches a solution for another position, layer or scale: it has to leave less than a cold draft does."""
    target = tiny_model(kind, layers=4, dtype=torch.float32, initializer_range=0.1)
    torch.manual_seed(0)
    draft = FeatureDraft.of(target, layers=layers)
    texts = recorded(target, tmp_path, draft)
    one = texts[0]
    ids = torch.cat((one.prompt_ids, one.output_ids))
    tap = StateTap.of(target, (4 - layers,))
    wanted = tap.read(partial(target, ids[None, :-1]))[1][0]
    before = (entering(draft, ids, one.states.float()) - wanted)[1:].pow(2).mean()
    assert start(draft, texts)
    after = (entering(draft, ids, one.states.float()) - wanted)[1:].pow(2).mean()
    assert after < 0.3 * before


@pytest.mark.parametrize("count", [20, 3])  # more positions than inputs, and fewer
@torch.no_grad()
def test_solution_is_that_of_least_squares(tmp_path, count):
    """Catches equations that are added up wrongly, or a dual that is none: compares with the whole matrices."""
    target = tiny_model(layers=4, dtype=torch.float32)
    draft = FeatureDraft.of(target)
    texts = [replace(text, states=None) for text in recorded(target, tmp_path, draft, count)]
    assert start(draft, texts)
    inputs, outputs = [], []
    tap = StateTap.of(target, (*draft.state_layers, 3))
    for one in texts:
        ids = torch.cat((one.prompt_ids, one.output_ids))
        *levels, wanted = tap.read(partial(target, ids[None, :-1]))[1][0].chunk(len(draft.state_layers) + 1, -1)
        levels = [level[:-1] for level in levels]
        levels = [level / level.pow(2).mean(-1, True).sqrt() for level in levels]
        inputs.append(torch.cat([*levels, target.get_input_embeddings()(ids[1:-1])], dim=-1))
        outputs.append(wanted[1:])
    x, y = torch.cat(inputs), torch.cat(outputs)
    unit = inputs[0][:, -32:].pow(2).mean().sqrt()
    x[:, -32:] /= unit
    gram = x.T @ x
    assert (len(x) > x.shape[1]) == (count == 20)
    strength = 1e-2 * (POSITIONS / len(x)) ** 0.75
    solved = torch.linalg.solve(gram + strength * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y)
    torch.testing.assert_close(draft.from_states.weight, solved[:-32].T, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(draft.from_token.weight, solved[-32:].T / unit, atol=1e-3, rtol=1e-2)


def test_a_start_is_worth_something(tmp_path):
    """Catches a start that is no better than a cold draft on texts that it was not solved for."""
    from test_design_distilling import predictable_model

    target = predictable_model()
    draft = FeatureDraft.of(target)
    generator = torch.Generator().manual_seed(7)
    asked = [Request(torch.randint(3, VOCAB, (6,), generator=generator), None, 6) for _ in range(8)]
    held_out = [*record(target, asked, tmp_path, state_layers=draft.state_layers, max_new_tokens=20)]
    before = judge(draft, held_out)
    assert start(draft, recorded(target, tmp_path, draft))
    assert judge(draft, held_out).agreement > before.agreement + 0.1


def test_what_cannot_be_solved_is_left_alone(tmp_path):
    """Catches a layer norm in front of the layers that is taken for a scale, and a draft of the whole target."""
    bloom = tiny_model("bloom", layers=2, dtype=torch.float32)
    whole = tiny_model(layers=2, dtype=torch.float32)
    plain = tiny_model(layers=2, dtype=torch.float32)
    for target, options in ((bloom, {}), (whole, {"layers": 2}), (plain, {"state_layers": ()})):
        draft = FeatureDraft.of(target, **options)
        weights = {name: value.clone() for name, value in draft.state_dict().items()}
        assert not start(draft, recorded(target, tmp_path, draft, count=4))
        assert all(torch.equal(value, weights[name]) for name, value in draft.state_dict().items())


def test_solving_changes_nothing(tmp_path):
    """Catches a solution that touches the draft by itself, and a cold draft that is saved as another."""
    target = tiny_model(layers=4, dtype=torch.float32)
    draft = FeatureDraft.of(target)
    weights = {name: value.clone() for name, value in draft.state_dict().items()}
    texts = recorded(target, tmp_path, draft, count=4)
    found = solve(draft, texts)
    assert sorted(found) == ["from_self.weight", "from_states.weight", "from_token.weight"]
    assert all(torch.equal(value, weights[name]) for name, value in draft.state_dict().items())
    draft.save_pretrained(tmp_path / "draft")
    assert FeatureDraft.from_pretrained(tmp_path / "draft").config.solved == 0


def test_solutions_become_rare_and_end():
    """Catches a draft that is solved for with every update, or for ever, or one that was distilled and is set back."""
    solved, due = 0, []
    for positions in range(0, 40_000, 500):
        if is_due(solved, positions):
            solved = positions
            due.append(positions)
    assert due == [500, 1000, 2000, 4000, 8000, 16000]
    assert not is_due(None, 10_000)


@torch.no_grad()
def test_recorded_states_are_enough(tmp_path, monkeypatch):
    """Catches a solution that has the target read again what is recorded, or that takes another layer for wanted."""
    target = tiny_model(layers=6, dtype=torch.float32)
    draft = FeatureDraft.of(target)
    texts = recorded(target, tmp_path, draft, count=20)
    expected = solve(draft, [replace(text, states=None) for text in texts])
    monkeypatch.setattr(StateTap, "read", None)
    for name, value in solve(draft, texts).items():
        torch.testing.assert_close(value, expected[name], atol=2e-2, rtol=0.1)
