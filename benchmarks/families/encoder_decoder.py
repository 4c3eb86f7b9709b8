"""Encoder-decoder families: text to text, and speech to text."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from .building import LLAMA_LIKE, VOCAB, build, configure, prompts, with_noise
from .cases import Case, Inputs

_IDS = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
_T5 = dict(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0, **_IDS
)
_BART = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256, decoder_start_token_id=1,
    forced_eos_token_id=None, scale_embedding=True, **_IDS,
)  # fmt: skip
_WHISPER = dict(
    _BART, num_mel_bins=8, max_source_positions=32, max_target_positions=128, suppress_tokens=None,
    begin_suppress_tokens=None,
)  # fmt: skip
_MOONSHINE = dict(
    LLAMA_LIKE, **_IDS, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4,
    decoder_num_attention_heads=4, decoder_start_token_id=1,
)  # fmt: skip
_GATED = dict(feed_forward_proj="gated-gelu")


def _text(batch: int, seed: int) -> dict[str, torch.Tensor]:
    """An encoder is padded on the right."""
    return {name: values.flip(1) for name, values in prompts(batch, seed).items()}


def _spectrum(batch: int, seed: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(batch, 8, 64, generator=torch.Generator().manual_seed(seed))}


def _wave(batch: int, seed: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 4000, generator=torch.Generator().manual_seed(seed))}


# Title -> prefix of the configuration's class, settings, the model's class, inputs, standard deviation of the weights:
# with others, the output would be few tokens over and over.
_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], str, Inputs, float]] = {
    "T5": ("T5", _T5, "T5ForConditionalGeneration", _text, 1.0),
    "Flan-T5": ("T5", {**_T5, **_GATED}, "T5ForConditionalGeneration", _text, 0.4),
    "mT5": ("MT5", {**_T5, **_GATED}, "MT5ForConditionalGeneration", _text, 0.4),
    "BART": ("Bart", _BART, "BartForConditionalGeneration", _text, 0.1),
    "mBART": ("MBart", _BART, "MBartForConditionalGeneration", _text, 0.1),
    "Marian": ("Marian", dict(_BART, decoder_vocab_size=VOCAB, decoder_start_token_id=0), "MarianMTModel", _text, 0.1),
    "Pegasus": ("Pegasus", dict(_BART, decoder_start_token_id=0), "PegasusForConditionalGeneration", _text, 0.1),
    "Whisper": ("Whisper", _WHISPER, "WhisperForConditionalGeneration", _spectrum, 0.5),
    "Moonshine": ("Moonshine", _MOONSHINE, "MoonshineForConditionalGeneration", _wave, 0.3),
}


def _make(name: str, settings: Mapping[str, Any], architecture: str, weights: float, seed: int) -> PreTrainedModel:
    model = build(configure(name, settings), seed, architecture, weights)
    model.generation_config.decoder_start_token_id = settings["decoder_start_token_id"]
    return model


def _case(name: str, settings: Mapping[str, Any], architecture: str, inputs: Inputs, weights: float) -> Case:
    """As a target, with drafts of the family, whose encoders are their own; and as such a draft."""
    make = partial(_make, name, settings, architecture, weights)
    drafts = {"wrong": make(77), "near": with_noise(make(0))}
    return Case(target=make(0), drafts=drafts, draft=make(9), host=make(5), host_inputs=inputs, inputs=inputs)


def _distilled() -> Case:
    """As Distil-Whisper is used: the draft is a decoder of one layer, without an encoder of its own."""
    case = _case(*_FAMILIES["Whisper"])
    settings = dict(_WHISPER, decoder_layers=1, is_encoder_decoder=False)
    draft = build(configure("Whisper", settings), 4, "WhisperForCausalLM", weights=0.5)
    return Case(target=case.target, drafts={"decoder": draft}, inputs=case.inputs)


ROWS: Mapping[str, Callable[[], Case]] = {
    **{title: partial(_case, *about) for title, about in _FAMILIES.items()},
    "Whisper with the decoder of Distil-Whisper": _distilled,
}
