"""Shapes of forwards, and their replay."""

import pytest
import torch
from fakes import prompts, tiny_model
from transformers import DynamicCache

import hf_osd
from benchmarks.suites.floor import Floor, RawModel, Watched
from benchmarks.suites.session import efficiency
from benchmarks.suites.shapes import CallRecorder, FeedRecorder, Shape
from hf_osd import OnlineAssistant, OnlineConfig


def test_every_forward_of_plain_decoding_is_noted() -> None:
    """Would catch a prompt that is not counted, and contexts that are off by one."""
    target = tiny_model()
    with CallRecorder({"target": target}) as recorder:
        target.generate(**prompts(2), max_new_tokens=4, do_sample=False)
    steps = [Shape("target", 2, 1, context, 1) for context in (9, 10, 11)]
    assert recorder.shapes() == [Shape("target", 2, 9, 0, 1), *steps]
    target(prompts(1)["input_ids"])
    assert len(recorder.shapes()) == 4  # closed: nothing more is noted


def test_rounds_of_speculation_are_noted_for_both_models() -> None:
    """Would catch an engine whose forwards the floor does not see, which would look slower than it is."""
    target, draft = tiny_model(layers=2), tiny_model(layers=1, seed=5)
    config = OnlineConfig(draft_length=3, draft_length_schedule="constant", learn=False)
    with OnlineAssistant(draft, target, config) as assistant:
        hf_osd.generate(target, **prompts(1), online_assistant=assistant, max_new_tokens=2)  # tries the models out
        before = assistant.stats()
        with FeedRecorder({"target": target, "draft": draft}) as recorder:
            hf_osd.generate(target, **prompts(1), online_assistant=assistant, max_new_tokens=12, do_sample=False)
        after = assistant.stats()
        hf_osd.generate(target, **prompts(1), online_assistant=assistant, max_new_tokens=2)
    shapes = recorder.shapes()
    passes = [shape for shape in shapes if shape.model == "target"]
    drafts = [shape for shape in shapes if shape.model == "draft"]
    assert len(passes) == after.target_passes - before.target_passes
    assert len(drafts) == after.proposed_tokens - before.proposed_tokens
    prompt, *rounds = passes
    assert [shape.model for shape in shapes[:4]] == ["draft", "draft", "draft", "target"]
    assert (prompt.queries, prompt.context, prompt.keep) == (9 + 3, 0, 4)
    assert all(shape.keep == shape.queries <= 4 for shape in rounds)
    assert all(shape.batch == 1 for shape in passes + drafts)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("draft_length", [0, 3])
def test_our_engine_is_noted_as_its_models_are_called(kind: str, draft_length: int) -> None:
    """Would catch shapes of ours that are not those of the forwards, or in another order; a CPU shows both."""
    target, draft = tiny_model(kind), tiny_model(kind, layers=2, seed=5)
    models = {"target": target, "draft": draft}
    config = OnlineConfig(draft_length=draft_length, draft_length_schedule="constant", learn=False)
    with OnlineAssistant(draft, target, config) as assistant:
        for _ in range(2):  # the first time tries the models out
            with CallRecorder(models) as called, FeedRecorder(models) as fed:
                hf_osd.generate(target, **prompts(1), online_assistant=assistant, max_new_tokens=12, do_sample=False)
    assert fed.shapes() == called.shapes()
    assert len(fed.shapes()) > 2


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_raw_forwards_are_the_models_own_after_any_rollback(kind: str, attention: str) -> None:
    """Would catch a floor that is cheap because it computes something else, such as a wrong mask or an old cache."""
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    raw = RawModel(model, batch=2, capacity=20)
    with torch.no_grad():
        expected = model(raw.ids).logits
        for context, queries in ((0, 9), (9, 1), (10, 4), (12, 3), (12, 1), (0, 20)):
            found = raw.forward(Shape("target", 2, queries, context, queries))()
            torch.testing.assert_close(found, expected[:, context : context + queries], rtol=1e-4, atol=1e-4)


