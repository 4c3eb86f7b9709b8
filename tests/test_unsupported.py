"""What speculation cannot do is served by the target's own decoding, counted and said once; or refused, on demand."""

import gc
import logging
import weakref

import pytest
import torch
from calls import LLAMA, NOISY, both, static
from fakes import Collector, prompts, tiny_model, wrong_draft
from transformers import StaticCache

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig, UnsupportedGenerationError, UnsupportedModelError

MODES = [
    ({"num_beams": 2}, "beam search"),
    ({"prompt_lookup_num_tokens": 3}, "transformers' own prompt lookup"),
    ({"guidance_scale": 1.5}, "classifier-free guidance"),
    ({"cache_implementation": "offloaded"}, "a cache of another kind"),
]


@pytest.mark.parametrize(("settings", "reason"), MODES, ids=[reason for _, reason in MODES])
def test_other_modes_are_served_as_generate_serves_them(settings, reason):
    """Catches modes that are refused, or that silently give another result than the one asked for."""
    if "cache_implementation" in settings and not torch.cuda.is_available():
        pytest.skip("transformers offloads caches to a CUDA device only")
    assistant = static(NOISY)
    expected, actual = both(LLAMA, assistant, prompts(1), **settings)
    assert torch.equal(expected, actual)
    assert assistant.stats().fallback_reasons == {reason: 1}


