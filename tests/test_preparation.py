"""What a target's own code makes of its inputs: soft prompts, images, positions, offloaded weights."""

import copy

import accelerate
import peft
import pytest
import torch
from calls import both, static
from fakes import prompts, tiny_model, wrong_draft
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd._caches import cache_argument
from hf_osd.serving.preparation import Preparation

IMAGE = 3  # token id of an image
TEXT = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16)
VISION |= dict(patch_size=8)


def made(build, config):
    torch.manual_seed(0)
    model = build(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model


def llava():
    text = LlamaConfig(**TEXT, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False)
    vision = CLIPVisionConfig(**VISION, projection_dim=32)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4)
    return made(LlavaForConditionalGeneration, config)


def gemma3(window=64):
    text = Gemma3TextConfig(**TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=window)
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=IMAGE, mm_tokens_per_image=4)
    return made(Gemma3ForConditionalGeneration, config)


def paligemma():
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    vision = {**VISION, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False}
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )
    return made(PaliGemmaForConditionalGeneration, config)


def qwen():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = dict(depth=1, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4, patch_size=8)
    vision |= dict(spatial_merge_size=2, temporal_patch_size=2, window_size=32, fullatt_block_indexes=[0])
    text = {**TEXT, "rope_parameters": rope}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_start_token_id=2)
    return made(Qwen2_5_VLForConditionalGeneration, config)


def text_prompts(rows):
    inputs = prompts(rows)
    inputs["input_ids"] = inputs["input_ids"].where(inputs["input_ids"] != IMAGE, 7)
    return inputs


def image_prompts(rows, pixels, **more):
    inputs = text_prompts(rows)
    image = torch.full((rows, 4), IMAGE)
    ids = torch.cat([inputs["input_ids"][:, :-2], image, inputs["input_ids"][:, -2:]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(rows, 4, dtype=torch.long)], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(rows)} | {
        name: make(rows, ids) for name, make in more.items()
    }


