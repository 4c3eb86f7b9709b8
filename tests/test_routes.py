"""Several drafts for one target: outputs stay the target's, each row is served and learned by its own draft."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import RECURRENT, VOCAB, WINDOWED, tiny_model, wrong_draft
from prometheus_client import CollectorRegistry
from routed import ALWAYS, FAST, STATIC, TARGET, kept, plain, same, serve, small, weights_of
from seq2seq import encoder_decoder, inputs_for
from tongues import DRAFT as WORDS
from tongues import TARGET as TARGET_WORDS
from tongues import random_draft
from transformers import AutoModelForCausalLM

import hf_osd
from hf_osd import InputError, OnlineAssistant, OnlineConfig
from hf_osd.drafts.features import FeatureDraft
from hf_osd.monitoring import register
from hf_osd.routing import Bandit, ByKey, ByTopic, Prompt, Router

KEYS = ["a", "b", "a", "b"]


@pytest.mark.parametrize("keys", [KEYS, "a", ["b", "b", "b", "c"]])
@pytest.mark.parametrize("schedule", ["constant", "measured"])
def test_rows_of_one_batch_take_their_own_routes(keys: Any, schedule: Any) -> None:
    """Catches outputs that depend on the draft, and rows that are mixed up on the way to their drafts."""
    drafts = {"a": wrong_draft(TARGET, "noisy"), "b": wrong_draft(TARGET, "shifted"), "c": small()}
    config = OnlineConfig(learn=False, **{**ALWAYS, "draft_length_schedule": schedule})
    with OnlineAssistant(drafts=drafts, target=TARGET, config=config) as assistant:
        for seed in range(3):
            assert torch.equal(serve(assistant, seed=seed, osd_route=keys), plain(seed=seed))


def test_each_route_is_served_by_its_own_draft() -> None:
    """Catches rows that another route's draft serves: a perfect one accepts all, a shifted one nothing."""
    drafts = {"right": wrong_draft(TARGET, "perfect"), "wrong": wrong_draft(TARGET, "shifted")}
    with OnlineAssistant(drafts=drafts, target=TARGET, config=STATIC) as assistant:
        serve(assistant, osd_route=["wrong", "right", "right", "wrong"])
        stats = assistant.stats()
        right, wrong = stats.routes["right"], stats.routes["wrong"]
        assert (right.requests, right.generated_tokens, right.acceptance_rate) == (2, 24, 1.0)
        assert (wrong.requests, wrong.generated_tokens, wrong.acceptance_rate) == (2, 24, 0.0)
        assert (right.target_passes, wrong.target_passes) == (2 * 3, 2 * 12)
        for name in ("requests", "draft_tokens", "submitted_tokens", "target_passes"):
            assert getattr(stats, name) == getattr(right, name) + getattr(wrong, name)
        assert right.decode_seconds == pytest.approx(wrong.decode_seconds)
        serve(assistant, batch=1)
        later = assistant.stats() - stats
        assert (later.routes["right"].requests, later.routes["wrong"].requests) == (1, 0)  # the first is the default
        assert later.to_dict()["routes"]["right"]["acceptance_rate"] == 1.0


