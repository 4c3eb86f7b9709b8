"""What the laboratory runs: streams of requests, and recipes for what learns from them."""

from pathlib import Path

import pytest

from benchmarks.laboratory import streams
from benchmarks.laboratory.recipes import choose, load_recipes

SIZES = streams.Sizes(alone=8, segment=4, gradual=40, mix=30, visit=4, back=3)


# Streams.


def test_a_shift_goes_through_each_domain_in_order() -> None:
    """Would catch shuffled requests, repeated ones, and segments that are off by one."""
    stream = streams.make("shift", {"a": 9, "b": 9}, SIZES)
    assert stream.requests == (*(("a", i) for i in range(4)), *(("b", i) for i in range(4)))
    assert stream.segments == (streams.Segment("a", 0, 4), streams.Segment("b", 4, 8))


def test_a_return_brings_fresh_requests() -> None:
    """Would catch a forgetting test that asks what was already learned by heart."""
    stream = streams.make("return:b,a", {"a": 9, "b": 9}, SIZES)
    assert stream.requests[-3:] == (("b", 4), ("b", 5), ("b", 6))
    assert len(set(stream.requests)) == len(stream.requests)
    assert [(part.label, part.start, part.end) for part in stream.segments] == [("b", 0, 4), ("a", 4, 8), ("b", 8, 11)]
    assert stream.needed() == {"b": 7, "a": 4}


def test_a_gradual_shift_moves_from_the_first_domain_to_the_second() -> None:
    """Would catch a mixture that does not move, moves backwards, or uses a request twice."""
    stream = streams.gradual("a", "b", 400)
    domains = [domain for domain, _ in stream.requests]
    shares = [domains[start : start + 100].count("b") / 100 for start in range(0, 400, 100)]
    assert shares == sorted(shares)
    assert shares[0] < 0.25 < 0.75 < shares[-1]
    for name in ("a", "b"):
        assert [index for domain, index in stream.requests if domain == name] == [*range(domains.count(name))]
    assert stream == streams.gradual("a", "b", 400)


def test_a_mix_has_all_domains_from_the_beginning() -> None:
    """Would catch a mix that is a shift."""
    stream = streams.make("mix", {"a": 99, "b": 99, "c": 99}, SIZES)
    assert {domain for domain, _ in stream.requests[:12]} == {"a", "b", "c"}
    assert len(set(stream.requests)) == SIZES.mix


def test_a_domain_alone_is_as_long_as_its_prompts_last() -> None:
    """Would catch a small domain that cannot be run at all."""
    assert len(streams.make("a", {"a": 5}, SIZES).requests) == 5
    assert len(streams.make("a", {"a": 50}, SIZES).requests) == SIZES.alone


@pytest.mark.parametrize("spec", ["nothing", "shift:a", "shift:a,z", "gradual:a,b,a", "return:c,a", "a:b"])
def test_a_stream_that_cannot_be_is_refused(spec: str) -> None:
    """Would catch a stream that is silently another, or ends in an IndexError after minutes of recording."""
    with pytest.raises(ValueError, match=spec.partition(":")[0]):
        streams.make(spec, {"a": 9, "b": 9, "c": 2}, SIZES)


# Recipes.


def test_the_recipes_that_come_along_are_what_they_say() -> None:
    """Would catch a typo in a field, and an Algorithm 1 that is not the paper's."""
    found = {recipe.name: recipe for recipe in load_recipes()}
    algorithm_1 = [recipe for recipe in found.values() if recipe.family == "algorithm_1"]
    assert sorted(recipe.config["learning_rate"] for recipe in algorithm_1) == [1e-4, 3e-4, 1e-3, 3e-3]
    for recipe in algorithm_1:
        config = recipe.online_config()
        assert (config.positions, config.beta, config.update_every, config.steps_per_update) == ("rejected", 0.0, 8, 1)
        assert config.replay_size == config.batch_size == config.update_every
        assert not config.gate
    assert not found["static"].online_config().learn
    assert found["defaults"].config == {}
    assert found["offline"].epochs == 3


def test_a_wrong_recipe_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """Would catch a misspelt field that is dropped, so that a variant is the default under another name."""
    path = tmp_path / "recipes.toml"
    for text in ("[a]\nconfig = { lerning_rate = 1.0 }", "[a]\nconfig = { beta = 7.0 }", "[a]\nconfigs = {}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="'a'"):
            load_recipes(path)
    with pytest.raises(ValueError, match="nothing"):
        choose(load_recipes(), ["nothing"])