def pictures(rows, seed=0):
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("build", [llava, gemma3, paligemma, qwen])
def test_a_vision_language_target_asked_in_text(build, rows):
    """Catches targets that are refused for what they could see, and positions that begin at one (PaliGemma)."""
    target = build()
    assistant = static(tiny_model("llama", seed=1, layers=1), target)
    expected, actual = both(target, assistant, text_prompts(rows))
    assert torch.equal(expected, actual)
    assert assistant.stats().fallbacks == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_images_of_the_first_pass(rows):
    """Catches images that are dropped, given to the wrong row, or read again with every proposal."""
    target = llava()
    near = wrong_draft(target, "noisy")
    assistant = static(tiny_model("llama", seed=1, layers=1), target)
    for seed in range(3):
        inputs = image_prompts(rows, lambda count, seed=seed: pictures(count, seed))
        expected, actual = both(target, assistant, inputs)
        assert torch.equal(expected, actual)
        other = inputs | {"pixel_values": -inputs["pixel_values"]}
        assert not torch.equal(expected, target.generate(**other, max_new_tokens=24, do_sample=False))
    assert assistant.stats().fallbacks == 0
    assistant = static(near, target)
    expected, actual = both(target, assistant, image_prompts(rows, pictures))
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("rows", [1, 3])
def test_images_that_change_mask_or_positions(rows):
    """Catches images whose tokens see each other, or have positions in three dimensions, on a plain mask."""
    draft = tiny_model("llama", seed=1, layers=1)
    image = {"token_type_ids": lambda count, ids: (ids == IMAGE).long()}
    prefix = {"token_type_ids": lambda count, ids: torch.zeros_like(ids)}  # all of it is read both ways
    for target, seen in ((gemma3(), image), (gemma3(window=6), image), (paligemma(), prefix)):
        assistant, inputs = static(draft, target), image_prompts(rows, pictures, **seen)
        expected, actual = both(target, assistant, inputs)
        assert torch.equal(expected, actual)
        assert assistant.stats().fallbacks == 0
    grid = {"mm_token_type_ids": lambda count, ids: (ids == IMAGE).long()}
    grid |= {"image_grid_thw": lambda count, ids: torch.tensor([[1, 4, 4]] * count)}

    def patches(count):
        return torch.randn(count * 16, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(0)).double()

    expected, actual = both(target := qwen(), static(draft, target), image_prompts(rows, patches, **grid))
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig])
def test_soft_prompts(kind, rows):
    """Catches a soft prompt that is left out: a PEFT model adds it where inputs are prepared, not in the forward."""
    torch.manual_seed(1)
    base = tiny_model("llama", dtype=torch.float32)
    target = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    for parameter in target.prompt_encoder.parameters():
        parameter.data.normal_()
    assistant = static(wrong_draft(base, "noisy"), target)
    inputs = {"input_ids": prompts(1)["input_ids"].expand(rows, -1).contiguous()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    # peft 0.21 hands its prefix to transformers 5.24 under the old name of the cache, and so loses it itself.
    matters = kind is not peft.PrefixTuningConfig or "past_key_values" in cache_argument((), None)
    for _ in range(2):
        expected, actual = both(target, assistant, inputs)
        assert torch.equal(expected, actual)
        with target.disable_adapter():
            without, actual = both(target, assistant, inputs)
            assert torch.equal(without, actual)
            assert torch.equal(without, expected) != matters


def test_a_soft_prompt_and_padding():
    """Catches positions of a padded prompt: PEFT counts its padding where it brings a cache of its own."""
    base = tiny_model("llama", dtype=torch.float32)
    target = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    for parameter in target.prompt_encoder.parameters():
        parameter.data.normal_()
    inputs = {name: value[1:2] for name, value in prompts(2).items()}
    expected, actual = both(target, static(wrong_draft(base, "noisy"), target), inputs)
    assert torch.equal(expected, actual)


def test_activated_lora():
    """Catches adapters that begin at a token which PEFT finds by counting from the end of a forward."""
    config = dict(r=4, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    base = tiny_model("llama", dtype=torch.float32)
    inputs = {name: value[:1] for name, value in prompts(1, length=12).items()}
    config["alora_invocation_tokens"] = inputs["input_ids"][0, 6:8].tolist()
    target = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    assistant = static(wrong_draft(base, "noisy"), target)
    expected, actual = both(target, assistant, inputs)
    assert torch.equal(expected, actual)
    assert assistant.stats().fallback_reasons == {"activated LoRA": 1}


def test_adapters_by_row():
    """Catches a trial with another number of rows than there are names of adapters, which PEFT refuses."""
    config = dict(r=4, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    target = peft.get_peft_model(tiny_model("llama", dtype=torch.float32), peft.LoraConfig(**config), "one")
    target.add_adapter("two", peft.LoraConfig(**config))
    target.eval()
    assistant = static(tiny_model("llama", seed=1, layers=1), target)
    for names in (["one", "two", "__base__"], None, ["two", "two", "one"]):
        more = {"adapter_names": names} if names else {}
        expected, actual = both(target, assistant, prompts(3), **more)
        assert torch.equal(expected, actual)
    assert assistant.stats().fallbacks == 0


@pytest.mark.parametrize("first", [True, False])
def test_autocast_on_and_off(first):
    """Catches a kept cache of one dtype that is written to in another."""
    target = tiny_model("llama", dtype=torch.float32)
    assistant = static(wrong_draft(target, "noisy"), target)
    for on in (first, not first, first):
        for rows in (2, 1):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                expected, actual = both(target, assistant, prompts(rows))
            if not on:
                assert torch.equal(expected, actual)
    assert assistant.stats().fallbacks == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_offloaded_weights(rows):
    """Catches inputs and caches that follow the weights of a target, or a draft, to the meta device."""
    plain = tiny_model("llama", dtype=torch.float32)
    target, draft = copy.deepcopy(plain), wrong_draft(plain, "noisy")
    accelerate.cpu_offload(target, execution_device="cpu")
    kwargs = {**prompts(rows), "max_new_tokens": 12, "do_sample": False}
    expected = plain.generate(**kwargs)
    config = OnlineConfig(update_every=1, steps_per_update=1, gate=False, draft_length_schedule="constant")
    with OnlineAssistant(draft, target, config) as assistant:
        for _ in range(2):
            assert torch.equal(expected, hf_osd.generate(target, **kwargs, online_assistant=assistant))
        assert (assistant.stats().updates > 0, assistant.stats().failed_updates) == (True, 0)
    accelerate.cpu_offload(draft, execution_device="cpu")
    with OnlineAssistant(draft, plain, config) as assistant:
        assert torch.equal(expected, hf_osd.generate(plain, **kwargs, online_assistant=assistant))
        assert (assistant.stats().proposed_tokens > 0, assistant.stats().updates) == (True, 0)


def test_a_draft_by_name_for_an_offloaded_target(tmp_path):
    """Catches a draft that is loaded to the meta device, where the weights of such a target are."""
    plain = tiny_model("llama", dtype=torch.float32)
    wrong_draft(plain, "noisy").save_pretrained(tmp_path)
    target = copy.deepcopy(plain)
    accelerate.cpu_offload(target, execution_device="cpu")
    kwargs = {**prompts(2), "max_new_tokens": 12, "do_sample": False}
    with OnlineAssistant.from_pretrained(tmp_path, target) as assistant:
        assert assistant.draft.device.type == "cpu"
        actual = hf_osd.generate(target, **kwargs, online_assistant=assistant)
    assert torch.equal(plain.generate(**kwargs), actual)


def test_positions_go_on_from_the_last():
    """Catches positions of later tokens that are counted in columns where the prompt's are not."""
    given = torch.tensor([[[0, 0, 1, 5], [2, 3, 4, 5]], [[0, 0, 1, 9], [2, 3, 4, 5]]])  # (2, batch, prompt)
    preparation = Preparation({}, width=4, positions=given)
    columns = torch.tensor([[2, 3, 4, 5], [3, 4, 5, 6]])
    expected = torch.tensor([[[1, 5, 6, 7], [5, 6, 7, 8]], [[1, 9, 10, 11], [5, 6, 7, 8]]])
    assert torch.equal(preparation.positions_at(columns), expected)
    assert preparation.kind == ("positions",)
    assert not preparation.is_plain