def test_processors_stops_and_scores_of_mixed_batches() -> None:
    """Catches processors that see rows of a group under other numbers, and rows that end at different times."""
    drafts = {"a": wrong_draft(TARGET, "perfect"), "b": small()}
    seen: list[int] = []

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        seen.append(row)
        return list(range(row, VOCAB, 2))

    eos = [int(token) for token in plain()[:2, 14]]
    options: dict[str, Any] = {"prefix_allowed_tokens_fn": allowed, "eos_token_id": eos, "pad_token_id": 0}
    with OnlineAssistant(drafts=drafts, target=TARGET, config=STATIC) as assistant:
        found = serve(assistant, osd_route=KEYS, return_dict_in_generate=True, output_scores=True, **options)
    expected = plain(return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert set(seen) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", [*WINDOWED, *RECURRENT])
def test_a_row_that_is_over_beside_one_that_goes_on(kind: str) -> None:
    """Catches a draft whose window is rolled back twice between two passes, after its row has ended."""
    ends = [int(row[-8]) for row in plain(2)]
    ended = {"eos_token_id": ends[:1], "pad_token_id": 0, "max_new_tokens": 40}
    drafts = {"a": tiny_model(kind, seed=3), "b": small()}
    with OnlineAssistant(None, TARGET, OnlineConfig(learn=False, **ALWAYS), drafts=drafts) as assistant:
        for keys in (["a", "b"], ["b", "a"]):
            assert torch.equal(serve(assistant, 2, osd_route=keys, **ended), plain(2, **ended))
        assert assistant.stats().fallbacks == 0


def test_sampling_has_the_targets_distribution() -> None:
    """
    Catches proposals of one draft that are judged by the probabilities of another. Chi-square over the second token of
    2,400 rows in mixed batches; the bound lets a right implementation fail once in 10,000 runs, and the seed is fixed.
    """
    drafts = {"a": wrong_draft(TARGET, "noisy"), "b": small()}
    ids, rows = torch.full((60, 4), 7), 60
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": True, "top_k": 4, "temperature": 1.5}
    with torch.no_grad():
        logits = TARGET(ids[:1]).logits[0, -1] / 1.5
        first = logits.topk(4)
        chances: dict[tuple[int, int], float] = {}
        for token, chance in zip(first.indices.tolist(), first.values.softmax(-1).tolist(), strict=True):
            text = torch.cat([ids[:1], torch.tensor([[token]])], dim=1)
            then = (TARGET(text).logits[0, -1] / 1.5).topk(4)
            for other, more in zip(then.indices.tolist(), then.values.softmax(-1).tolist(), strict=True):
                chances[token, other] = chance * more
    counts = dict.fromkeys(chances, 0)
    generator = torch.Generator().manual_seed(0)
    with OnlineAssistant(drafts=drafts, target=TARGET, config=STATIC) as assistant:
        for _ in range(40):
            found = hf_osd.generate(
                TARGET, ids, online_assistant=assistant, generator=generator, osd_route=["a", "b"] * 30, **settings
            )
            for pair in found[:, 4:].tolist():
                counts[tuple(pair)] += 1
    total = 40 * rows
    statistic = sum((counts[pair] - total * chance) ** 2 / (total * chance) for pair, chance in chances.items())
    assert statistic < 44.3  # the 99.99th percentile of chi-square with 15 degrees of freedom


class Halves(Router):
    """One of a user's own: by the first token."""

    def choose(self, prompt: Prompt, routes: Sequence[str]) -> str:
        return "low" if int(prompt.ids[0]) < VOCAB // 2 else "high"


def test_a_router_of_ones_own_and_a_route_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a protocol that asks for more than one method, and requests that fail with the draft of their route."""
    with OnlineAssistant(small(), TARGET, FAST, router=Halves()) as assistant:
        assert torch.equal(serve(assistant), plain())
        assert set(assistant.routes) == {"default", "low", "high"}

    def fail(*_: Any) -> None:
        raise MemoryError("full")

    monkeypatch.setattr("hf_osd.routes._copy_of", fail)
    with OnlineAssistant(small(), TARGET, FAST, router=Halves()) as assistant:
        assert torch.equal(serve(assistant), plain())
        assert list(assistant.routes) == ["default"]
    assert caplog.text.count("No further draft can be made") == 1


def test_the_bandit_hears_of_every_row() -> None:
    """Catches a bandit that is told about the batch as a whole."""
    drafts = {"wrong": wrong_draft(TARGET, "shifted"), "right": wrong_draft(TARGET, "perfect")}
    router = Bandit(memory=20)
    with OnlineAssistant(drafts=drafts, target=TARGET, config=STATIC, router=router) as assistant:
        for seed in range(12):
            assert torch.equal(serve(assistant, seed=seed), plain(seed=seed))
        routes = assistant.stats().routes
    assert routes["right"].requests > 3 * routes["wrong"].requests > 0


def test_drafts_that_read_the_target() -> None:
    """Catches states or vocabularies of other rows, and drafts of two kinds in one batch."""
    target = tiny_model("llama", layers=4, dtype=torch.float32)
    drafts = {
        name: FeatureDraft.of(target, general=torch.arange(0, VOCAB, step)) for name, step in (("a", 2), ("b", 3))
    }
    with OnlineAssistant(drafts={**drafts, "c": small()}, target=target, config=FAST) as assistant:
        for seed in range(2):
            for keys in (KEYS, "a", ["a", "c", "b", "c"]):
                assert torch.equal(serve(assistant, seed=seed, target=target, osd_route=keys), plain(4, seed, target))
        stats = assistant.stats()
        assert stats.fallback_reasons == {"drafts of a batch read other states": 8}
        assert stats.routes["a"].updates > 0 < stats.routes["b"].updates
        for name in ("a", "b"):
            for one in (one for one in kept(assistant, name) if one.states is not None):
                with torch.no_grad():
                    text = torch.cat([one.prompt_ids, one.output_ids])[None, :-1]
                    hidden = target(text, output_hidden_states=True).hidden_states
                expected = torch.cat([hidden[layer] for layer in drafts[name].state_layers], dim=-1)[0]
                torch.testing.assert_close(one.states.float(), expected, atol=0.05, rtol=0.05)


def test_targets_with_an_encoder() -> None:
    """Catches drafts that read the encoder's outputs of other rows: a copy of the target is right everywhere."""
    target = encoder_decoder("whisper")
    drafts = {"right": copy.deepcopy(target), "wrong": encoder_decoder("whisper", seed=7, layers=1)}
    inputs: dict[str, Any] = {**inputs_for(target, 4), "max_new_tokens": 12, "do_sample": False}
    with OnlineAssistant(drafts=drafts, target=target, config=STATIC, router=ByTopic()) as assistant:
        keys = ["wrong", "right", "wrong", "right"]
        found = hf_osd.generate(target, **inputs, online_assistant=assistant, osd_route=keys)
        stats = assistant.stats()
    assert torch.equal(found, target.generate(**inputs))
    assert stats.fallback_reasons == {}
    assert stats.routes["right"].acceptance_rate == 1.0 > stats.routes["wrong"].acceptance_rate


def test_a_draft_with_another_tokenizer_beside_one_with_the_same(tmp_path: Path) -> None:
    """Catches scores of a part of the vocabulary that are taken for all of it, and requests in the wrong tokens."""
    target = tiny_model("llama", dtype=torch.float32)
    target.resize_token_embeddings(2000)  # so that nobody takes the difference for padding
    loaded = {}
    for name, model, words in (("target", target, TARGET_WORDS), ("other", random_draft(dtype=torch.float32), WORDS)):
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
        loaded[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    target = loaded["target"]
    drafts = {"same": copy.deepcopy(target), "other": loaded["other"]}
    keys = ["other", "same", "other", "same"]
    with OnlineAssistant(drafts=drafts, target=target, config=FAST) as assistant:
        for seed in range(3):
            assert torch.equal(serve(assistant, seed=seed, target=target, osd_route=keys), plain(4, seed, target))
        stats = assistant.stats()
    assert stats.fallback_reasons == {}
    assert stats.failed_updates == 0
    assert stats.routes["same"].acceptance_rate > 0.9
    assert stats.routes["other"].updates > 0 < stats.routes["other"].draft_tokens


def test_adapters_on_one_base_share_its_memory(tmp_path: Path) -> None:
    """Catches bases that are copied for each route, learning that changes them, and adapters that are lost on disk."""
    peft = pytest.importorskip("peft")
    small().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a").eval()
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with OnlineAssistant(drafts=model, target=TARGET, config=FAST, router=ByKey()) as assistant:
        assert torch.equal(serve(assistant, osd_route=["a", "b", "c", "c"]), plain())
        serve(assistant, osd_route=["a", "b", "c", "c"])
        stats = assistant.stats()
        assert all(one.updates for one in stats.routes.values())
        assert stats.failed_updates == 0
        places = {
            name: {n: w.data_ptr() for n, w in one.draft.named_parameters() if "lora_" not in n}
            for name, one in assistant.routes.items()
        }
        assert places["a"] == places["b"] == places["c"]
        assert places["a"]["model.embed_tokens.weight"] == base.model.embed_tokens.weight.data_ptr()
        assistant.save_pretrained(tmp_path / "saved")
        learned = {name: weights_of(assistant, name) for name in assistant.routes}
    with OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET) as again:
        assert list(again.routes) == ["a", "b", "c"]
        assert all(same(learned[name], weights_of(again, name)) for name in learned)
        assert torch.equal(serve(again, osd_route=["a", "b", "c", "c"]), plain())
        assert again.stats().failed_updates == 0


def test_routes_are_saved_and_loaded(tmp_path: Path) -> None:
    """Catches routes, or what a router knows, that do not survive, and names that are no names of files."""
    odd, router = "../sql & more", Bandit()
    with OnlineAssistant(
        drafts={"a": small(5), odd: small(6)}, target=TARGET, config=FAST, router=router
    ) as assistant:
        for seed in range(3):
            serve(assistant, seed=seed, osd_route=["a", odd, "new", "new"])
        assistant.save_pretrained(tmp_path / "saved")
        learned = {name: weights_of(assistant, name) for name in assistant.routes}
        known = router.state()
    with pytest.raises(InputError, match="holds the drafts of a Bandit: pass a router"):
        OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET)
    with OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET, router=Bandit()) as again:
        assert {name: same(learned[name], weights_of(again, name)) for name in learned} == dict.fromkeys(learned, True)
        assert again.routes.router is not None
        assert again.routes.router.state() == known
        assert torch.equal(serve(again, osd_route=["a", odd, "new", "new"]), plain())
        assert again.stats().routes["new"].failed_updates == 0


