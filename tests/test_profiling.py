"""What a forward costs: measured at the right shapes, summed up rightly, looked up between, kept by model."""

import json
from collections import Counter

import pytest
import torch
from fakes import tiny_model
from huggingface_hub import constants

from hf_osd._caches import cache_of
from hf_osd.drafts import profiling
from hf_osd.drafts.profiles import Cost, Profile
from hf_osd.drafts.profiling import profile
from hf_osd.errors import InputError

SMALL = dict(batches=(1, 3), contexts=(0, 20), lengths=(1, 4), repeats=2)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(profiling, "perf_counter", lambda: self.now)


def watch(model):
    """Note rows, cached tokens and fed tokens of each forward of a model."""
    seen = []

    def note(module, args, kwargs):
        cache = cache_of(kwargs)
        seen.append((kwargs["input_ids"].shape[0], cache.get_seq_length(), kwargs["input_ids"].shape[1]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def filled(seconds):
    """A profile whose seconds are a function of batch, context and tokens."""
    shapes = [(b, c, n) for b in (1, 4) for c in (100, 500) for n in (1, 3, 9)]
    return Profile({}, tuple(Cost(*shape, seconds(*shape), seconds(*shape), seconds(*shape)) for shape in shapes))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_every_forward_finds_the_context_in_the_cache(kind):
    """Would catch a cache that grows from one measurement to the next, also where a window of 8 tokens has passed."""
    model = tiny_model(kind)
    seen = watch(model)
    found = profile(model, **SMALL)
    fills = [(1, 0, 20), (3, 0, 20)]
    shapes = [(b, c, n) for b in (1, 3) for c in (0, 20) for n in (1, 4)]
    assert Counter(seen) == Counter(fills + shapes * 3)  # two repeats, and once to warm up
    assert [cost.shape for cost in found.costs] == shapes
    assert all(0 < cost.low <= cost.seconds <= cost.high for cost in found.costs)


def test_the_median_is_of_rounds_without_the_first(monkeypatch):
    """Would catch a warm-up that counts, a mean in place of the median, or the quartiles of something else."""
    clock, calls = Clock(monkeypatch), Counter()

    def prepare(batch, context, tokens):
        def forward():
            calls[tokens] += 1
            clock.now += 1000 if calls[tokens] == 1 else tokens * calls[tokens] ** 2

        return forward

    found = profile(prepare, batches=(1,), contexts=(0,), lengths=(1, 2), repeats=5)
    assert [(c.seconds, c.low, c.high) for c in found.costs] == [(16, 9, 25), (32, 18, 50)]


def test_every_round_measures_every_shape(monkeypatch):
    """Would catch shapes that are measured one after another: a machine that slows down would slow the last ones."""
    order = []
    profile(lambda *shape: lambda: order.append(shape), batches=(1, 2), contexts=(5,), lengths=(1, 2), repeats=9)
    rounds = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert len(rounds) == 10
    assert all(len({*one}) == 4 for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_a_profile_is_kept_by_model_and_machine():
    """Would catch a kept profile of another model, dtype or grid, or one that is measured again in each run."""
    model = tiny_model()
    seen = watch(model)
    first = profile(model, **SMALL)
    count = len(seen)
    assert profile(model, **SMALL) == first
    assert len(seen) == count
    profile(model, **SMALL, use_cache=False)
    assert len(seen) == 2 * count
    profile(model, **{**SMALL, "lengths": (1, 2)})
    assert len(seen) > 2 * count
    others = [tiny_model(dtype=torch.float32), tiny_model(hidden_act="relu"), tiny_model("qwen3")]
    for other in others:
        seen = watch(other)
        profile(other, **SMALL)
        assert seen


def test_the_same_model_by_another_name_is_the_same():
    """Would catch a key that holds the folder a model was loaded from."""
    first, second = tiny_model(), tiny_model(seed=1)
    second.config._name_or_path = "elsewhere"
    profile(first, **SMALL)
    seen = watch(second)
    profile(second, **SMALL)
    assert not seen


def test_a_damaged_profile_is_measured_again(home, caplog):
    """Would catch a run that ends because of a file that an earlier one left half written."""
    model = tiny_model()
    profile(model, **SMALL)
    (path,) = home.rglob("*.json")
    path.write_text('{"about": {}, "costs": [{}]}')
    assert len(profile(model, **SMALL).costs) == 8
    assert len(Profile.load(path).costs) == 8


def test_a_folder_that_cannot_be_written_costs_the_profile_only(home, monkeypatch):
    """Would catch a measurement that is lost with an error at its end."""
    monkeypatch.setattr(constants, "HF_HOME", str(home / "file" / "below"))
    (home / "file").write_text("")
    assert len(profile(tiny_model(), **SMALL).costs) == 8


def test_a_model_is_left_as_it_was(capsys):
    """Would catch dropout during the measurement, a model left in eval mode, or a bar in a log file."""
    model = tiny_model("gpt2").train()
    modes = []
    model.register_forward_pre_hook(lambda module, inputs: modes.append((module.training, torch.is_grad_enabled())))
    profile(model, **SMALL)
    assert {*modes} == {(False, False)}
    assert model.training
    assert capsys.readouterr() == ("", "")


def test_what_was_measured_is_looked_up_and_the_rest_is_interpolated():
    """Would catch axes that are mixed up: a plane is read exactly between its points and beyond."""

    def plane(batch, context, tokens):
        return 1 + 7 * batch + 0.01 * context + 3 * tokens

    found = filled(plane)
    for shape in [(1, 100, 1), (4, 500, 9), (2, 300, 2), (3, 450, 7), (8, 900, 20)]:
        assert found.seconds(*shape) == pytest.approx(plane(*shape))
    assert found.seconds(1, 0, 1) == plane(1, 100, 1)  # flat below


def test_costs_never_fall_beyond_what_was_measured():
    """Would catch a straight line through noise that promises passes of no time."""
    found = filled(lambda batch, context, tokens: {1: 1.0, 3: 1.5, 9: 1.2}[tokens])
    assert found.seconds(1, 100, 3) == 1.5
    assert found.seconds(1, 100, 1000) == 1.2


def test_json_holds_all_of_a_profile(tmp_path):
    """Would catch a field that is lost on the way to disk and back."""
    found = filled(lambda *shape: float(sum(shape)))
    found.save(tmp_path / "new" / "profile.json")
    assert Profile.load(tmp_path / "new" / "profile.json") == found
    assert Profile.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_spread_is_the_worst_of_all():
    """Would catch a spread that hides the shape that says nothing."""
    costs = (Cost(1, 0, 1, 1.0, 0.9, 1.1), Cost(1, 0, 2, 2.0, 1.5, 2.5))
    assert Profile({}, costs).spread == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lengths=()), "at least one row"),
        (dict(lengths=(0, 1)), "at least one token"),
        (dict(batches=(0,)), "at least one row"),
        (dict(repeats=1), "repeats must be at least 2"),
        (dict(contexts=(125,)), "128 positions, and the longest shape needs 129"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, message):
    """Would catch a division by nothing, or an index error of the model's own in the middle of a run."""
    with pytest.raises(InputError, match=message):
        profile(tiny_model(), **{**SMALL, **settings})


def test_a_profile_with_holes_is_refused(tmp_path):
    """Would catch a lookup that fails long after the file was read."""
    costs = [Cost(1, 0, 1, 1.0, 1.0, 1.0), Cost(2, 0, 2, 1.0, 1.0, 1.0)]
    with pytest.raises(InputError, match="every shape of a grid"):
        Profile({}, tuple(costs))
    with pytest.raises(InputError, match="every shape"):
        Profile({}, ())
    (tmp_path / "p.json").write_text("[]")
    with pytest.raises(InputError, match=r"p\.json: this is no profile"):
        Profile.load(tmp_path / "p.json")
    with pytest.raises(InputError, match="tokens must be at least 1, got 0"):
        filled(lambda *shape: 1.0).seconds(1, 100, 0)
