"""Targets with an encoder: the same loop, with the encoder's outputs computed once, for target and draft."""

import copy
import functools
from collections import Counter

import pytest
import torch
from calls import both, chi_square, static
from fakes import Collector, prompts, tiny_model
from seq2seq import SOUND, TEXT, VOCAB, encoder_decoder, inputs_for, with_noise

import hf_osd
from hf_osd import InputError, OnlineAssistant, OnlineConfig, UnsupportedModelError
from hf_osd._caches import cache_of

TARGETS = {kind: encoder_decoder(kind) for kind in (*TEXT, *SOUND)}
FALSE_ALARM = 1e-6  # of the statistical test below


def count_passes(model, monkeypatch):
    """Count the passes of a model's encoder."""
    encoder, counts = model.get_encoder(), Counter()
    forward = encoder.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        counts["passes"] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(encoder, "forward", counted)
    return counts


@pytest.mark.parametrize("schedule", ["constant", "measured"])
@pytest.mark.parametrize("kind", TARGETS)
def test_greedy_equals_generate(kind, schedule):
    """
    Catches encoder outputs of another row or request, positions that go on from a rejected proposal, and those of
    another row: T5, BART and the like take none, and count columns.
    """
    target = TARGETS[kind]
    for draft in (with_noise(target), encoder_decoder(kind, seed=7, layers=1)):
        assistant = static(draft, target, draft_length_schedule=schedule)
        for rows in (1, 3):
            for seed in range(2):
                expected, actual = both(target, assistant, inputs_for(target, rows, seed))
                assert torch.equal(expected, actual)
        stats = assistant.stats()
        assert stats.draft_tokens > 0
        assert stats.fallback_reasons == {}


@pytest.mark.parametrize("new_tokens", [6, 24])
def test_a_decoder_with_windows(new_tokens):
    """Catches windows that are applied to the outputs of the encoder, and in the probe as well, unnoticed."""
    target = encoder_decoder("t5gemma")
    assistant = static(with_noise(target), target)
    for rows in (1, 3):
        for seed in range(3):
            expected, actual = both(target, assistant, inputs_for(target, rows, seed), max_new_tokens=new_tokens)
            assert torch.equal(expected, actual)
    assert assistant.stats().fallback_reasons == {}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_copy_is_always_right(kind):
    """Catches a draft that reads other encoder outputs than those of its own encoder on this request."""
    target = TARGETS[kind]
    assistant = static(copy.deepcopy(target), target)
    for rows in (1, 3):
        expected, actual = both(target, assistant, inputs_for(target, rows))
        assert torch.equal(expected, actual)
    stats = assistant.stats()
    assert stats.accepted_tokens == stats.draft_tokens > 0


@pytest.mark.parametrize("kind", TEXT)
def test_rows_of_a_batch_that_are_far_apart(kind):
    """Catches distances and positions that are right for the longest row alone, and rows that have ended."""
    target, inputs = TARGETS[kind], inputs_for(TARGETS[kind], 4)
    ends = [int(row[3 + 9 * number]) for number, row in enumerate(target.generate(**inputs, max_new_tokens=40))]
    settings = dict(eos_token_id=ends, max_new_tokens=48)
    for draft in (with_noise(target, 0.01), encoder_decoder(kind, seed=7, layers=1)):
        assistant = static(draft, target, unsupported="error")
        for given in ({}, {"eos_token_id": None}, {"repetition_penalty": 1.3}):
            expected, actual = both(target, assistant, inputs, **{**settings, **given})
            assert torch.equal(expected, actual)
        begun = {"decoder_input_ids": torch.tensor([[1, 7, 9]]).expand(4, -1)}
        expected, actual = both(target, assistant, {**inputs, **begun})
        assert torch.equal(expected, actual)


@torch.no_grad()
def exact_distribution(target, inputs, top_k):
    """The probability of every pair of tokens that the target may begin with; `(vocab, vocab)`."""
    prefixes, found = torch.tensor([[1]]), []
    for _ in range(2):
        many = {name: value.expand(len(prefixes), -1) for name, value in inputs.items()}
        logits = target(**many, decoder_input_ids=prefixes).logits[:, -1]
        found.append(logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf).softmax(-1))
        prefixes = torch.cat([torch.ones(VOCAB, 1).long(), torch.arange(VOCAB)[:, None]], dim=1)
    return found[0][0][:, None] * found[1]


