"""What `generate` refuses whatever the settings: bad inputs, contradictions, and pairs that make no sense."""

import pytest
import torch
from calls import LLAMA, NOISY, static
from fakes import prompts, tiny_model

import hf_osd
from hf_osd import InputError, UnsupportedModelError


def test_bad_inputs():
    """Catches inputs that would fail deep inside, or decode something else than what was meant."""

    def run(**inputs):
        hf_osd.generate(LLAMA, online_assistant=static(NOISY), max_new_tokens=4, **inputs)

    with pytest.raises(InputError, match=r"shape \(0, 5\)"):
        run(input_ids=torch.empty(0, 5, dtype=torch.long))
    right_padded = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(InputError, match=r"rows \[1\].*padding_side='left'"):
        run(input_ids=torch.full((2, 3), 5), attention_mask=right_padded)
    with pytest.raises(InputError, match="attention_mask covers 5"):
        run(input_ids=torch.full((1, 3), 5), attention_mask=torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(InputError, match="assistant_model"):
        run(**prompts(1), assistant_model=NOISY)
    with pytest.raises(InputError, match="online_assistant"):
        LLAMA.generate(**prompts(1), custom_generate=hf_osd.online_decoding, max_new_tokens=2)
    with pytest.raises(InputError, match="generator must be a Generator, got int"):
        run(**prompts(1), do_sample=True, generator=3)
    with pytest.raises(TypeError, match="int"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=3)


def test_bad_pairs():
    """Catches drafts that cannot work, before any work starts."""
    with torch.device("meta"):
        meta = tiny_model("llama", seed=1)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=meta)
    with pytest.raises(UnsupportedModelError, match="itself"):
        hf_osd.generate(LLAMA, **prompts(1), online_assistant=LLAMA)
    with pytest.raises(UnsupportedModelError, match="NoneType"):
        hf_osd.generate(None, **prompts(1), online_assistant=NOISY)