def test_what_is_returned_besides_tokens():
    """Catches attentions and hidden states that are asked for and not returned."""
    output = hf_osd.generate(
        LLAMA,
        **prompts(2),
        online_assistant=static(NOISY),
        max_new_tokens=3,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert len(output.hidden_states) == 3


def test_beams_through_model_generate():
    """Catches the expanded batch that transformers hands to a callable when beams are asked for."""
    assistant, kwargs = static(NOISY), {**prompts(2), "num_beams": 3, "max_new_tokens": 8}
    actual = LLAMA.generate(**kwargs, custom_generate=hf_osd.online_decoding, online_assistant=assistant)
    assert torch.equal(LLAMA.generate(**kwargs), actual)
    assert assistant.stats().fallback_reasons == {"beam search": 6}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_beams": 2, "num_beam_groups": 2}, "num_beams=2"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"dola_layers": "low"}, "DoLa"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
        ({"token_healing": True}, "token healing"),
        ({"inputs_embeds": torch.zeros(1, 3, 32, dtype=torch.float64)}, "embeddings"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_if_asked_for(settings, match):
    """Catches `unsupported="error"` that serves all the same, and messages that do not name the setting."""
    inputs = {} if "inputs_embeds" in settings else prompts(1)
    with pytest.raises(UnsupportedGenerationError, match=match):
        hf_osd.generate(LLAMA, **inputs, online_assistant=static(NOISY, unsupported="error"), **settings)


def test_said_once_for_each_reason(caplog):
    """Catches a warning for every request, and one that does not say what is missing."""
    logging.getLogger("hf_osd").addHandler(caplog.handler)
    assistant = static(NOISY)
    with caplog.at_level(logging.WARNING):
        for beams in (2, 3, 1):
            hf_osd.generate(LLAMA, **prompts(2), online_assistant=assistant, max_new_tokens=2, num_beams=beams)
    logging.getLogger("hf_osd").removeHandler(caplog.handler)
    assert [record for record in caplog.messages if "num_beams=2" in record]
    assert not [record for record in caplog.messages if "num_beams=3" in record]
    stats = assistant.stats()
    assert (stats.requests, stats.fallbacks, stats.fallback_reasons) == (6, 4, {"beam search": 4})
    assert (stats - stats).fallback_reasons == {}


def test_drafts_that_cannot_draft():
    """Catches a draft of the wrong kind that costs the user the request, or is not named."""
    for draft, match in [
        (tiny_model("rwkv", dtype=torch.float32), "recurrent"),
        (tiny_model("llama", vocab_size=5000), "tokenizers differ"),
    ]:
        with pytest.raises(UnsupportedModelError, match=match):
            static(draft, unsupported="error")
        with static(draft) as assistant:
            expected, actual = both(LLAMA, assistant, prompts(2))
            assert torch.equal(expected, actual)
            assert assistant.stats().fallbacks == 2


@pytest.mark.parametrize("schedule", ["constant", "measured"])
def test_a_draft_that_does_not_fit_the_batch(schedule):
    """Catches a refusal after tokens have been streamed: such a draft used to be found out when it first drafted."""
    streamer, draft = Collector(), tiny_model("neo", seed=4)
    assistant = static(draft, draft_length_schedule=schedule)
    kwargs = {**prompts(4), "max_new_tokens": 24, "do_sample": False}
    actual = hf_osd.generate(LLAMA, **kwargs, online_assistant=assistant, streamer=streamer)
    assert torch.equal(LLAMA.generate(**kwargs), actual)
    assert streamer.ended == 1
    assert assistant.stats().fallback_reasons == {"draft: batches of this model or length": 4}
    streamer = Collector()
    with pytest.raises(UnsupportedModelError, match="draft GPTNeoForCausalLM"):
        hf_osd.generate(LLAMA, **kwargs, streamer=streamer, online_assistant=static(draft, unsupported="error"))
    assert not streamer.values


@pytest.mark.parametrize(
    ("kind", "why"), [("rwkv", "state that cannot roll back"), ("mamba", "checking several tokens at once")]
)
def test_a_target_with_a_recurrent_state(kind, why):
    """Catches targets that plain decoding alone serves: a state is hidden, or several tokens do not go on from it."""
    target = tiny_model(kind, dtype=torch.float32)
    assistant = static(NOISY, target)
    expected, actual = both(target, assistant, {"input_ids": prompts(1)["input_ids"]})
    assert torch.equal(expected, actual)
    assert assistant.stats().fallback_reasons == {f"target: {why}": 1}


def test_a_draft_that_cannot_draft_keeps_nothing_alive():
    """Catches an error that is kept with the frames of the last request, and so the target for ever."""
    target = tiny_model("llama", seed=5)
    draft = tiny_model("llama", vocab_size=5000)
    for _ in range(2):
        hf_osd.generate(target, **prompts(1), online_assistant=draft, max_new_tokens=2)
    watched = weakref.ref(target)
    del target, draft
    gc.collect()
    assert watched() is None


def test_rotary_switch_at_positions_of_the_callers_own():
    """Catches a text that is counted from its first token, and not from where the caller says that it begins."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    target = tiny_model("llama", rope_parameters=rope, max_position_embeddings=32)
    assistant = static(wrong_draft(target, "noisy"), target)
    inputs = prompts(1) | {"position_ids": torch.arange(9)[None] + 60}
    hf_osd.generate(target, **inputs, online_assistant=assistant, max_new_tokens=3)
    assert set(assistant.stats().fallback_reasons) == {"position embeddings that change with the length"}


def test_streaming_is_the_same():
    """Catches a prompt that is streamed twice or never where a request falls back after it was prepared."""
    target = tiny_model("mistral")
    kwargs = {"input_ids": prompts(1)["input_ids"], "max_new_tokens": 20, "do_sample": False}
    static_cache = StaticCache(config=target.config, max_cache_len=64)
    for extra in ({}, {"past_key_values": static_cache}):
        plain, ours = Collector(), Collector()
        target.generate(**kwargs, streamer=plain)
        hf_osd.generate(target, **kwargs, **extra, online_assistant=static(NOISY, target), streamer=ours)
        assert len(plain.values) == len(ours.values)
        assert all(torch.equal(one, other) for one, other in zip(plain.values, ours.values, strict=True))


def test_sampling_repeats_with_a_generator():
    """Catches a generator of the caller's that plain decoding, which knows only the global state, ignores."""
    outputs = [
        hf_osd.generate(
            LLAMA,
            **prompts(1),
            online_assistant=static(NOISY),
            do_sample=True,
            num_beams=2,
            max_new_tokens=12,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_learning_goes_on_beside_fallbacks():
    """Catches requests without speculation that are learned from as if the draft had been judged."""
    config = OnlineConfig(update_every=2, steps_per_update=1, gate=False)
    with OnlineAssistant(wrong_draft(LLAMA, "noisy"), LLAMA, config) as assistant:
        for seed in range(4):
            kwargs = {**prompts(1, seed=seed), "max_new_tokens": 8, "do_sample": False}
            hf_osd.generate(LLAMA, **kwargs, online_assistant=assistant, num_beams=1 + seed % 2)
        stats = assistant.stats()
    assert (stats.fallbacks, stats.updates, stats.failed_updates) == (2, 1, 0)
