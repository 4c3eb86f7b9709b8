"""Devices, dtypes and checkpoints that a user names: tried before the work, and refused by their names."""

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seq2seq import TEXT, encoder_decoder
from test_demo_runner import make_model, make_tokenizer
from tongues import tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
)

from hf_osd import OnlineConfig
from hf_osd.errors import ConfigError, HfOsdError, InputError, UnsupportedModelError
from hf_osd.evaluation.contenders import assistant_of
from hf_osd.evaluation.encoding import encode_prompts, join
from hf_osd.evaluation.exactness import logits_of_one_pass, plain_answers
from hf_osd.evaluation.models import (
    EMBEDDED_PAIR,
    Pair,
    generate_options,
    load_pair,
    resolve_device,
    resolve_dtype,
    stock_helper,
)

CPU = torch.device("cpu")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint that loads."""
    return saved(make_model(1, seed=0), tmp_path / "good")


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.mkldnn. is no longer used:UserWarning")
@pytest.mark.parametrize("name", ["meta", "cuda:99", "cuda:-1", "x", "", "mkldnn", "lazy", "vulkan", "hpu", "\ud800"])
def test_a_device_that_computes_nothing_here_is_refused(name: str) -> None:
    """Catches a device that torch can name and not use: an assertion of CUDA's after the models were loaded."""
    with pytest.raises(ConfigError, match=r"^device must be a torch device that computes here, .*, got '.*': "):
        resolve_device(name)


def test_a_device_is_where_its_tensors_are() -> None:
    """Catches inputs that are refused since `cpu:3` is not `cpu`."""
    assert resolve_device("cpu:3") == resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["int8", "bool", "complex64", "nonsense", "", "__name__", "nn", "None"])
def test_a_dtype_that_is_none_is_refused(name: str) -> None:
    """Catches attributes of torch that are taken for dtypes."""
    with pytest.raises(ConfigError, match=r"dtype must be 'auto' or a floating torch dtype such as 'bfloat16', got "):
        resolve_dtype(name, CPU)


def test_a_dtype_for_storage_is_refused() -> None:
    """Catches dtypes in which weights can be held and not multiplied."""
    for name in [name for name in dir(torch) if name.startswith(("float8_", "float4_"))]:
        with pytest.raises(ConfigError, match=f"dtype must be one that cpu computes in, got '{name}': "):
            resolve_dtype(name, CPU)
    assert resolve_dtype("bfloat16", CPU) is torch.bfloat16