def test_sampling_has_the_targets_distribution():
    """Catches a draft whose choices leak into what is sampled behind an encoder."""
    target = encoder_decoder("t5", std=0.15)
    inputs, assistant = inputs_for(target, 1), static(encoder_decoder("t5", 7, layers=1), target, draft_length=3)
    counts = torch.zeros(VOCAB, VOCAB)
    torch.manual_seed(1)
    call = dict(do_sample=True, top_k=4, max_new_tokens=2, online_assistant=assistant)
    for _ in range(500):
        counts[tuple(hf_osd.generate(target, **inputs, **call)[0, 1:])] += 1
    assert assistant.stats().draft_tokens > 400
    assert chi_square(counts.flatten(), exact_distribution(target, inputs, 4).flatten()) > FALSE_ALARM


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_encoders_run_once(kind, monkeypatch):
    """Catches an encoder that runs for every pass, or for the probe of every request."""
    target, draft = encoder_decoder(kind), encoder_decoder(kind, seed=7, layers=1)
    assistant = static(draft, target)
    both(target, assistant, inputs_for(target, 1))
    counts = count_passes(target, monkeypatch), count_passes(draft, monkeypatch)
    hf_osd.generate(target, **inputs_for(target, 1, 1), online_assistant=assistant, max_new_tokens=9, do_sample=False)
    assert [one["passes"] for one in counts] == [1, 1]
    assert assistant.stats().draft_tokens > 0


def test_a_decoder_that_reads_the_targets_encoder(monkeypatch):
    """Catches a draft of the kind of Distil-Whisper that drafts without what was heard, or runs an encoder again."""
    target, draft = TARGETS["whisper"], encoder_decoder("whisper decoder")
    draft.load_state_dict(
        {name: value for name, value in target.state_dict().items() if "encoder." not in name}, strict=False
    )
    counts = count_passes(target, monkeypatch)
    assistant = static(draft, target)
    for rows in (1, 3):
        before = counts["passes"]
        expected, actual = both(target, assistant, inputs_for(target, rows))
        assert torch.equal(expected, actual)
        assert counts["passes"] == before + 2  # one is that of `generate`
    stats = assistant.stats()
    assert stats.accepted_tokens == stats.draft_tokens > 0


def test_a_draft_with_the_targets_own_encoder(monkeypatch):
    """Catches outputs that are computed a second time by the same encoder."""
    target = encoder_decoder("t5")
    draft = encoder_decoder("t5", seed=7, layers=1)
    draft.encoder = target.encoder
    counts = count_passes(target, monkeypatch)
    assistant = static(draft, target)
    expected, actual = both(target, assistant, inputs_for(target, 1))
    assert torch.equal(expected, actual)
    assert counts["passes"] == 2
    assert assistant.stats().draft_tokens > 0


def test_a_draft_without_an_encoder():
    """Catches a draft that reads the output alone, fed with the outputs of an encoder it has no use for."""
    target = TARGETS["t5"]
    assistant = static(tiny_model("llama"), target)
    expected, actual = both(target, assistant, inputs_for(target, 1))
    assert torch.equal(expected, actual)
    assert assistant.stats().draft_tokens > 0


def test_a_batch_where_positions_decide_little():
    """Catches a trial that takes such a decoder for one that does not count columns: later batches would differ."""
    target, draft = encoder_decoder("t5", std=2.0), encoder_decoder("t5", seed=3, std=2.0)
    with OnlineAssistant(draft, target, OnlineConfig(learn=False, draft_length_schedule="constant")) as assistant:
        for seed in (0, 50, 51):
            inputs = inputs_for(target, 3, seed)
            expected = target.generate(**inputs, max_new_tokens=24, do_sample=False)
            actual = hf_osd.generate(target, **inputs, online_assistant=assistant, max_new_tokens=24, do_sample=False)
            assert torch.equal(actual, expected)


def test_the_lookup_quotes_what_the_encoder_has_read():
    """Catches a lookup that knows only the start token of the decoder. The target repeats its source here."""
    target = encoder_decoder("bart")
    source = inputs_for(target, 1)["input_ids"]

    def repeat(input_ids, scores):
        place = input_ids.shape[1] - 1
        return torch.nn.functional.one_hot(source[:, place % 12], VOCAB) * 100.0 + scores

    with OnlineAssistant(tiny_model("llama"), target, OnlineConfig(learn=False, draft_length=5)) as assistant:
        call = dict(inputs={"input_ids": source}, logits_processor=[repeat], max_new_tokens=12)
        expected, actual = both(target, assistant, **call)
        stats = assistant.stats()
    assert torch.equal(expected, actual)
    assert stats.accepted_lookup_tokens > 4


