"""A draft with another tokenizer: the output is the target's, and the draft learns its tokens."""

import pytest
import torch
from calls import LLAMA, TARGETS, FavourByLength, both, eos_of
from fakes import VOCAB, prompts, tiny_model
from test_speculation import FALSE_ALARM, chi_square, exact_distribution
from tongues import DRAFT, LETTERS, PERMUTED, TARGET, begun, permuted, random_draft, tokenizer

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.drafts.translation import Translation
from hf_osd.errors import ConfigError, InputError, UnsupportedModelError
from hf_osd.routing import ByKey
from hf_osd.serving.translating_decoder import TranslatingDecoder


def assistant(draft, target=LLAMA, words=DRAFT, target_tokenizer=TARGET, **settings):
    chosen = {"draft_length_schedule": "constant", "draft_length": 5, "learn": False, **settings}
    given = {"tokenizer": words, "target_tokenizer": target_tokenizer}
    return OnlineAssistant(draft, target, OnlineConfig(unsupported="error", **chosen), **given)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_equals_generate(kind, batch):
    """Catches a token of the draft that is taken for one of the target, and columns of one counted as the other's."""
    expected, actual = both(TARGETS[kind], assistant(random_draft(), TARGETS[kind]), begun(prompts(batch)))
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("schedule", ["constant", "measured"])
def test_a_draft_that_says_the_same_in_other_numbers_is_always_right(batch, schedule):
    """Catches a map of numbers that is off, and a text that the draft reads with gaps, or at other places."""
    draft = permuted(LLAMA)
    used = assistant(draft, words=PERMUTED, draft_length_schedule=schedule)
    for seed in range(3):
        expected, actual = both(LLAMA, used, begun(prompts(batch, seed=seed)))
        assert torch.equal(expected, actual)
    stats = used.stats()
    assert stats.accepted_tokens == stats.draft_tokens
    assert schedule == "measured" or stats.draft_tokens > 0


def test_with_processors_and_rows_that_end(monkeypatch):
    """Catches scores of the shared tokens alone that a processor takes for all of them."""
    inputs = begun(prompts(4))
    call = {"logits_processor": [FavourByLength()], "eos_token_id": eos_of(LLAMA, inputs, [3, 9, 5, 14])}
    for draft, words in ((random_draft(), DRAFT), (permuted(LLAMA), PERMUTED)):
        expected, actual = both(LLAMA, assistant(draft, words=words), inputs, pad_token_id=0, **call)
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("kind", ["gemma3", "mamba2"])
def test_a_draft_with_windows_or_a_state(kind):
    """Catches a rollback by the target's columns in a cache that holds the draft's, and a step that reads nothing."""
    used = assistant(tiny_model(kind, seed=5, vocab_size=len(DRAFT)))
    for seed in range(3):
        expected, actual = both(LLAMA, used, begun(prompts(1, length=20, seed=seed)), max_new_tokens=30)
        assert torch.equal(expected, actual)
    assert used.stats().draft_tokens > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_a_text_beyond_the_drafts_context_goes_on_with_its_latter_half(batch, monkeypatch):
    """Catches a draft that falls silent, or reads beyond its context, where it needs more tokens than the target."""
    made = []
    monkeypatch.setattr(TranslatingDecoder, "_make", property(lambda self: self.maker, _counting(made)), raising=False)
    used = assistant(random_draft(max_position_embeddings=24))
    expected, actual = both(LLAMA, used, begun(prompts(batch, length=18)), max_new_tokens=60)
    assert torch.equal(expected, actual)
    assert len(made) > batch
    assert used.stats().draft_tokens > 0


def _counting(made):
    def store(self, make):
        def counted():
            made.append(make())
            return made[-1]

        self.maker = counted

    return store


