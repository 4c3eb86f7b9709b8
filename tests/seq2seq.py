"""Small models with an encoder, of random weights, and what they read."""

import copy
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
    WhisperConfig,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
)

VOCAB = 61
_IDS = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
_T5 = dict(d_model=32, d_kv=8, d_ff=48, num_heads=4, tie_word_embeddings=False, dropout_rate=0.0, **_IDS)
_BART = dict(d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, **_IDS)
_BART |= dict(decoder_ffn_dim=48, max_position_embeddings=96, encoder_layers=2, forced_eos_token_id=None)
_BART |= dict(tie_word_embeddings=False, dropout=0.0)
_WHISPER = dict(_BART, num_mel_bins=8, max_source_positions=16, max_target_positions=96, suppress_tokens=None)
_WHISPER |= dict(begin_suppress_tokens=None)
_MOONSHINE = dict(hidden_size=32, intermediate_size=48, encoder_num_hidden_layers=2, encoder_num_attention_heads=4)
_MOONSHINE |= dict(decoder_num_attention_heads=4, max_position_embeddings=96, tie_word_embeddings=False, **_IDS)
_GEMMA = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
_GEMMA |= dict(vocab_size=VOCAB, sliding_window=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)

TEXT, SOUND = ("t5", "bart"), ("whisper", "moonshine")


def encoder_decoder(
    kind: str,
    seed: int = 0,
    layers: int = 2,
    dtype: torch.dtype = torch.float64,
    std: float = 0.3,
    vocab_size: int = VOCAB,
) -> PreTrainedModel:
    """A model that never ends its output by itself; `layers` are those of its decoder."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    size = {"vocab_size": vocab_size}
    t5 = {"num_layers": 2, "num_decoder_layers": layers}
    model: PreTrainedModel = {
        "t5": lambda: T5ForConditionalGeneration(T5Config(**{**_T5, **t5, **size})),
        "bart": lambda: BartForConditionalGeneration(BartConfig(**{**_BART, "decoder_layers": layers, **size})),
        "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**{**_WHISPER, "decoder_layers": layers})),
        "whisper decoder": lambda: WhisperForCausalLM(WhisperConfig(**{**_WHISPER, "decoder_layers": layers})),
        "moonshine": lambda: MoonshineForConditionalGeneration(
            MoonshineConfig(**_MOONSHINE, decoder_num_hidden_layers=layers)
        ),
        "t5gemma": lambda: _t5gemma(layers),
    }[kind]()
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
    start = {"decoder_start_token_id": 1}
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None, **start)
    torch.set_rng_state(state)
    return model


def _t5gemma(layers: int) -> PreTrainedModel:
    """Its decoder has windows, which are not for what the encoder has read."""
    encoder, decoder = (T5GemmaModuleConfig(num_hidden_layers=count, **_GEMMA) for count in (2, layers))
    return T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=VOCAB))


def with_noise(model: PreTrainedModel, std: float = 0.02) -> PreTrainedModel:
    """A copy that is right now and then."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return draft


def inputs_for(model: PreTrainedModel, rows: int, seed: int = 0) -> dict[str, Any]:
    """What its encoder reads: texts of different lengths, padded on the right, or sounds."""
    generator = torch.Generator().manual_seed(100 * seed + rows)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(rows, 8, 32, generator=generator).to(model.dtype)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(rows, 4000, generator=generator).to(model.dtype)}
    ids = torch.randint(3, VOCAB, (rows, 12), generator=generator)
    lengths = torch.tensor([12 - 3 * row % 10 for row in range(rows)])
    mask = (torch.arange(12) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