def test_what_else_generate_takes():
    """Catches several outputs of one source, scores, an output type and a streamer as of a decoder alone."""
    target = TARGETS["t5"]
    assistant, inputs = static(with_noise(target), target), inputs_for(target, 1)
    call = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    expected, actual = both(target, assistant, inputs, **call)
    assert type(actual) is type(expected)
    caches = [cache_of(output).self_attention_cache for output in (actual, expected)]
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
    for name in ("scores", "logits"):
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    streamer = Collector()
    output = hf_osd.generate(target, **inputs, online_assistant=assistant, max_new_tokens=9, streamer=streamer)
    assert torch.equal(torch.cat([value.flatten() for value in streamer.values]), output[0])
    begun = {"decoder_input_ids": torch.tensor([[1, 17, 23, 5]])}
    expected, actual = both(target, assistant, {**inputs, **begun})
    assert torch.equal(expected, actual)
    assert not assistant.stats().fallbacks
    kwargs = dict(online_assistant=assistant, do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=9)
    output = hf_osd.generate(target, **inputs, **kwargs)
    assert torch.equal(output, target.generate(**inputs, max_new_tokens=9, do_sample=False).expand(3, -1))


def test_sounds_several_outputs():
    """Catches rows of one sound that are each given another's draft."""
    target = TARGETS["moonshine"]
    assistant, inputs = static(copy.deepcopy(target), target), inputs_for(target, 2)
    output = hf_osd.generate(
        target, **inputs, online_assistant=assistant, do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=9
    )
    expected = target.generate(**inputs, max_new_tokens=9, do_sample=False)
    assert torch.equal(output, expected.repeat_interleave(2, dim=0))
    stats = assistant.stats()
    assert stats.accepted_tokens == stats.draft_tokens > 0


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("windows", [1, 3])
def test_transcripts_with_timestamps(rows, windows):
    """Catches Whisper's own `generate`, with its processors and windows of 30 seconds, served otherwise."""
    target = encoder_decoder("whisper", dtype=torch.float32)
    known = dict(no_timestamps_token_id=40, max_initial_timestamp_index=5, prev_sot_token_id=4, is_multilingual=False)
    vars(target.generation_config).update(known, eos_token_id=2)
    heard = inputs_for(target, rows)["input_features"].repeat(1, 1, windows)
    inputs = {"input_features": heard, "attention_mask": torch.ones(rows, 32 * windows)}
    assistant = static(with_noise(target), target)
    expected, actual = both(target, assistant, inputs, max_new_tokens=20, return_timestamps=True)
    assert torch.equal(expected, actual)
    stats = assistant.stats()
    assert (stats.fallbacks, stats.draft_tokens > 0) == (0, True)


def test_outputs_of_an_encoder_that_the_caller_has():
    """Catches a draft whose encoder is given the ids that stand for an input nobody gave."""
    target = TARGETS["t5"]
    inputs = inputs_for(target, 1)
    outputs = target.get_encoder()(**inputs)
    given = {"encoder_outputs": outputs, "attention_mask": inputs["attention_mask"]}
    assistant = static(with_noise(target), target)
    expected, actual = both(target, assistant, given)
    assert torch.equal(expected, actual)
    assert assistant.stats().fallback_reasons == {"draft: unknown input of its encoder": 1}
    expected, actual = both(target, static(tiny_model("llama"), target, unsupported="error"), given)
    assert torch.equal(expected, actual)


def test_padding_of_a_decoders_prompt():
    """Catches positions that count from the first token, where the target counts from the first column."""
    target = TARGETS["bart"]
    mask = torch.tensor([[0, 0, 1, 1]])
    begun = {"decoder_input_ids": torch.tensor([[1, 0, 17, 5]]), "decoder_attention_mask": mask}
    assistant = static(with_noise(target), target)
    expected, actual = both(target, assistant, {**inputs_for(target, 1), **begun})
    assert torch.equal(expected, actual)
    assert assistant.stats().fallback_reasons == {"padding of a decoder's prompt": 1}