@pytest.mark.parametrize(("fast", "loaded"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_the_checkpoints_dtype_where_the_cpu_is_fast_in_it(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, loaded: torch.dtype
) -> None:
    """Catches float32 where bfloat16 is faster, bfloat16 where it is emulated, and a float32 draft that is rounded."""
    monkeypatch.setattr("hf_osd.precision._is_fast_on_cpu", lambda dtype: fast)
    half = saved(make_model(1, seed=0).bfloat16(), tmp_path / "half")
    pair = load_pair(str(half), str(good), "cpu")
    assert pair.target.dtype is loaded
    assert pair.draft.dtype is torch.float32


def test_a_checkpoint_that_does_not_say_its_dtype_is_float32(good: Path, tmp_path: Path) -> None:
    """Catches a dtype guessed from the weights, and a crash where there is none."""
    half = saved(make_model(1, seed=0).bfloat16(), tmp_path / "half")
    change_config(dtype=None)(half)
    assert load_pair(str(half), str(good), "cpu").target.dtype is torch.float32


@pytest.mark.parametrize("names", [(None, None), (str(EMBEDDED_PAIR / "target"), str(EMBEDDED_PAIR / "draft"))])
def test_the_embedded_pair_is_float32_on_every_cpu(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str | None, str | None]
) -> None:
    """Catches a demo of another dtype than its recorded figures, since the pair is stored in bfloat16."""
    monkeypatch.setattr("hf_osd.precision._is_fast_on_cpu", lambda dtype: True)
    pair = load_pair(*names, "cpu")
    assert pair.target.dtype is pair.draft.dtype is torch.float32
    assert load_pair(*names, "cpu", "bfloat16").target.dtype is torch.bfloat16


def change_config(**settings: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return change


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": cut("config.json", 20),
    "an empty config": lambda folder: (folder / "config.json").write_text("{}"),
    "a config that is no object": lambda folder: (folder / "config.json").write_text("[]"),
    "a family that is unknown": change_config(model_type="nonsense"),
    "no heads": change_config(num_attention_heads=0),
    "a text for a number": change_config(hidden_size="x"),
    "another shape": change_config(hidden_size=64),
    "layers without weights": change_config(num_hidden_layers=3),
    "code of its own": change_config(model_type="own", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": cut("model.safetensors", 1000),
    "weights of zeros": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 4000),
    "a broken tokenizer": cut("tokenizer.json", 20),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("token*")],
    "no folder": lambda folder: shutil.rmtree(folder),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_does_not_load_is_named(good: Path, tmp_path: Path, damage: str) -> None:
    """Catches tracebacks of whatever type a broken checkpoint raises, and weights that are drawn at random instead."""
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    DAMAGES[damage](bad)
    with pytest.raises(UnsupportedModelError, match=rf"cannot load '{bad}', as a folder or from the Hub: .") as caught:
        load_pair(str(bad), str(good), "cpu")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_other_kinds_of_models_are_refused(good: Path, tmp_path: Path) -> None:
    """Catches models that read the whole text, that hear, or that rate it, all of which may load."""
    small = {
        "vocab_size": 259,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    models = {
        "is no causal language model": BertForMaskedLM(BertConfig(**small)),
        "MoonshineConfig is of a model that hears; use one that reads text": encoder_decoder("moonshine"),
        "weights of LlamaForCausalLM are missing, such as lm_head.weight": LlamaForSequenceClassification(
            make_model(1, seed=0).config
        ),
    }
    for number, (message, model) in enumerate(models.items()):
        folder = saved(model, tmp_path / str(number))
        with pytest.raises(UnsupportedModelError, match=message):
            load_pair(str(folder), str(good), "cpu")


@pytest.mark.parametrize("kind", TEXT)
def test_a_pair_with_encoders(kind: str, tmp_path: Path) -> None:
    """Catches encoders that are left behind, and an answer that is cut by the columns of its source."""
    names = [str(saved(encoder_decoder(kind, seed, vocab_size=259), tmp_path / str(seed))) for seed in range(2)]
    pair = load_pair(*names, "cpu", "float32")
    assert pair.has_encoder
    requests = encode_prompts(pair, ["zanzibar", "b" * 20], 8)
    options = generate_options(pair, 8)
    batch = join(requests, options["pad_token_id"], right=True)
    together = plain_answers(pair.target, batch, options)
    for request, in_batch in zip(requests, together, strict=True):
        (answer,) = plain_answers(pair.target, request, options)
        assert torch.equal(answer.tokens, in_batch.tokens)
        logits = logits_of_one_pass(pair.target, request["input_ids"][0], answer.tokens)
        torch.testing.assert_close(logits, answer.logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedModelError, match="no draft can be made"):
        load_pair(names[0], None, "cpu")


def test_a_prompt_of_an_encoder_leaves_the_decoder_all_of_its_room(tmp_path: Path) -> None:
    """Catches sources that are left out since source and answer together are longer than the context."""
    folder = str(saved(encoder_decoder("bart", vocab_size=259), tmp_path / "bart"))
    pair = load_pair(folder, folder, "cpu")
    assert len(encode_prompts(pair, ["b" * 80, "b" * 200], 60)) == 1


def test_a_draft_with_another_tokenizer(good: Path, tmp_path: Path) -> None:
    """Catches a draft of as many tokens that is taken for one of the family, also by transformers, or is refused."""
    words = tokenizer(string.ascii_lowercase)
    for size, helper in ((259, "prompt_lookup_num_tokens"), (len(words), "assistant_tokenizer")):
        draft = make_model(1, seed=2)
        draft.resize_token_embeddings(size)
        draft.save_pretrained(tmp_path / str(size))
        words.save_pretrained(tmp_path / str(size))
        pair = load_pair(str(good), str(tmp_path / str(size)), "cpu")
        assert pair.draft_tokenizer is not None
        assert helper in stock_helper(pair)
        with assistant_of(pair, OnlineConfig()) as assistant:
            assert assistant.routes.first.translation is not None
        assert encode_prompts(pair, ["zanzibar"], 8)
    assert load_pair(str(good), str(good), "cpu").draft_tokenizer is None


def test_a_padded_vocabulary_is_no_other_tokenizer(good: Path, tmp_path: Path) -> None:
    """Catches a pair such as Qwen2.5 7B and 0.5B that transformers refuses for want of two tokenizers."""
    draft = make_model(1, seed=2)
    draft.resize_token_embeddings(300)
    pair = load_pair(str(good), str(saved(draft, tmp_path / "padded")), "cpu")
    assert pair.draft_tokenizer is None
    assert stock_helper(pair)["assistant_tokenizer"] is pair.tokenizer


def test_a_model_of_nan_is_refused(good: Path, tmp_path: Path) -> None:
    """Catches figures of a model that says nothing: every output equals every other then."""
    model = AutoModelForCausalLM.from_pretrained(good)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match=r"computes no numbers in torch.float32, but NaN"):
        load_pair(str(saved(model, tmp_path / "nan")), str(good), "cpu")


def test_what_transformers_cannot_decode_with_is_refused_before_the_run(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a target whose cache cannot roll back: transformers' assisted decoding fails in the first request."""
    monkeypatch.setattr("transformers.LlamaForCausalLM._is_stateful", True)
    monkeypatch.setattr("hf_osd.evaluation.models.check_pair", lambda *_: None)  # it refuses the draft first
    with pytest.raises(UnsupportedModelError, match=r"transformers cannot decode with that draft here: .*stateful"):
        load_pair(str(good), str(good), "cpu")


def test_the_trial_leaves_the_draft_alone(good: Path) -> None:
    """Catches contenders that begin with what transformers learned of the draft in the trial."""
    pair = load_pair(str(good), str(good), "cpu")
    fresh = AutoModelForCausalLM.from_pretrained(good)
    assert pair.draft.generation_config.to_dict() == fresh.generation_config.to_dict()
    assert not hasattr(pair.draft, "past_key_values")


@pytest.fixture
def pair() -> Pair:
    return Pair(make_model(2, seed=1), make_model(1, seed=2), make_tokenizer())


@pytest.mark.parametrize("tokens", [256, 10**6, 10**30])
def test_an_answer_longer_than_the_context_is_refused_before_anything_is_encoded(pair: Pair, tokens: int) -> None:
    """Catches thousands of prompts that are encoded, and each found too long."""
    with pytest.raises(InputError, match=f"max_new_tokens={tokens} leaves no room for a prompt in a context of 256"):
        encode_prompts(pair, iter(lambda: "x", None), tokens)


@pytest.mark.parametrize("template", ["{% for", "{{ raise_exception('no\nsystem') }}", "{{ messages[7]['content'] }}"])
def test_a_template_that_refuses_a_prompt_is_named_by_the_prompt(pair: Pair, template: str) -> None:
    """Catches errors of a checkpoint's own template, each of a type of its own."""
    pair.tokenizer.chat_template = template
    with pytest.raises(InputError, match="prompt 1 cannot be encoded: ") as caught:
        encode_prompts(pair, ["hi"], 8)
    assert "\n" not in str(caught.value)


def test_tokens_that_a_model_does_not_have_are_named(pair: Pair) -> None:
    """Catches the tokenizer of another model: an IndexError in an embedding, or a device-side assertion."""
    small = make_model(1, seed=2)
    small.resize_token_embeddings(40)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer has a token \d+, the draft knows 40 tokens"):
        encode_prompts(Pair(pair.target, small, pair.tokenizer), ["hi"], 8)
    with pytest.raises(HfOsdError, match=r"the target knows 40 tokens"):
        encode_prompts(Pair(small, pair.draft, pair.tokenizer), ["hi"], 8)