def test_a_raw_forward_keeps_as_many_logits_as_the_request_did() -> None:
    """Would catch prompts replayed with an output layer over every position."""
    model = tiny_model()
    raw = RawModel(model, batch=1, capacity=8)
    with torch.no_grad():
        assert raw.forward(Shape("target", 1, 6, 0, 1))().shape == (1, 1, model.config.vocab_size)


def test_a_request_is_replayed_forward_by_forward_in_its_order() -> None:
    """Would catch a forward left out, run twice or run out of turn, and buffers too small for later requests."""
    models = {"target": tiny_model(layers=2), "draft": tiny_model(layers=1, seed=5)}
    config = OnlineConfig(draft_length=3, draft_length_schedule="constant", learn=False)
    floor = Floor(models)
    options = {"max_new_tokens": 12, "do_sample": False}
    with OnlineAssistant(models["draft"], models["target"], config) as assistant:
        options["online_assistant"] = assistant
        hf_osd.generate(models["target"], **prompts(1), **options)  # tries the models out
        for batch, length in ((1, 9), (1, 90), (3, 9)):
            with FeedRecorder(models) as served:
                hf_osd.generate(models["target"], **prompts(batch, length), **options)
            floor.seconds(served.shapes())  # allocates
            with CallRecorder(models) as replayed:
                seconds = floor.seconds(served.shapes())
            assert replayed.shapes() == served.shapes()
            assert len(served.shapes()) > 4
            assert seconds is not None
            assert 1e-5 < seconds < 10.0


def test_replays_stay_within_the_models_positions() -> None:
    """Would catch a learned embedding that is asked for positions it does not have."""
    model = tiny_model("gpt2")  # 128 positions
    assert Floor({"target": model}).seconds([Shape("target", 1, 5, 123, 5)]) is not None


def test_what_cannot_be_replayed_has_no_floor() -> None:
    """Would catch full attention sold as the floor of a window, models that keep no tokens, and a floor of nothing."""
    windowed = Floor({"target": tiny_model("mistral")})  # a window of 8
    assert windowed.seconds([Shape("target", 1, 8, 0, 1)]) is not None
    assert windowed.seconds([Shape("target", 1, 8, 0, 1), Shape("target", 1, 1, 8, 1)]) is None
    assert Floor({"target": tiny_model("mamba")}).seconds([Shape("target", 1, 8, 0, 1)]) is None
    assert windowed.seconds([]) is None
    assert windowed.seconds([Shape("target", rows, 8, 0, 1) for rows in (1, 2)]) is None


def test_efficiency_is_the_floor_of_each_request_by_its_own_time() -> None:
    """Would catch the ratio upside down, or the floor of one request divided by the time of another."""
    times = ((2.0, 1.0), (10.0, 2.0), (30.0, 30.0), (7.0, None))
    found = efficiency([Watched(tokens=10, seconds=seconds, floor=floor) for seconds, floor in times])
    assert found == {"engine_efficiency": 0.5, "floor_by_request": [1.0, 2.0, 30.0, None]}  # of 0.5, 0.2 and 1.0
    assert efficiency([Watched(tokens=10, seconds=1.0)]) == {"engine_efficiency": None, "floor_by_request": []}


def test_the_recorder_reads_ids_given_by_position() -> None:
    """Would catch a hook that breaks a caller who writes `model(ids)`."""
    model = tiny_model()
    with CallRecorder({"target": model}) as recorder:
        cache = DynamicCache(config=model.config)
        model(prompts(1)["input_ids"], past_key_values=cache)
        model(prompts(1, length=2)["input_ids"], past_key_values=cache)
    assert recorder.shapes() == [Shape("target", 1, 9, 0, 9), Shape("target", 1, 2, 9, 2)]


@pytest.mark.gpu
def test_forwards_are_captured_and_replayed_on_cuda() -> None:
    """Would catch a raw forward that waits for the device, which no graph can hold, or a graph of freed inputs."""
    model = tiny_model(dtype=torch.float32).to("cuda")
    floor = Floor({"target": model})
    shapes = [Shape("target", 2, 50, 0, 1), Shape("target", 2, 1, 50, 1), Shape("target", 2, 3, 60, 3)]
    for _ in range(3):
        seconds = floor.seconds(shapes)
        assert seconds is not None
        assert 1e-6 < seconds < 1.0