def test_drafts_that_do_not_fit():
    """Catches a draft with an encoder for which nobody has an input."""
    for target in (tiny_model("llama"), TARGETS["whisper"]):
        with pytest.raises(UnsupportedModelError, match="reads input_ids"):
            static(TARGETS["t5"], target, unsupported="error")
    with static(TARGETS["t5"], target := tiny_model("llama")) as assistant:
        expected, actual = both(target, assistant, prompts(1))
    assert torch.equal(expected, actual)
    with pytest.raises(hf_osd.ConfigError, match="encoder"):
        OnlineAssistant(encoder_decoder("t5", 7), TARGETS["t5"], OnlineConfig(lmbda=0.5))


def learned(target, draft, requests=6, **settings):
    """What an assistant has done that learned from a few requests, and which weights of the draft have changed."""
    before = {name: weight.clone() for name, weight in draft.named_parameters()}
    small = dict(update_every=2, steps_per_update=2, batch_size=2, gate=False, learning_rate=1e-3)
    small |= dict(draft_length=3, draft_length_schedule="constant")
    with OnlineAssistant(draft, target, OnlineConfig(**{**small, **settings})) as assistant:
        for seed in range(requests):
            expected, actual = both(target, assistant, inputs_for(target, 1, seed), max_new_tokens=8)
            assert torch.equal(expected, actual)
        stats = assistant.stats()
    return stats, {name for name, weight in draft.named_parameters() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("settings", [{}, {"full_teacher": True}, {"peft_config": {"r": 2}}], ids=lambda one: str(one))
@pytest.mark.parametrize("kind", TEXT)
def test_learning(kind, settings):
    """Catches an update that fails, or one that never reaches the encoder of the draft."""
    target = encoder_decoder(kind, dtype=torch.float32)
    stats, changed = learned(target, encoder_decoder(kind, seed=7, layers=1, dtype=torch.float32), **settings)
    assert (stats.failed_updates, stats.fallbacks) == (0, 0)
    assert stats.updates > 0
    assert any("encoder" in name for name in changed)
    assert any("decoder" in name for name in changed)


def test_a_shared_encoder_is_not_trained():
    """Catches an update that changes the encoder of the target."""
    target = encoder_decoder("t5", dtype=torch.float32)
    draft = encoder_decoder("t5", seed=7, layers=1, dtype=torch.float32)
    draft.encoder = target.encoder
    stats, changed = learned(target, draft)
    assert (stats.failed_updates, stats.updates > 0) == (0, True)
    assert changed
    assert not any(name.startswith("encoder") for name in changed)


@pytest.mark.parametrize("draft", ["whisper", "whisper decoder"])
def test_sounds_are_not_learned_from(draft):
    """Catches an update that fails for every request, since sounds are not recorded."""
    stats, changed = learned(
        encoder_decoder("whisper", dtype=torch.float32), encoder_decoder(draft, 7, 1, torch.float32), requests=2
    )
    assert (stats.failed_updates, stats.learned_steps, changed) == (0, 0, set())


@pytest.mark.parametrize("kind", TEXT)
def test_what_is_learned_from_is_what_was_served(kind, monkeypatch):
    """Catches positions or sources that training and scoring read otherwise: a copy would disagree with its target."""
    target = encoder_decoder(kind, dtype=torch.float32)
    config = OnlineConfig(update_every=4, batch_size=4, steps_per_update=1, learning_rate=1e-9, gate=False)
    with OnlineAssistant(copy.deepcopy(target), target, config) as assistant:
        for seed in range(4):
            begun = {"decoder_input_ids": torch.tensor([[1, *range(5, 5 + seed)]])}
            sources = inputs_for(target, 4, seed)
            one = {name: value[seed : seed + 1] for name, value in sources.items()}
            kwargs = dict(online_assistant=assistant, max_new_tokens=6 + seed, do_sample=False)
            hf_osd.generate(target, **one, **begun, **kwargs)
        judged = assistant.journal.requests
        [update] = [entry for entry in assistant.journal.updates if entry.loss is not None]
    assert [one.acceptance for one in judged] == [1.0] * 4
    assert abs(update.loss) < 1e-5


def test_a_replay_of_sources_survives_a_restart(tmp_path):
    """Catches sources that are lost on disk, so that a draft goes on to learn without what its encoder has read."""
    target = encoder_decoder("t5", dtype=torch.float32)
    for requests, expected in ((2, 2), (1, 3)):
        config = OnlineConfig(update_every=100, state_dir=tmp_path)
        with OnlineAssistant(encoder_decoder("t5", 7, 1, torch.float32), target, config) as assistant:
            for seed in range(requests):
                kwargs = dict(online_assistant=assistant, max_new_tokens=4, do_sample=False)
                hf_osd.generate(target, **inputs_for(target, 1, seed), **kwargs)
            assistant.update()
            kept = assistant._learner.learner.replay.observations()
            assert assistant.stats().failed_updates == 0
        assert len(kept) == expected
        assert all(torch.equal(one.source_ids, inputs_for(target, 1, 0)["input_ids"][0]) for one in kept[:1])


@pytest.mark.parametrize("kind", [*TEXT, *SOUND, "whisper decoder"])
def test_loading_by_name(kind, tmp_path):
    """Catches a draft with an encoder that is loaded as a decoder alone, or not at all, also once it was saved."""
    target = encoder_decoder("whisper" if kind == "whisper decoder" else kind, dtype=torch.float32)
    draft = encoder_decoder(kind, 7, 1, torch.float32)
    draft.save_pretrained(tmp_path / "draft")
    config = OnlineConfig(learn=False, unsupported="error", draft_length_schedule="constant")
    for source, kept in (("draft", "saved"), ("saved", "again")):
        with OnlineAssistant.from_pretrained(tmp_path / source, target, config) as assistant:
            expected, actual = both(target, assistant, inputs_for(target, 1))
            assert type(assistant.draft) is type(draft)
            assert assistant.stats().draft_tokens > 0
            assistant.save_pretrained(tmp_path / kept)
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("kind", TEXT)
def test_a_draft_by_name_goes_on_to_learn(kind, tmp_path):
    """Catches a saved draft whose state is that of another class: what it has learned would be lost."""
    target = encoder_decoder(kind, dtype=torch.float32)
    encoder_decoder(kind, 7, 1, torch.float32).save_pretrained(tmp_path / "0")
    settings = dict(update_every=2, steps_per_update=2, batch_size=2, gate=False, unsupported="error")
    for number in range(2):
        with OnlineAssistant.from_pretrained(tmp_path / str(number), target, OnlineConfig(**settings)) as assistant:
            for seed in range(4):
                kwargs = dict(online_assistant=assistant, max_new_tokens=6, do_sample=False)
                hf_osd.generate(target, **inputs_for(target, 1, seed), **kwargs)
            stats = assistant.stats()
            assistant.save_pretrained(tmp_path / str(number + 1))
            kept = assistant._learner.learner.replay.observations()
        assert (stats.failed_updates, stats.updates > 0) == (0, True)
        assert len(kept) == 4 * (number + 1)


def test_a_draft_by_name_that_hears_as_its_target_does(tmp_path, monkeypatch):
    """Catches an encoder of the Distil-Whisper kind that runs beside the target's, or one that only looks like it."""
    target, draft = (encoder_decoder("whisper", seed, layers=1, dtype=torch.float32) for seed in (0, 7))
    draft.save_pretrained(tmp_path / "other")
    draft.set_encoder(target.get_encoder())
    draft.save_pretrained(tmp_path / "same")
    counts = count_passes(target, monkeypatch)
    for name, is_shared in (("same", True), ("other", False)):
        counts.clear()
        with OnlineAssistant.from_pretrained(tmp_path / name, target, OnlineConfig(learn=False)) as assistant:
            expected, actual = both(target, assistant, inputs_for(target, 1))
            assert (assistant.draft.get_encoder() is target.get_encoder()) == is_shared
        assert torch.equal(expected, actual)
        assert counts["passes"] == 2  # one is that of `generate`


def test_a_decoders_mask_has_to_fit():
    """Catches a mask of another length than the decoder's prompt, which used to be taken for that of a cache."""
    target = TARGETS["t5"]
    begun = {"decoder_input_ids": torch.tensor([[1, 17]]), "decoder_attention_mask": torch.ones(1, 5).long()}
    with pytest.raises(InputError, match="attention_mask"):
        both(target, static(with_noise(target), target), {**inputs_for(target, 1), **begun})
