"""`generate` against `model.generate`: greedy output equal token for token, whatever the draft."""

import pytest
import torch
from calls import LLAMA, NOISY, TARGETS, both, eos_of, static
from fakes import ARCHITECTURES, CONTEXT, DRAFTS, VOCAB, WINDOWED, prompts, tiny_model, wrong_draft

import hf_osd


@pytest.mark.parametrize("how", DRAFTS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_equals_generate(kind, how):
    """Catches any error in cache, mask, positions, rollback or commit, on each architecture and kind of draft."""
    target = TARGETS[kind]
    draft = wrong_draft(target, how)
    for batch in (1, 3):
        expected, actual = both(target, draft, prompts(batch))
        assert torch.equal(expected, actual), f"batch {batch}"


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_rows_end_at_different_times(batch):
    """Catches rows that go on behind their eos, wrong padding behind it, and eos inside a drafted run or as bonus."""
    inputs = prompts(batch)
    eos = eos_of(LLAMA, inputs, [(5 * row) % 19 + 1 for row in range(batch)])
    for how in ("perfect", "noisy", "shifted"):
        for ids in (eos, eos[:1], eos[-1:]):
            expected, actual = both(LLAMA, wrong_draft(LLAMA, how), inputs, eos_token_id=ids, pad_token_id=0)
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("draft_length", [0, 1, 2, 3, 7, 40])
def test_any_draft_length(draft_length):
    """Catches off-by-one errors in budgets: proposals longer than what is left, and none at all."""
    inputs = prompts(3)
    expected = LLAMA.generate(**inputs, max_new_tokens=20, do_sample=False)
    assistant = static(NOISY, draft_length=draft_length)
    actual = hf_osd.generate(LLAMA, **inputs, max_new_tokens=20, do_sample=False, online_assistant=assistant)
    assert torch.equal(expected, actual)
    if draft_length == 0:
        assert assistant.stats().tokens_per_target_pass == 1.0


@pytest.mark.parametrize("threshold", [0.05, 0.3, 1.0])
def test_proposals_of_any_confidence(threshold):
    """Catches proposals that stop early and leave the rows, the cache or the counts behind."""
    for batch in (1, 3):
        inputs = prompts(batch)
        expected = LLAMA.generate(**inputs, max_new_tokens=20, do_sample=False)
        assistant = static(NOISY, confidence_threshold=threshold, draft_length=6)
        actual = hf_osd.generate(LLAMA, **inputs, max_new_tokens=20, do_sample=False, online_assistant=assistant)
        assert torch.equal(expected, actual)
        stats = assistant.stats()
        if threshold == 1.0:  # no probability is above it: one token a round
            assert stats.proposed_tokens <= stats.target_passes


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_change_with_the_length(kind):
    """Catches proposals that reach past the switch of the frequencies, which changes tokens before it."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24, **factors}
    target = tiny_model("llama", rope_parameters=rope, max_position_embeddings=24 if kind == "dynamic" else 96)
    expected, actual = both(target, wrong_draft(target, "noisy"), prompts(2), max_new_tokens=15)
    assert torch.equal(expected, actual)
    assistant = static(NOISY, target)
    expected, actual = both(target, assistant, prompts(2), max_new_tokens=16)
    assert torch.equal(expected, actual)
    assert assistant.stats().fallback_reasons == {"position embeddings that change with the length": 2}


def test_max_length_and_one_token():
    """Catches budgets computed from max_new_tokens alone, and a loop that proposes with nothing left to fill."""
    inputs = prompts(2)
    for settings in ({"max_length": 15}, {"max_new_tokens": 1}, {"max_new_tokens": 2}):
        expected = LLAMA.generate(**inputs, do_sample=False, **settings)
        actual = hf_osd.generate(LLAMA, **inputs, do_sample=False, online_assistant=static(NOISY), **settings)
        assert torch.equal(expected, actual)


def test_prompt_of_one_token():
    """Catches a draft that needs two tokens to start from."""
    for inputs in ({"input_ids": torch.tensor([[5]])}, {"inputs": torch.tensor([[5], [6]])}):
        expected, actual = both(LLAMA, NOISY, inputs)
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompt_up_to_the_context(kind):
    """Catches proposals beyond the last position: GPT-2's learned positions would raise."""
    target = TARGETS[kind]
    inputs = prompts(2, length=CONTEXT - 6)
    expected, actual = both(target, wrong_draft(target, "noisy"), inputs, max_new_tokens=6)
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("rows", [1, 3])
def test_text_past_the_context(rows):
    """Catches positions that stop at what the model was built for: rotary ones go on, as in plain decoding."""
    target = tiny_model("llama", max_position_embeddings=20)
    expected, actual = both(target, wrong_draft(target, "noisy"), prompts(rows), max_new_tokens=30)
    assert torch.equal(expected, actual)


def test_draft_with_a_shorter_context():
    """Catches a draft driven beyond its own learned positions, in the prompt and while decoding."""
    draft = tiny_model("gpt2", seed=5, layers=1, n_positions=16)
    for length in (9, 15, 16, 17, 30):
        expected, actual = both(LLAMA, draft, prompts(2, length=length))
        assert torch.equal(expected, actual), length


@pytest.mark.parametrize("difference", [-7, 5])
def test_padded_vocabularies(difference):
    """Catches drafts whose vocabulary is padded to another size than the target's."""
    draft = tiny_model("llama", seed=4, vocab_size=VOCAB + difference)
    inputs = {"input_ids": torch.randint(3, VOCAB - 8, (2, 6), generator=torch.Generator().manual_seed(0))}
    for sample in (False, True):
        output = hf_osd.generate(LLAMA, **inputs, online_assistant=static(draft), max_new_tokens=12, do_sample=sample)
        assert int(output.max()) < VOCAB
        if not sample:
            assert torch.equal(output, LLAMA.generate(**inputs, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("sample", [False, True])
def test_a_token_that_the_draft_does_not_have(sample):
    """Catches a processor that forces such a token: no distribution is left, or no embedding to read it back."""
    draft = tiny_model("llama", seed=4, vocab_size=VOCAB - 7)
    only_last = {"prefix_allowed_tokens_fn": lambda row, ids: [VOCAB - 1] if len(ids) % 2 else list(range(3, VOCAB))}
    assistant = static(draft)
    output = hf_osd.generate(
        LLAMA,
        **prompts(2),
        online_assistant=assistant,
        max_new_tokens=12,
        do_sample=sample,
        temperature=0.5,
        **only_last,
    )
    assert (output[:, 9::2] == VOCAB - 1).all()
    assert assistant.stats().acceptance_rate > 0
    if not sample:
        assert torch.equal(output, LLAMA.generate(**prompts(2), max_new_tokens=12, do_sample=False, **only_last))


def test_draft_in_another_dtype():
    """Catches dtypes that leak from one model into the other's cache or mask."""
    draft = tiny_model("gpt2", seed=5, dtype=torch.bfloat16)
    expected, actual = both(LLAMA, draft, prompts(3))
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "bloom"])
def test_croppable_cache(kind):
    """Catches what transformers' own cache drops too early: the window (8) is a sixth of the text."""
    target = tiny_model(kind)
    inputs = {"input_ids": prompts(1, length=14)["input_ids"]}
    for draft in (wrong_draft(target, "noisy"), tiny_model("mistral", seed=8)):
        expected, actual = both(target, draft, inputs, max_new_tokens=40)
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("rows", [1, 3])
def test_text_past_the_window(kind, rows):
    """Catches windows and chunks of 8 tokens that the keys of a longer text are not masked by, target's or draft's."""
    target = tiny_model(kind)
    pairs = [(target, wrong_draft(target, "noisy")), (target, tiny_model("llama", seed=8)), (LLAMA, target)]
    for model, draft in pairs:
        assistant = static(draft, model)
        expected, actual = both(model, assistant, prompts(rows), max_new_tokens=20)
        assert torch.equal(expected, actual)
        assert assistant.stats().fallbacks == 0


def test_window_that_the_configuration_calls_otherwise():
    """Catches GPT-Neo's local layers, whose window is one of columns, on rows of different lengths."""
    target = tiny_model("neo")
    expected, actual = both(target, NOISY, prompts(1), max_new_tokens=40)
    assert torch.equal(expected, actual)
    assistant = static(NOISY, target)
    expected, actual = both(target, assistant, prompts(3), max_new_tokens=40)
    assert torch.equal(expected, actual)
    assert assistant.stats().fallbacks == 3


def test_eager_attention():
    """Catches a boolean mask where eager attention adds it to the scores. In float64 transformers' own overflows."""
    target = tiny_model("llama", dtype=torch.float32)
    target.set_attn_implementation("eager")
    expected, actual = both(target, NOISY, prompts(3))
    assert torch.equal(expected, actual)


def test_target_in_train_mode():
    """Catches dropout in the verification, and a model that is left in another mode than it came in."""
    target = tiny_model("gpt2")
    expected = target.generate(**prompts(2), max_new_tokens=12, do_sample=False)
    target.train()
    actual = hf_osd.generate(
        target, **prompts(2), max_new_tokens=12, do_sample=False, online_assistant=static(NOISY, target)
    )
    assert torch.equal(expected, actual)
    assert target.training
    target.transformer.h[0].eval()
    modes = [module.training for module in target.modules()]
    hf_osd.generate(target, **prompts(1), max_new_tokens=2, online_assistant=static(NOISY, target))
    assert modes == [module.training for module in target.modules()]


def test_no_pad_token():
    """Catches a missing pad token: transformers falls back to eos."""
    target = tiny_model("llama", pad_token_id=None)
    inputs = {"input_ids": prompts(1)["input_ids"].repeat(3, 1)}
    inputs["input_ids"][:, -1] = torch.tensor([3, 4, 5])
    eos = eos_of(target, inputs, [2, 9, 14])
    expected, actual = both(target, wrong_draft(target, "noisy"), inputs, eos_token_id=eos)
    assert torch.equal(expected, actual)