def test_routes_go_on_from_a_state_directory(tmp_path: Path) -> None:
    """Catches a restart that loses routes which were made while serving, or what they have learned."""
    config = OnlineConfig(**{**vars(FAST), "state_dir": tmp_path})
    with OnlineAssistant(small(), TARGET, config, router=ByTopic()) as assistant:
        serve(assistant)
        serve(assistant, osd_route=["default", "x", "x", "y"])
        serve(assistant, seed=1, osd_route=["default", "x", "x", "y"])
        learned = {name: weights_of(assistant, name) for name in assistant.routes}
        before = assistant.stats()
    with OnlineAssistant(small(), TARGET, config, router=ByTopic()) as again:
        assert list(again.routes) == ["default", "x", "y"]
        assert all(same(learned[name], weights_of(again, name)) for name in learned)
        assert again.stats().updates == before.updates
        assert torch.equal(serve(again, osd_route=["default", "x", "x", "y"]), plain())
        assert again.stats().failed_updates == 0


def test_reports_of_routes(tmp_path: Path) -> None:
    """Catches reports and metrics that mix what routes have learned, or show that of one for all."""
    with OnlineAssistant(drafts={"a": small(5), "b": small(6)}, target=TARGET, config=FAST) as assistant:
        serve(assistant, osd_route=KEYS)
        written = assistant.report(tmp_path, plot=False)
        registry = CollectorRegistry()
        register(assistant, registry)
        updates = {"decision": "published", "route": "b"}
        assert registry.get_sample_value("hf_osd_updates_total", updates) == assistant.routes["b"].stats().updates == 1
        with pytest.raises(InputError, match="each route has a journal of its own"):
            _ = assistant.journal
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [f"route-{n}/report.json" for n in "ab"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a target, and either draft or drafts"),
        ({"draft": small(), "drafts": {"a": small()}}, "needs a target, and either draft or drafts"),
        ({"drafts": {}}, "must map names of routes to drafts"),
        ({"drafts": {1: small()}}, "must map names of routes to drafts"),
        ({"drafts": dict.fromkeys("ab", small())}, "one model under two routes"),
        ({"drafts": small()}, "a mapping or a model with adapters, got LlamaForCausalLM"),
        ({"drafts": {"a": small(), "b": small(6)}, "max_routes": 1}, "at least the number of drafts, 2, got 1"),
        ({"draft": small(), "router": "topic"}, "router must be a Router, got str"),
        ({"draft": small(), "router": ByKey}, "router must be a Router, got the class ByKey itself"),
        ({"draft": small(), "config": {"draft_length": 3}}, "config must be an OnlineConfig, got dict"),
        ({"draft": small(), "tokenizer": "gpt2"}, "tokenizer must be a PreTrainedTokenizerBase, got str"),
    ],
)
def test_drafts_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    """Catches arguments that are taken for something else."""
    with pytest.raises(InputError, match=message):
        OnlineAssistant(target=TARGET, **copy.copy(options))