@pytest.mark.parametrize("length", [1, 2])
def test_sampled_sequences_have_the_targets_distribution(length):
    """
    Catches probabilities that stand at other tokens than those that were drawn: the target then accepts too much.

    All continuations of three tokens against their exact probabilities; the draft shares three tokens of five.
    """
    vocab, rows = 5, 2000
    ours, theirs = tokenizer(["a", "b"], begins=False), tokenizer(["cc", "b", "d", "a"], begins=False)
    target = tiny_model("llama", vocab_size=vocab, initializer_range=0.15, pad_token_id=None)
    draft = tiny_model("llama", seed=7, vocab_size=len(theirs), initializer_range=0.3)
    used = assistant(draft, target, theirs, ours, draft_length=length)
    prompt = torch.tensor([3, 4, 4, 3])
    expected = exact_distribution(target, prompt[None], 3, temperature=1.2)
    torch.manual_seed(3)
    counts = torch.zeros(vocab, vocab, vocab)
    call = dict(do_sample=True, max_new_tokens=3, top_k=0, temperature=1.2)
    for _ in range(5):
        output = hf_osd.generate(target, prompt.repeat(rows, 1), online_assistant=used, **call)[:, -3:]
        counts.index_put_(tuple(output.T), torch.ones(rows), accumulate=True)
    stats = used.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    for shown in (1, 2, 3):
        seen, exact = (each.reshape(vocab**shown, -1).sum(1) for each in (counts, expected))
        assert chi_square(seen, exact) > FALSE_ALARM / 3


def test_learning_goes_live_and_acceptance_rises():
    """Catches teachers in the target's numbers, and positions that are shifted where a token is spelled."""
    target, draft = (
        tiny_model("llama", dtype=torch.float32),
        random_draft(dtype=torch.float32, max_position_embeddings=64),
    )
    before = {name: weight.clone() for name, weight in draft.named_parameters()}
    settings = dict(learn=True, update_every=4, batch_size=8, steps_per_update=4, learning_rate=1e-2)
    with assistant(draft, target, **settings) as used:
        for number in range(64):
            hf_osd.generate(target, **begun(prompts(1, seed=number % 4)), online_assistant=used, max_new_tokens=16)
        stats, rates = used.stats(), [entry.acceptance for entry in used.journal.requests]
    assert stats.updates > 0
    assert stats.failed_updates == 0
    assert any(not torch.equal(weight, before[name]) for name, weight in draft.named_parameters())
    assert sum(rates[-8:]) > sum(rates[:8]) + 2.0


def on_disk(folder, draft, words=DRAFT):
    """A target and a draft that come from folders, with their tokenizers."""
    target, found = tiny_model("llama", dtype=torch.float32), []
    target.resize_token_embeddings(2000)  # so that nobody takes the difference for padding
    for name, model, own in (("target", target, TARGET), ("draft", draft, words)):
        model.save_pretrained(folder / name)
        own.save_pretrained(folder / name)
        found.append(type(model).from_pretrained(folder / name))
    return found


def reads(used, route="default"):
    found = used.routes[route].translation
    return found.targets.tolist(), found.drafts.tolist(), found.begins, found.leads


def test_tokenizers_come_with_the_models(tmp_path):
    """Catches a draft that is refused although both tokenizers lie beside their models."""
    target, draft = on_disk(tmp_path, random_draft(dtype=torch.float32))
    for one in (draft, str(tmp_path / "draft")):
        expected = target.generate(torch.arange(3, 9)[None], max_new_tokens=8, do_sample=False)
        actual = hf_osd.generate(
            target, torch.arange(3, 9)[None], max_new_tokens=8, do_sample=False, online_assistant=one
        )
        assert torch.equal(expected, actual)


def test_a_saved_draft_keeps_the_tokenizer_that_was_found(tmp_path):
    """Catches a saved draft that cannot be loaded again, since its tokenizer lay beside the model it came from."""
    target, draft = on_disk(tmp_path, random_draft(dtype=torch.float32))
    with OnlineAssistant(draft, target, OnlineConfig(unsupported="error")) as used:
        used.save_pretrained(tmp_path / "saved")
    with OnlineAssistant.from_pretrained(tmp_path / "saved", target) as again:
        assert reads(again) == reads(used)
        expected, actual = both(target, again, begun(prompts(2)))
    assert torch.equal(expected, actual)


