"""Shapes of forwards, and their prices."""

from collections import Counter

import pytest
import torch
from fakes import prompts, tiny_model
from transformers import DynamicCache

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.bench import floor as floor_module
from hf_osd.bench.contenders import Sample
from hf_osd.bench.figures import summarise
from hf_osd.bench.floor import Floor, dynamic_forward, measure_forward, static_forward
from hf_osd.bench.race import Race
from hf_osd.bench.shapes import CallRecorder, FeedRecorder, Shape


def test_every_forward_of_plain_decoding_is_noted() -> None:
    """Would catch a prompt that is not counted, and contexts that are off by one."""
    target = tiny_model()
    with CallRecorder({"target": target}) as recorder:
        target.generate(**prompts(2), max_new_tokens=4, do_sample=False)
    steps = {Shape("target", 2, 1, context, 1): 1 for context in (9, 10, 11)}
    assert recorder.shapes() == Counter({Shape("target", 2, 9, 0, 1): 1} | steps)
    target(prompts(1)["input_ids"])
    assert recorder.shapes().total() == 4  # closed: nothing more is noted


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
    passes = [shape for shape in shapes.elements() if shape.model == "target"]
    drafts = [shape for shape in shapes.elements() if shape.model == "draft"]
    assert len(passes) == after.target_passes - before.target_passes
    assert len(drafts) == after.proposed_tokens - before.proposed_tokens
    prompt, *rounds = sorted(passes, key=lambda shape: shape.context)
    assert (prompt.queries, prompt.context, prompt.keep) == (9 + 3, 0, 4)
    assert all(shape.keep == shape.queries <= 4 for shape in rounds)
    assert all(shape.batch == 1 for shape in passes + drafts)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("draft_length", [0, 3])
def test_our_engine_is_noted_as_its_models_are_called(kind: str, draft_length: int) -> None:
    """Would catch shapes of ours that are not those of the forwards, on either cache; on a CPU both can be seen."""
    target, draft = tiny_model(kind), tiny_model(kind, layers=2, seed=5)
    models = {"target": target, "draft": draft}
    config = OnlineConfig(draft_length=draft_length, draft_length_schedule="constant", learn=False)
    with OnlineAssistant(draft, target, config) as assistant:
        for _ in range(2):  # the first time tries the models out
            with CallRecorder(models) as called, FeedRecorder(models) as fed:
                hf_osd.generate(target, **prompts(1), online_assistant=assistant, max_new_tokens=12, do_sample=False)
    assert fed.shapes() == called.shapes()
    assert fed.shapes().total() > 2


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(("context", "queries"), [(0, 5), (7, 1), (7, 4)])
def test_both_raw_forwards_are_the_models_own_however_often_they_run(kind: str, context: int, queries: int) -> None:
    """Would catch a floor that is cheap because it computes something else, or that grows with every call."""
    model, shape = tiny_model(kind), Shape("target", 2, queries, context, queries)
    ids = floor_module._random_ids(model, shape)
    with torch.no_grad():
        expected = model(ids).logits[:, context:]
        for make in (dynamic_forward, static_forward):
            run, reset = make(model, shape)
            for _ in range(3):
                reset()
                torch.testing.assert_close(run(), expected)


def test_a_forward_keeps_as_many_logits_as_the_request_did() -> None:
    """Would catch prompts priced with an output layer over every position."""
    model = tiny_model()
    with torch.no_grad():
        for make in (dynamic_forward, static_forward):
            run, reset = make(model, Shape("target", 1, 6, 4, 1))
            reset()
            assert run().shape == (1, 1, model.config.vocab_size)


def test_a_forward_has_a_price_and_few_calls_of_it_are_enough() -> None:
    """Would catch prices in other units than seconds, and zeros."""
    assert 1e-6 < measure_forward(tiny_model(), Shape("target", 1, 1, 8, 1), repeats=3) < 1.0


