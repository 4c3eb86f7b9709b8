"""Which cache a model decodes on: never one that gives it other logits than its own."""

import pytest
import torch
from fakes import ARCHITECTURES, prompts, tiny_model

from hf_osd import UnsupportedModelError
from hf_osd.serving.choice import attention_span, choose_decoder, choose_draft_decoder, holds_ragged_cache
from hf_osd.serving.croppable_decoder import CroppableDecoder
from hf_osd.serving.decoder import RaggedDecoder
from hf_osd.serving.probe import Trial
from hf_osd.serving.recurrent_decoder import RecurrentDecoder


def chosen(model, width, rows=1, role="target"):
    return choose_decoder(model, Trial(prompts(1)["input_ids"].expand(rows, -1), [0] * rows), width, role=role)()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_full_attention_is_held(kind):
    """Catches a probe that sends ordinary models to the slow, single-row cache."""
    assert holds_ragged_cache(tiny_model(kind, seed=7))
    assert holds_ragged_cache(tiny_model(kind, seed=7, dtype=torch.bfloat16))


def test_choice_of_cache():
    """Catches models on a cache that gives them wrong logits."""
    assert not holds_ragged_cache(tiny_model("bloom"))  # builds its positions from a 2D mask
    mistral = tiny_model("mistral")
    assert attention_span(mistral) == 8
    for width, rows in ((8, 2), (9, 2), (9, 1), (32, 1), (33, 2)):
        assert isinstance(chosen(mistral, width, rows), RaggedDecoder)
    assert isinstance(chosen(mistral, 33), CroppableDecoder)  # whose memory is that of the window
    with pytest.raises(UnsupportedModelError, match="batch of 2"):
        chosen(tiny_model("neo"), 17, rows=2)
    assert isinstance(chosen(tiny_model("lfm2"), 9), RecurrentDecoder)
    with pytest.raises(UnsupportedModelError, match="roll back"):
        chosen(tiny_model("rwkv", dtype=torch.float32), 9)


def test_a_model_without_a_cache():
    """Catches models that ignore the cache: their output would be wrong, or fail somewhere deep."""
    with pytest.raises(UnsupportedModelError, match=r"OpenAIGPTLMHeadModel.*several tokens at once"):
        chosen(tiny_model("gpt1"), 20)


def test_an_index_that_selects_tokens():
    """Catches sparse attention, whose logits depend on how many tokens are fed once it selects some of them."""
    model = tiny_model("llama")
    model.config.index_topk = 16
    assert isinstance(chosen(model, 16), RaggedDecoder)
    with pytest.raises(UnsupportedModelError, match="looks at 16 tokens"):
        chosen(model, 17)


def test_a_draft_may_lack_tokens_of_the_prompt():
    """Catches a trial of the draft with tokens that its embedding does not have."""
    draft = tiny_model("llama", vocab_size=40)
    assert isinstance(choose_draft_decoder(draft, torch.full((2, 5), 60), [0, 1], 20)(), RaggedDecoder)
