"""Models that the benchmark makes itself: scripted drafts, and a pair that it trains."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes import prompts, tiny_model
from test_demo_runner import make_tokenizer
from transformers import DynamicCache

import hf_osd
from benchmarks.suites.architecture import llama_config, random_model
from benchmarks.suites.models import ModelOptions, open_models
from benchmarks.suites.scripted import Script
from benchmarks.suites.training import BLOCK, Recipe, load_rows, pack, train
from hf_osd import ConfigError, OnlineAssistant, OnlineConfig
from hf_osd.bench.serving import fixed_settings
from hf_osd.errors import PromptSourceError
from hf_osd.evaluation.contenders import Generate

OPTIONS = {"max_new_tokens": 96, "do_sample": False, "pad_token_id": 0}


def silent(description: str, total: int) -> Callable[[], None]:
    return lambda: None


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("batch", [1, 4])
def test_scripted_proposals_are_accepted_at_the_chosen_rate(rate: float, batch: int) -> None:
    """Would catch a script that is off by one position, or that mixes up rows of different lengths."""
    target, draft = tiny_model(), tiny_model(layers=1, seed=7)
    script = Script(draft, rate)
    config = OnlineConfig(draft_length=4, draft_length_schedule="constant", learn=False)
    with OnlineAssistant(draft, target, config) as assistant:
        for seed in range(2):
            request = prompts(batch, seed=seed)
            script.learn_answer(target, request, OPTIONS)
            output = hf_osd.generate(target, **request, **OPTIONS, online_assistant=assistant)
            assert torch.equal(output, target.generate(**request, **OPTIONS))
        found = assistant.stats().acceptance_rate
    assert found == pytest.approx(rate, abs=0.1 if 0 < rate < 1 else 1e-9)


def test_transformers_own_loop_hears_the_same_script() -> None:
    """Would catch two engines being compared at different acceptance."""
    target, draft = tiny_model(), tiny_model(layers=1, seed=7)
    script, request = Script(draft, 1.0), prompts(1)
    script.learn_answer(target, request, OPTIONS)
    stock = Generate("stock", target, draft, fixed_settings(5))
    passes = []
    handle = target.register_forward_hook(lambda *_: passes.append(1))
    output, _ = stock.answer(request, **OPTIONS)
    handle.remove()
    assert len(passes) == 96 // 6  # all five accepted, and one more, every round
    assert torch.equal(output, target.generate(**request, **OPTIONS)[:, 9:].cpu())


def test_a_script_pays_for_the_drafts_own_forward_and_leaves_its_weights() -> None:
    """Would catch a scripted draft that is free, and so flatters every engine."""
    draft = tiny_model(layers=1)
    before = {name: weight.clone() for name, weight in draft.state_dict().items()}
    script, ran = Script(draft, 1.0), []
    draft.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    ids = prompts(1)["input_ids"]
    script.load(torch.cat([ids, torch.tensor([[17, 23]])], dim=1), torch.ones_like(ids), vocab_size=61)
    with torch.no_grad():
        assert draft(ids).logits[0, -1].argmax() == 17
    assert ran == [1]
    assert all(torch.equal(weight, before[name]) for name, weight in draft.state_dict().items())


def test_a_script_says_the_same_however_many_tokens_are_fed() -> None:
    """Would catch a draft that is refused, since its logits depend on how many tokens it is fed at once."""
    draft, ids = tiny_model(layers=1), prompts(1)["input_ids"]
    script = Script(draft, 0.5)
    script.load(torch.cat([ids, torch.tensor([[17]])], dim=1), torch.ones_like(ids), vocab_size=61)
    with torch.no_grad():
        at_once = draft(ids).logits.argmax(-1)
        cache = DynamicCache(config=draft.config)
        one_by_one = [draft(token, past_key_values=cache).logits.argmax(-1) for token in ids.split(1, dim=1)]
    assert at_once.tolist() == torch.cat(one_by_one, dim=1).tolist()
    assert at_once[0, -1] in (17, 18)


def test_the_default_shapes_have_the_sizes_they_are_said_to_have() -> None:
    """Would catch 'true scale' shrinking by a typo in a shape."""
    sizes = []
    for shape, vocabulary in (("2048x16", 4096), ("1024x3", 4096), ("4096x32", 128_256), ("2048x4", 128_256)):
        sizes.append(random_model(llama_config(shape, vocabulary), torch.device("meta"), torch.bfloat16, 0))
    trained, its_draft, scripted, scripted_draft = (model.num_parameters() / 1e9 for model in sizes)
    assert 0.5 < trained < 1.5
    assert 7 < scripted < 8.5
    assert 10 < trained / its_draft < 20
    assert 10 < scripted / scripted_draft < 20


@pytest.mark.parametrize("shape", ["big", "2048", "0x4", "33x2", "64x0"])
def test_a_shape_that_cannot_be_read_is_named(shape: str) -> None:
    """Would catch a shape error that comes out of the depths of transformers."""
    with pytest.raises(ConfigError, match=f"HIDDENxLAYERS.*{shape}"):
        ModelOptions(models="scripted", target_shape=shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "huge"}, "models must be one of 'given', 'trained', 'scripted', got 'huge'"),
        ({"models": "given", "vocabulary": 99}, "vocabulary=99 means nothing with models='given'"),
        ({"models": "trained", "target": "x"}, "target='x' means nothing with models='trained'"),
        ({"models": "scripted", "acceptance": 1.5}, r"acceptance must be in \[0, 1\] .*, got 1.5"),
        ({"models": "trained", "train_seconds": 0}, r"train_seconds must be in \[1e-06, 1e\+09\] .*, got 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], message: str) -> None:
    """Would catch an option that is silently without effect."""
    with pytest.raises(ConfigError, match=message):
        ModelOptions(**options)


def test_training_lowers_the_loss_within_its_time() -> None:
    """Would catch labels that do not match, a learning rate of zero, and a schedule that never ends."""
    blocks = pack([("count", "one two three four " * 40)], make_tokenizer())
    model = random_model(llama_config("32x1", 259), torch.device("cpu"), torch.float32, seed=0)
    before = model(blocks, labels=blocks).loss.item()
    told = []
    learned = train(model, blocks, Recipe(1.0, 1, 2e-3), lambda *_: lambda: told.append(1), "target")
    assert learned["tokens"] == learned["steps"] * BLOCK
    assert model(blocks, labels=blocks).loss.item() < 0.8 * before
    assert not model.training
    assert 1 <= len(told) <= 100


def test_conversations_are_packed_with_the_chat_template() -> None:
    """Would catch a target that never learns to answer, since it was trained on another format than it is served."""
    tokenizer = make_tokenizer()
    blocks = pack([("ask", "tell")] * 200, tokenizer)
    assert blocks.shape[1] == BLOCK
    assert tokenizer.decode(blocks[0]).startswith("<bos>[user]ask[assistant]tell<bos>")
    assert pack([("a", "b")], tokenizer).shape == (1, BLOCK)


def test_rows_without_a_response_are_named(tmp_path: Path) -> None:
    """Would catch a training file that fails minutes into a run on a GPU."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + '\n{"prompt": "c"}\n')
    with pytest.raises(PromptSourceError, match=r"rows.jsonl, line 2: expected an object with 'prompt' and 'resp"):
        load_rows([str(path)])
    with pytest.raises(PromptSourceError, match="cannot be read"):
        load_rows([str(tmp_path / "missing.jsonl")])