def test_a_key_without_routes() -> None:
    """Catches a key that is dropped without a word."""
    with (
        OnlineAssistant(small(), TARGET, STATIC) as assistant,
        pytest.raises(InputError, match="osd_route='sql' names"),
    ):
        serve(assistant, osd_route="sql")


def test_a_router_that_returns_no_name() -> None:
    """Catches a route without a name, which would get a draft of its own."""

    class Silent(Router):
        def choose(self, prompt: Prompt, routes: Sequence[str]) -> Any:
            """Forget to return."""

    with (
        OnlineAssistant(small(), TARGET, STATIC, router=Silent()) as assistant,
        pytest.raises(InputError, match=r"Silent\.choose must return the name of a route, got None"),
    ):
        serve(assistant)


@pytest.mark.parametrize("keys", [["a", "b", "a"], [], "", [None], 3])
def test_keys_that_make_no_sense(keys: Any) -> None:
    """Catches keys that are dropped or shifted to other rows."""
    with OnlineAssistant(drafts={"a": small()}, target=TARGET, config=STATIC) as assistant:
        with pytest.raises(InputError, match="osd_route must be the name of a route"):
            serve(assistant, osd_route=keys)
        assert torch.equal(serve(assistant, batch=2, osd_route=["a"]), plain(2))
        repeated = serve(assistant, batch=2, osd_route=["a", "a"], num_return_sequences=2, do_sample=True)
        assert len(repeated) == 4
