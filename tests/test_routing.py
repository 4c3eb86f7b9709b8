"""Routers: which route they choose, and what they keep over a restart. What serves by them is in `test_routes.py`."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import tiny_model
from toys import word_tokenizer

from hf_osd.errors import ConfigError
from hf_osd.routing import Bandit, ByKey, ByLanguage, ByTopic, Prompt, Router
from hf_osd.routing.router import route_of
from hf_osd.routing.topics import clusters

TARGET = tiny_model("llama", dtype=torch.float32)
SIZE = 128


def prompt(topic: int, number: int) -> Any:
    """A prompt whose embedding has a part that all share, one of its topic, and one of its own."""
    made = Prompt(torch.tensor([3]), TARGET)
    own = torch.randn(SIZE, generator=torch.Generator().manual_seed(1000 * topic + number))
    made.embedding = torch.eye(SIZE)[-1] + 0.5 * torch.eye(SIZE)[topic] + 0.4 * own / SIZE**0.5
    return made


def routed(router: Router, topics: Sequence[int]) -> list[str]:
    """The routes of prompts of some topics, as an assistant with room for eight would have them."""
    routes, found = ["first"], []
    for number, topic in enumerate(topics):
        name, like = route_of(router, prompt(topic, number), None, routes, 8)
        routes += [name] if like is not None else []
        found.append(name)
    return found


def test_a_key_wins_and_unknown_ones_get_a_route_while_there_is_room() -> None:
    """Catches a key that the router overrules, and routes without bound."""
    router, some = Bandit(), prompt(0, 0)
    assert route_of(router, some, "sql", ["general", "sql"], 2) == ("sql", None)
    assert route_of(router, some, "code", ["general", "sql"], 3) == ("code", "general")
    assert route_of(router, some, "code", ["general", "sql"], 2) == ("general", None)
    assert route_of(ByKey(), some, None, ["general", "sql"], 2) == ("general", None)
    assert route_of(ByKey("sql"), some, None, ["general", "sql"], 2) == ("sql", None)


def test_the_embedding_is_that_of_the_different_tokens() -> None:
    """Catches repeated tokens that outweigh others, and lengths of embeddings that do."""
    weight = TARGET.get_input_embeddings().weight.detach()
    rows = weight[[3, 7]] - weight.mean(0)
    expected = (rows / rows.norm(dim=-1, keepdim=True)).mean(0)
    torch.testing.assert_close(Prompt(torch.tensor([7, 3, 3, 3]), TARGET).embedding, expected)


def test_clusters_that_lie_apart_are_found_and_others_are_not() -> None:
    """Catches prompts of one kind cut in pieces, and kinds that are thrown together."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.nn.functional.normalize(torch.randn(120, 32, generator=generator), dim=-1)
    assert not clusters(noise, 4).any()
    centres = torch.eye(32)[:3].repeat_interleave(40, 0)
    centres[:10] = torch.eye(32)[2]  # so that the third is the largest
    points = torch.nn.functional.normalize(centres - centres.mean(0) + 0.5 * noise, dim=-1)
    labels = clusters(points, 4)
    assert labels.bincount().tolist() == [50, 40, 30]
    assert len(set(labels[10:40].tolist())) == len(set(labels[80:].tolist())) == 1
    assert not clusters(points, 1).any()


def test_topics_are_found_in_a_mix_and_remembered() -> None:
    """Catches topics that change their names, and those that are forgotten while others come or after a restart."""
    router = ByTopic(4)
    topics = [number % 2 for number in range(128)] + [2] * 128 + [0, 1] * 8
    found = routed(router, topics)
    assert set(found[:63]) == {"first"}
    first, second = found[126], found[127]
    assert {first, second} == {"first", "topic-2"}
    assert found[66:128] == [first, second] * 31
    assert found[-16:] == [first, second] * 8
    assert set(found[200:256]) == {"topic-3"}
    again = ByTopic(4)
    again.load_state(*router.state())
    assert routed(again, [0, 1, 2]) == [first, second, "topic-3"]
    assert again.nearest(prompt(2, 9), ["first"]) == "first"


def test_one_kind_of_prompts_is_one_topic() -> None:
    """Catches a draft that is split for nothing."""
    assert set(routed(ByTopic(4), [1] * 256)) == {"first"}
    assert ByTopic().state()[1] == {"topics": []}


def test_topics_are_bounded() -> None:
    """Catches more drafts than asked for."""
    found = routed(ByTopic(2), [number % 3 for number in range(192)])
    assert set(found) <= {"first", "topic-2"}


def test_the_bandit_prefers_what_is_accepted_and_changes_its_mind() -> None:
    """Catches a bandit that never explores, never settles, or never forgets."""
    router, rates = Bandit(memory=20), {"a": 0.3, "b": 0.7}

    def share(rounds: int) -> float:
        taken = []
        for number in range(rounds):
            route = router.choose(prompt(0, number), list(rates))
            router.note(route, int(10 * rates[route]), 10)
            taken.append(route)
        return taken[rounds // 2 :].count("b") / (rounds - rounds // 2)

    assert share(100) > 0.7
    rates.update(a=0.9)
    assert share(200) < 0.3
    router.note("a", 0, 0)  # nothing was drafted: no trial
    again = Bandit(memory=20)
    again.load_state(*router.state())
    assert again.state() == router.state()


def test_languages() -> None:
    """Catches a language that is confused with another, and codes that nobody knows."""
    pytest.importorskip("py3langid")
    texts = {
        "en": "what is the capital of this country and how many people live there",
        "de": "was ist die Hauptstadt dieses Landes und wie viele Menschen leben dort",
        "fr": "quelle est la capitale de ce pays et combien de personnes y vivent",
    }

    class Decoder:
        """Knows texts by number."""

        def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
            return list(texts.values())[int(ids[0])]

    decoder: Any = Decoder()
    router = ByLanguage(decoder, list(texts))
    found = [router.choose(Prompt(torch.tensor([number]), TARGET), ["en"]) for number in range(3)]
    assert found == list(texts)
    for wrong in (["en"], ["en", "klingon"]):
        with pytest.raises(ConfigError, match="languages must be two or more"):
            ByLanguage(word_tokenizer(), wrong)


@pytest.mark.parametrize("make", [lambda: ByTopic(0), lambda: Bandit(memory=0)])
def test_bad_settings(make: Any) -> None:
    """Catches a setting that fails later, or not at all."""
    with pytest.raises(ConfigError, match="must be an integer of at least 1, got 0"):
        make()