def test_a_trained_pair_is_ready_to_serve(tmp_path: Path) -> None:
    """Would catch a pair that cannot be handed to generate: other vocabularies, train mode, no eos."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b " * 300}) + "\n")
    options = ModelOptions(
        models="trained", target_shape="32x2", draft_shape="16x1", train_prompts=[str(path)], train_seconds=0.2,
        device="cpu",
    )  # fmt: skip
    models = open_models(options, silent)
    pair = models.pair
    assert pair.target.generation_config.eos_token_id == pair.tokenizer.eos_token_id
    assert models.about["training"]["target"]["steps"] >= 1
    with OnlineAssistant(pair.draft, pair.target) as assistant:
        ids = torch.tensor([[1, 40, 41]])
        assert hf_osd.generate(pair.target, ids, online_assistant=assistant, max_new_tokens=5).shape[1] > 3


@pytest.mark.gpu
def test_a_script_is_heard_through_captured_graphs() -> None:
    """Would catch a graph of the draft that goes on reading the script of an earlier request."""
    target, draft = tiny_model(dtype=torch.float32).to("cuda"), tiny_model(layers=1, dtype=torch.float32).to("cuda")
    script = Script(draft, 1.0)
    config = OnlineConfig(draft_length=4, draft_length_schedule="constant", learn=False)
    with OnlineAssistant(draft, target, config) as assistant:
        for seed in range(4):
            request = {name: tensor.to("cuda") for name, tensor in prompts(1, seed=seed).items()}
            script.learn_answer(target, request, OPTIONS)
            hf_osd.generate(target, **request, **OPTIONS, online_assistant=assistant)
        assert assistant.stats().acceptance_rate > 0.95
