"""What `generate` refuses: modes, inputs, caches and pairs of models that it cannot be right about."""

import pytest
import torch
from calls import LLAMA, NOISY, static
from fakes import prompts, tiny_model

import hf_osd
from hf_osd import InputError, UnsupportedGenerationError, UnsupportedModelError


def test_a_filled_cache_with_padding_is_refused():
    """Catches padding in the caller's cache that is read as text: the cache does not say where it is."""
    inputs = {"input_ids": torch.tensor([[0, 0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    first = LLAMA.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    turn = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
    with pytest.raises(InputError, match="padding"):
        hf_osd.generate(LLAMA, **turn, max_new_tokens=4, online_assistant=static(NOISY))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_beams": 2, "num_beam_groups": 2}, "num_beams=2"),
        ({"force_words_ids": [[[4]]], "num_beams": 2}, "num_beams"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"dola_layers": "low"}, "DoLa"),
        ({"guidance_scale": 1.5}, "guidance"),
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ({"assistant_model": NOISY}, "assistant_model"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
        ({"token_healing": True}, "token healing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_modes_are_refused(settings, match):
    """Catches modes that would silently give another result than the one asked for."""
    with pytest.raises(UnsupportedGenerationError, match=match):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=static(NOISY), max_new_tokens=4, **settings)


def test_beams_through_model_generate_are_refused():
    """Catches the expanded batch that transformers hands to a callable when beams are asked for."""
    with pytest.raises(UnsupportedGenerationError, match="num_beams"):
        LLAMA.generate(
            **prompts(1),
            num_beams=2,
            max_new_tokens=4,
            custom_generate=hf_osd.online_decoding,
            online_assistant=static(NOISY),
        )


def test_bad_inputs():
    """Catches inputs that would fail deep inside, or decode something else than what was meant."""

    def run(**inputs):
        hf_osd.generate(LLAMA, online_assistant=static(NOISY), max_new_tokens=4, **inputs)

    with pytest.raises(InputError, match=r"shape \(0, 5\)"):
        run(input_ids=torch.empty(0, 5, dtype=torch.long))
    right_padded = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(InputError, match=r"rows \[1\].*padding_side='left'"):
        run(input_ids=torch.full((2, 3), 5), attention_mask=right_padded)
    with pytest.raises(InputError, match="position_ids"):
        run(input_ids=torch.full((1, 3), 5), position_ids=torch.tensor([[4, 5, 9]]))
    with pytest.raises(InputError, match="online_assistant"):
        LLAMA.generate(**prompts(1), custom_generate=hf_osd.online_decoding, max_new_tokens=2)
    with pytest.raises(TypeError, match="int"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=3)


def test_bad_pairs():
    """Catches drafts that cannot work, before any work starts."""
    with torch.device("meta"):
        meta = tiny_model("llama", seed=1)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=meta)
    with pytest.raises(UnsupportedModelError, match="tokenizers differ"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=tiny_model("llama", vocab_size=5000))
    with pytest.raises(UnsupportedModelError, match="itself"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=LLAMA)
    with pytest.raises(UnsupportedModelError, match=r"draft MambaForCausalLM.*recurrent"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=tiny_model("mamba", dtype=torch.float32))
    with pytest.raises(UnsupportedModelError, match="NoneType"):
        hf_osd.generate(None, **prompts(1), online_assistant=NOISY)
    with pytest.raises(UnsupportedModelError, match=r"the draft BloomForCausalLM.*batch of 2"):
        hf_osd.generate(LLAMA, **prompts(2), online_assistant=tiny_model("bloom"), max_new_tokens=4)
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        hf_osd.generate(tiny_model("mamba", dtype=torch.float32), **prompts(1), online_assistant=NOISY)