def test_a_saved_draft_keeps_the_tokenizer_of_a_target_from_nowhere(tmp_path):
    """Catches a draft that takes the target's numbers for its own where the target's tokenizer was given by hand."""
    with assistant(permuted(LLAMA), words=PERMUTED) as used:
        used.save_pretrained(tmp_path)
    with OnlineAssistant.from_pretrained(tmp_path, LLAMA, OnlineConfig(learn=False)) as again:
        assert reads(again) == reads(used)
        expected, actual = both(LLAMA, again, begun(prompts(1)))
    assert torch.equal(expected, actual)
    assert again.stats().accepted_tokens == again.stats().draft_tokens


def test_routes_keep_their_tokenizers(tmp_path):
    """Catches a tokenizer that is saved for one route alone, or lost by a fork, or loaded for a route without one."""
    target, draft = on_disk(tmp_path, random_draft(dtype=torch.float32))
    config = OnlineConfig(learn=False, unsupported="error")
    with OnlineAssistant(
        drafts={"other": draft, "same": type(target)(target.config)}, target=target, config=config
    ) as used:
        expected = target.generate(**begun(prompts(1)), max_new_tokens=4, do_sample=False)
        call = dict(max_new_tokens=4, do_sample=False)
        actual = hf_osd.generate(target, **begun(prompts(1)), online_assistant=used, osd_route="new", **call)
        assert torch.equal(expected, actual)
        used.save_pretrained(tmp_path / "saved")
    with OnlineAssistant.from_pretrained(tmp_path / "saved", target) as again:
        assert again.routes["same"].translation is None
        assert reads(again, "other") == reads(again, "new") == reads(used, "other")
    assert not (tmp_path / "saved" / "route-same" / "tokenizer_config.json").exists()


def test_a_fork_has_the_tokenizer_of_its_parent_and_compares_nothing_anew(monkeypatch):
    """Catches a fork that takes the target's numbers for its own, and seconds of comparing at a request."""
    draft, between, compared = permuted(LLAMA), Translation.between.__func__, []
    monkeypatch.setattr(Translation, "between", classmethod(lambda *given: compared.append(1) or between(*given)))
    given = dict(tokenizer=PERMUTED, target_tokenizer=TARGET, router=ByKey())
    with OnlineAssistant(draft, LLAMA, OnlineConfig(learn=False), **given) as used:
        keys = ["default", "a", "b"]
        call = dict(max_new_tokens=9, do_sample=False)
        actual = hf_osd.generate(LLAMA, **begun(prompts(3)), online_assistant=used, osd_route=keys, **call)
        assert torch.equal(LLAMA.generate(**begun(prompts(3)), **call), actual)
        assert used.stats().accepted_tokens == used.stats().draft_tokens
        assert reads(used, "a") == reads(used, "b") == reads(used)
    assert len(compared) == 1


def test_a_tokenizer_of_a_route_that_is_not_there():
    """Catches a typing error that would leave a draft without its tokenizer, unsaid."""
    with pytest.raises(InputError, match="'b'"):
        OnlineAssistant(drafts={"a": random_draft()}, target=LLAMA, tokenizer={"b": DRAFT})


def test_what_goes_not_with_it():
    """Catches a target that is asked about the draft's tokens, and a draft that would say nothing, without a word."""
    for setting in ({"lmbda": 0.5}, {"full_teacher": True}):
        with pytest.raises(ConfigError, match="another tokenizer"):
            assistant(random_draft(), learn=True, **setting)
    with pytest.raises(UnsupportedModelError, match="no token in common"):
        assistant(tiny_model("llama", vocab_size=8), words=tokenizer([*"12345"]))
    with pytest.raises(UnsupportedModelError, match="pass both to OnlineAssistant"):
        assistant(tiny_model("llama", vocab_size=5000), words=None, target_tokenizer=None)
    used = assistant(random_draft())
    other = tiny_model("llama", vocab_size=VOCAB + 1)
    with pytest.raises(UnsupportedModelError, match="their tokenizers differ"):
        used.routes.first.check_usable(other)


def test_the_same_tokenizer_needs_no_translation():
    """Catches a detour for drafts of the target's own family."""
    assert assistant(tiny_model("llama", seed=1), words=tokenizer(LETTERS)).routes.first.translation is None
