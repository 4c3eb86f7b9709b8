"""Small models with random weights, and prompts for them."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

VOCAB = 200  # tokens of a model's vocabulary
PROMPT = 12  # tokens of a prompt
FIRST_TOKEN = 5  # lower ids have a meaning: padding, begin, end, image, video
WEIGHTS = 0.3  # standard deviation of the weights: wide enough that greedy output is not one token over and over
NOISE = 0.05  # of a near draft's weights, in standard deviations: about half of its tokens are right

SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
SHARED = dict(vocab_size=VOCAB, tie_word_embeddings=False, **SPECIAL)
LLAMA_LIKE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, **SHARED,
)  # fmt: skip
GPT2_LIKE = dict(n_embd=32, n_head=4, n_layer=2, n_positions=256, **SHARED)


class Missing(Exception):  # noqa: N818 -- no error: a row that this installation cannot have
    """A class or a package that a row needs is not installed."""


def find(name: str) -> Any:
    """Return a class of transformers by its name; raises [`Missing`] where this version has none."""
    try:
        return getattr(transformers, name)
    except AttributeError:
        raise Missing(f"transformers {transformers.__version__} has no {name}") from None


def configure(name: str, base: Mapping[str, Any] = LLAMA_LIKE, **settings: Any) -> PreTrainedConfig:
    """Return a small configuration, `LlamaConfig` for "Llama"; the settings go over those of `base`."""
    return find(f"{name}Config")(**{**base, **settings})


def build(
    config: PreTrainedConfig, seed: int = 0, architecture: str = "AutoModelForCausalLM", weights: float = WEIGHTS
) -> PreTrainedModel:
    """
    Return a model of random weights, float32, that never ends its output by itself.

    Args:
        config (`PreTrainedConfig`): Its configuration.
        seed (`int`, defaults to 0): Other seeds have other weights.
        architecture (`str`, defaults to `"AutoModelForCausalLM"`): Name of the class.
        weights (`float`, defaults to 0.3): Standard deviation of the weights.
    """
    torch.manual_seed(seed)
    kind = find(architecture)
    model = kind.from_config(config) if architecture.startswith("Auto") else kind(config)
    model = model.to(torch.float32).eval()
    kept = {name: getattr(model.generation_config, name, None) for name in ("decoder_start_token_id",)}
    model.generation_config = GenerationConfig(**SPECIAL, **kept)
    _redraw(model, weights, torch.Generator().manual_seed(seed + 1))
    return model


@torch.no_grad()
def _redraw(model: PreTrainedModel, weights: float, generator: torch.Generator) -> None:
    """Not every model heeds `initializer_range`. A_log is how fast a state decays, and has to stay in its range."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not name.endswith("A_log"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * weights)


@torch.no_grad()
def with_noise(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    """Return the model with noise on its weights: a draft that is right now and then, for every length of a run."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dim() >= 2:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(noise * NOISE * parameter.std().clamp(max=1.0))
    return model


def llama(seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a small Llama."""
    return build(configure("Llama", **settings), seed)


def small_draft(vocab: int = VOCAB) -> PreTrainedModel:
    """Return a Llama of one layer with weights of its own: a draft that is hardly ever right."""
    return llama(seed=77, num_hidden_layers=1, vocab_size=vocab)


def prompts(batch: int, seed: int = 0, padded: bool = True) -> dict[str, torch.Tensor]:
    """
    Return random prompts.

    Args:
        batch (`int`): Rows.
        seed (`int`, defaults to 0): Other seeds, and other batches, have other tokens.
        padded (`bool`, defaults to `True`): Whether rows but the first have padding on the left, each as much as none
            other of four.

    Returns:
        `dict[str, torch.LongTensor]`: `input_ids` and `attention_mask` of shape `(batch, PROMPT)`.
    """
    generator = torch.Generator().manual_seed(100 * seed + batch)
    input_ids = torch.randint(FIRST_TOKEN, VOCAB, (batch, PROMPT), generator=generator)
    padding = torch.tensor([3 * row % PROMPT if padded else 0 for row in range(batch)])
    mask = (torch.arange(PROMPT) >= padding[:, None]).long()
    return {"input_ids": input_ids * mask, "attention_mask": mask}  # token 0 is padding