def test_the_floor_is_the_sum_of_prices_each_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch forwards counted once that ran often, and a table that is measured again for every request."""
    measured: list[Shape] = []

    def price(model: object, shape: Shape, repeats: int, before: object) -> float:
        measured.append(shape)
        return {"target": 5.0, "draft": 1.0}[shape.model]

    monkeypatch.setattr(floor_module, "measure_forward", price)
    floor = Floor({"target": tiny_model(), "draft": tiny_model(layers=1)})
    shapes = Counter(
        {Shape("target", 1, 4, 50, 4): 2, Shape("target", 1, 4, 64, 4): 1, Shape("draft", 1, 1, 60, 1): 9}
    )
    assert floor.total(shapes) == floor.total(shapes) == 3 * 5 + 9 * 1
    assert measured == [Shape("target", 1, 4, 64, 4), Shape("draft", 1, 1, 64, 1)]
    assert [row["ms"] for row in floor.table()] == [1000.0, 5000.0]


def test_turns_of_two_models_are_priced_as_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a floor measured with caches that the other model would have filled, or with its time counted in."""
    target, draft = tiny_model(), tiny_model(layers=1)
    with CallRecorder({"target": target, "draft": draft}) as recorder:
        for model in (draft, draft, target, target):
            model(prompts(1)["input_ids"])
    turns = {shape.model: sorted(one.turn for one in recorder.shapes() if one.model == shape.model)
             for shape in recorder.shapes()}  # fmt: skip
    assert turns == {"draft": [False], "target": [False, True]}
    before: list[bool] = []
    monkeypatch.setattr(floor_module, "measure_forward", lambda model, shape, repeats, run: run() or 1.0)
    monkeypatch.setattr(Floor, "_other_forward", lambda self, shape: lambda: before.append(shape.turn))
    floor = Floor({"target": target, "draft": draft})
    assert floor.total(recorder.shapes()) == 4.0
    assert before == [True]


def test_prices_stay_within_the_models_context() -> None:
    """Would catch a rounded shape that the model has no positions for."""
    floor = Floor({"target": tiny_model()})  # 128 positions
    assert floor.rounded(Shape("target", 1, 5, 122, 5)) == Shape("target", 1, 5, 123, 5)
    assert floor.rounded(Shape("target", 3, 23, 0, 1)) == Shape("target", 3, 16, 0, 1)
    assert floor.rounded(Shape("target", 3, 25, 0, 25)) == Shape("target", 3, 32, 0, 32)
    assert floor.rounded(Shape("target", 1, 128, 0, 1)) == Shape("target", 1, 128, 0, 1)


def test_efficiency_is_the_floor_of_each_request_by_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch the ratio upside down, or the floor of one request divided by the time of another."""
    monkeypatch.setattr(floor_module, "measure_forward", lambda *_: 1.0)
    shapes = [Counter({Shape("target", 1, 1, 0, 1): count}) for count in (1, 2, 30)]
    samples = [Sample(tokens=10, seconds=seconds) for seconds in (2.0, 10.0, 30.0)]
    race = Race({"a": samples, "b": samples}, {"a": shapes, "b": [Counter()] * 3})
    floor = Floor({"target": tiny_model()})
    assert summarise(race, "a", floor)["engine_efficiency"] == 0.5  # of 0.5, 0.2 and 1.0
    assert summarise(race, "b", floor)["engine_efficiency"] is None
    assert summarise(race, "a", floor)["ms_per_token"] == 1000.0


def test_the_recorder_reads_ids_given_by_position() -> None:
    """Would catch a hook that breaks a caller who writes `model(ids)`."""
    model = tiny_model()
    with CallRecorder({"target": model}) as recorder:
        cache = DynamicCache(config=model.config)
        model(prompts(1)["input_ids"], past_key_values=cache)
        model(prompts(1, length=2)["input_ids"], past_key_values=cache)
    assert recorder.shapes() == Counter({Shape("target", 1, 9, 0, 9): 1, Shape("target", 1, 2, 9, 2): 1})


@pytest.mark.gpu
def test_a_forward_can_be_captured_and_priced_on_cuda() -> None:
    """Would catch a floor whose forward waits for the device, which no graph can hold."""
    model = tiny_model(dtype=torch.float32).to("cuda")
    for shape in (Shape("target", 2, 5, 0, 1), Shape("target", 2, 3, 60, 3)):
        assert 1e-6 < measure_forward(model, shape, repeats=3) < 1.0
