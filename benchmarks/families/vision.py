"""Vision-language models, asked about text only and about an image in each prompt."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from .building import LLAMA_LIKE, build, configure, prompts
from .cases import Case, family

IMAGE, VIDEO, MARK = 3, 4, 2  # token ids that no random prompt has: of images, of videos, around images
SIDE, PATCH = 16, 8  # pixels of an image, and of what becomes one token of the tower
TEXT_BEHIND = 3  # tokens of a prompt behind its image

_TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
    patch_size=PATCH, num_channels=3,
)  # fmt: skip
_SIGLIP = dict(_TOWER, model_type="siglip_vision_model", vision_use_head=False)
_QWEN_TOWER = dict(
    depth=2, hidden_size=32, num_heads=4, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2, in_channels=3
)
_QWEN_TEXT = dict(
    LLAMA_LIKE, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
)
_GEMMA3_TEXT = dict(
    LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, sliding_window=64,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip

Extras = Callable[[torch.Tensor, torch.Generator], dict[str, torch.Tensor]]


def _one_image(ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(ids), 3, SIDE, SIDE, generator=generator)}


def _list_of_images(ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(ids), 1, 3, SIDE, SIDE, generator=generator)}


def _patches(ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A grid of four by four patches for each row, which merge into four tokens."""
    return {
        "pixel_values": torch.randn(len(ids) * 16, 3 * 2 * PATCH * PATCH, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(ids)),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def _with_types(ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_one_image(ids, generator), "token_type_ids": (ids == IMAGE).long()}


def _with_prefix(ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """All of a prompt is prefix, which PaliGemma reads in both directions."""
    return {**_one_image(ids, generator), "token_type_ids": torch.zeros_like(ids)}


@dataclass(frozen=True)
class _Family:
    """How a model is configured, and what it takes with an image."""

    name: str  # prefix of the classes
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    settings: Mapping[str, Any]
    extras: Extras

    def build(self, seed: int) -> PreTrainedModel:
        parts = dict(vision_config=dict(self.vision), text_config=dict(self.text))
        config = configure(self.name, parts, tie_word_embeddings=False, **self.settings)
        return build(config, seed, f"{self.name}ForConditionalGeneration")


_INDEX, _ID = dict(image_token_index=IMAGE), dict(image_token_id=IMAGE)
_LLAMA = dict(LLAMA_LIKE, model_type="llama")
_QWEN = dict(video_token_id=VIDEO, vision_start_token_id=MARK, vision_end_token_id=MARK, **_ID)
_FAMILIES: Mapping[str, _Family] = {
    "LLaVA": _Family(
        "Llava", dict(_TOWER, model_type="clip_vision_model", projection_dim=32), _LLAMA,
        dict(image_seq_length=4, **_INDEX), _one_image,
    ),
    "SmolVLM": _Family("SmolVLM", _TOWER, _LLAMA, dict(scale_factor=1, pad_token_id=0, **_ID), _list_of_images),
    "Idefics 3": _Family("Idefics3", _TOWER, _LLAMA, dict(scale_factor=1, pad_token_id=0, **_ID), _list_of_images),
    "PaliGemma": _Family(
        "PaliGemma", dict(_SIGLIP, projection_dim=32), dict(LLAMA_LIKE, model_type="gemma", head_dim=8),
        dict(projection_dim=32, hidden_size=32, **_INDEX), _with_prefix,
    ),
    "Gemma 3 (vision)": _Family(
        "Gemma3", _SIGLIP, _GEMMA3_TEXT,
        dict(mm_tokens_per_image=4, boi_token_index=MARK, eoi_token_index=MARK, **_INDEX), _with_types,
    ),
    "Qwen2-VL": _Family("Qwen2VL", dict(_QWEN_TOWER, embed_dim=32, mlp_ratio=2), _QWEN_TEXT, _QWEN, _patches),
    "Qwen2.5-VL": _Family(
        "Qwen2_5_VL",
        dict(_QWEN_TOWER, out_hidden_size=32, intermediate_size=48, window_size=32, fullatt_block_indexes=[1]),
        _QWEN_TEXT, _QWEN, _patches,
    ),
    "Qwen3-VL": _Family(
        "Qwen3VL",
        dict(_QWEN_TOWER, out_hidden_size=32, intermediate_size=48, num_position_embeddings=16,
             deepstack_visual_indexes=[0]),
        dict(_QWEN_TEXT, head_dim=8), _QWEN, _patches,
    ),
}  # fmt: skip


def _with_image(extras: Extras, batch: int, seed: int) -> dict[str, torch.Tensor]:
    """Prompts with an image of four tokens in each, near the end: padding stays on the left."""
    text = prompts(batch, seed)
    ids, mask = text["input_ids"], text["attention_mask"]
    image = torch.full((batch, 4), IMAGE)
    ids = torch.cat([ids[:, :-TEXT_BEHIND], image, ids[:, -TEXT_BEHIND:]], dim=1)
    mask = torch.cat([mask, torch.ones_like(image)], dim=1)
    return {"input_ids": ids, "attention_mask": mask, **extras(ids, torch.Generator().manual_seed(seed + 7))}


def _asked_about_text(about: _Family) -> Case:
    return family(about.build)


def _asked_about_images(about: _Family) -> Case:
    return family(about.build, as_draft=False, inputs=partial(_with_image, about.extras))


TEXT_ONLY: Mapping[str, Callable[[], Case]] = {
    title: partial(_asked_about_text, about) for title, about in _FAMILIES.items()
}
WITH_IMAGES: Mapping[str, Callable[[], Case]] = {
    title: partial(_asked_about_images, about) for title, about in _FAMILIES.items()
}
