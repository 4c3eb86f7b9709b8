"""Caches: feeding in any pieces, with any rollbacks, gives the logits of one plain forward."""

import pytest
import torch
from fakes import WINDOWED, prompts, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_osd.serving.cache import RaggedCache
from hf_osd.serving.croppable_decoder import CroppableDecoder
from hf_osd.serving.decoder import RaggedDecoder

LLAMA = tiny_model("llama")
WINDOWS = {
    "mistral": {"sliding_window": 4},
    "gemma3": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4": {"attention_chunk_size": 4},
}
MODELS = {"llama": LLAMA} | {kind: tiny_model(kind, **WINDOWS[kind]) for kind in WINDOWED}
WIDTH = 14


def plain_logits(model, ids, padding, end, keep):
    with torch.no_grad():
        return torch.stack(
            [model(row[pad:stop][None]).logits[0, -keep:] for row, pad, stop in zip(ids, padding, end, strict=True)]
        ).float()


@pytest.mark.parametrize("kind", MODELS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_pattern_of_feeds_and_rollbacks(kind, data):
    """
    Catches rows that read each other's slots, stale entries behind a rollback, padding that is attended to, and tokens
    that a window of another row still needs.
    """
    model = MODELS[kind]
    batch = data.draw(st.integers(1, 4))
    padding = data.draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    ids = torch.randint(0, 61, (batch, WIDTH), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    decoder = RaggedDecoder(model, padding, WIDTH, own_masks=kind in WINDOWED)
    ends = list(padding)
    for _ in range(data.draw(st.integers(1, 4))):
        ends = [data.draw(st.integers(end + 1, WIDTH)) if end < WIDTH else end for end in ends]
        keep = data.draw(st.integers(1, min(end - pad for end, pad in zip(ends, padding, strict=True))))
        with torch.no_grad():
            logits = decoder.feed(ids, ends, keep)
        torch.testing.assert_close(logits, plain_logits(model, ids, padding, ends, keep), atol=1e-5, rtol=1e-5)
        back = [data.draw(st.integers(pad, end)) for pad, end in zip(padding, ends, strict=True)]
        decoder.rollback(back)
        for row, column in enumerate(back):
            ids[row, column:] = (ids[row, column:] + 7) % 61  # what was rolled back is replaced by something else
        ends = back


@given(data=st.data())
def test_a_run_is_staged_as_any_positions_are(data):
    """Catches a shortcut for one row that writes other slots, or masks them otherwise, than the general way."""
    capacity = data.draw(st.integers(1, 12))
    first = data.draw(st.integers(0, capacity - 1))
    count, window = data.draw(st.integers(1, capacity - first)), data.draw(st.integers(1, capacity))
    generator = torch.Generator().manual_seed(first)
    keys, values = torch.randn(2, 1, 3, count, 4, generator=generator)
    held = []
    for run in (False, True):
        cache = RaggedCache(1, capacity, [None, window], torch.device("cpu"), keys.dtype)
        cache.stage(torch.full((1, 2), capacity), 1)  # what was staged before must not linger
        if run:
            staged = cache.stage_run(first, count)
        else:
            staged = cache.stage(torch.arange(first, first + count)[None], first + count, first)
        read = [value for layer in cache.layers for value in layer.update(keys, values)]
        sizes = torch.tensor([layer.get_mask_sizes(count) for layer in cache.layers])
        written = [value for layer in cache.layers for value in layer.by_row()]
        held.append([staged.slots, staged.positions, cache.mask(), *read, *written, sizes])
    for plain, shortcut in zip(*held, strict=True):
        assert torch.equal(plain, shortcut)


def test_long_prompts_are_fed_in_chunks(monkeypatch):
    """Catches chunks that skip or repeat columns of rows with different padding."""
    monkeypatch.setattr("hf_osd.serving.decoder.PREFILL_CHUNK", 4)
    inputs = prompts(3, length=23)
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    for keep in (1, 3):
        decoder = RaggedDecoder(LLAMA, padding, 23)
        with torch.no_grad():
            logits = decoder.feed(inputs["input_ids"], [23] * 3, keep)
        expected = plain_logits(LLAMA, inputs["input_ids"], padding, [23] * 3, keep)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_croppable(kind):
    """Catches a windowed cache that forgets what a rollback needs again."""
    model = tiny_model(kind)
    ids = prompts(1, length=40)["input_ids"]
    decoder = CroppableDecoder(model, [0], 40)
    with torch.no_grad():
        for end, back in [(12, 11), (15, 12), (20, 16), (21, 20), (40, 40)]:
            logits = decoder.feed(ids, [end], 1)
            torch.testing.assert_close(logits, plain_logits(model, ids, [0], [end], 1), atol=1e-5, rtol=1e-5)
            decoder.rollback([back])
