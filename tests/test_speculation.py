"""Whatever is proposed, and however it is mixed, the output is the target's: `generate` under plans made at random."""

import random
import threading

import pytest
import torch
from calls import chi_square
from fakes import ARCHITECTURES, VOCAB, Collector, prompts, tiny_model, wrong_draft
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import KINDS, RandomPlans, blind, repeating
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.serving.draft_length import MeasuredLength
from hf_osd.serving.experience import Stance, confidence_bin
from hf_osd.serving.measured import MeasuredSpeculator
from hf_osd.serving.row_proposal import RowProposal
from hf_osd.serving.tree import chain

TARGETS = {kind: tiny_model(kind) for kind in (*ARCHITECTURES, "mistral")}
LLAMA = TARGETS["llama"]
FALSE_ALARM = 1e-6  # of each statistical test below


def measured(draft, target=LLAMA, **config):
    return OnlineAssistant(draft, target, OnlineConfig(**{"learn": False, "draft_length": 5, **config}))


@pytest.mark.parametrize("how", ["random", "shifted", "noisy", "perfect"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_equals_generate(kind, how, monkeypatch):
    """Catches caches, buffers or processors left behind by rounds of another kind, on each architecture."""
    target = TARGETS[kind]
    assistant = measured(wrong_draft(target, how), target)
    plans = RandomPlans(kind + how).install(monkeypatch)
    for batch in (1, 3):
        inputs = repeating(batch)
        expected = target.generate(**inputs, max_new_tokens=26, do_sample=False)
        for _ in range(2):  # the second time, the outputs of the first are there to be looked up
            actual = hf_osd.generate(target, **inputs, max_new_tokens=26, do_sample=False, online_assistant=assistant)
            assert torch.equal(expected, actual), f"batch {batch}"
    stats = assistant.stats()
    assert 0 < stats.accepted_lookup_tokens < stats.lookup_tokens
    assert stats.draft_tokens > 0
    assert len({shape for shape in plans.shapes if list(shape) != chain(len(shape))}) > 20


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_and_logits_are_those_of_the_path(batch, monkeypatch):
    """Catches scores of refused branches, or of another place of the tree, returned as those of the output."""
    RandomPlans(batch).install(monkeypatch)
    call = dict(max_new_tokens=24, do_sample=False, return_dict_in_generate=True, output_scores=True)
    call |= dict(output_logits=True, suppress_tokens=[5, 6])
    expected = LLAMA.generate(**repeating(batch), **call)
    assistant = measured(wrong_draft(LLAMA, "noisy"))
    for _ in range(2):
        actual = hf_osd.generate(LLAMA, **repeating(batch), **call, online_assistant=assistant)
        assert torch.equal(actual.sequences, expected.sequences)
        for name in ("scores", "logits"):
            for ours, theirs in zip(actual[name], expected[name], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 4), looks=st.booleans(), length=st.integers(3, 14))
@settings(max_examples=25, deadline=None)
def test_greedy_equals_generate_with_processors_eos_and_streamers(seed, batch, looks, length):
    """Catches processors that see a guess they should not, rows that go on behind a guessed eos, late columns."""
    choose = random.Random(seed)
    inputs = repeating(batch, length, seed)
    plain = LLAMA.generate(**inputs, max_new_tokens=20, do_sample=False)
    extra = choose.choice(
        [
            {},
            {"repetition_penalty": 1.7},
            {"no_repeat_ngram_size": 2},
            {"bad_words_ids": [[5], [7, 9], [int(plain[0, -1])]]},
            {"min_new_tokens": 9},
        ]
    )
    eos = [int(plain[row, choose.randrange(length, length + 20)]) for row in range(batch)]
    call = dict(max_new_tokens=20, do_sample=False, eos_token_id=eos, pad_token_id=0, **extra)
    draft = wrong_draft(LLAMA, choose.choice(["random", "shifted", "noisy", "perfect"]))
    assistant = measured(draft)
    theirs, ours = Collector(), Collector()
    expected = LLAMA.generate(**inputs, **call, streamer=theirs)
    with pytest.MonkeyPatch.context() as monkeypatch:
        RandomPlans(seed).install(monkeypatch)
        if not looks:  # as on an accelerator, where the draft's probabilities are not looked at
            blind(monkeypatch)
        for _ in range(2):
            actual = hf_osd.generate(LLAMA, **inputs, **call, online_assistant=assistant, streamer=ours)
            assert torch.equal(expected, actual)
    assert [column.tolist() for column in ours.values] == 2 * [column.tolist() for column in theirs.values]
    assert ours.ended == 2


@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 6), looks=st.booleans(), contextual=st.booleans())
@settings(max_examples=25, deadline=None)
def test_greedy_equals_generate_on_a_small_vocabulary(seed, vocab, looks, contextual):
    """Catches what only shows where nodes are right by chance: equal ones, and those that fill up shorter rows."""
    target = tiny_model("llama", seed % 7, vocab_size=vocab, pad_token_id=None, bos_token_id=None)
    inputs = prompts(3, 8, seed)
    inputs["input_ids"] %= vocab
    call = dict(max_new_tokens=20, do_sample=False, **({"repetition_penalty": 1.3} if contextual else {}))
    expected = target.generate(**inputs, **call)
    assistant = measured(wrong_draft(target, random.Random(seed).choice(["random", "shifted", "noisy"])), target)
    with pytest.MonkeyPatch.context() as monkeypatch:
        plans = RandomPlans(seed).install(monkeypatch)
        if not looks:
            blind(monkeypatch)
        for _ in range(2):
            assert torch.equal(expected, hf_osd.generate(target, **inputs, **call, online_assistant=assistant))
    assert plans.shapes


@pytest.mark.parametrize("batch", [1, 3])
def test_a_processor_sees_each_text_once(batch, monkeypatch):
    """Catches a processor that is shown refused branches of a tree, or an accepted one more than once."""
    seen, length = [[] for _ in range(batch)], 9

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            for row, bias in enumerate(scores.any(-1).tolist()):  # the others bring zeros
                if bias:
                    seen[row].append(input_ids[row].tolist())
            return scores

    call = dict(max_new_tokens=20, do_sample=False, logits_processor=[Spy()])
    assistant = measured(wrong_draft(LLAMA, "noisy"))
    plans = RandomPlans(batch, ["lookup"]).install(monkeypatch)
    for _ in range(2):  # the second time, every output is there to be looked up
        output = hf_osd.generate(LLAMA, **repeating(batch), **call, online_assistant=assistant)
        for row, texts in enumerate(seen):
            assert texts == [output[row, :end].tolist() for end in range(length, length + 20)]
            texts.clear()
    assert plans.planned["lookup"]


def test_on_the_croppable_cache(monkeypatch):
    """
    Catches a windowed cache, the target's or the draft's, that rounds without the draft leave behind. The text is
    longer than what is kept of windows otherwise.
    """
    target, inputs = TARGETS["mistral"], {"input_ids": repeating(1, length=14)["input_ids"]}
    expected = target.generate(**inputs, max_new_tokens=40, do_sample=False)
    RandomPlans(5).install(monkeypatch)
    for how in ("noisy", "perfect"):
        assistant = measured(wrong_draft(target, how), target)
        for _ in range(3):
            actual = hf_osd.generate(target, **inputs, max_new_tokens=40, do_sample=False, online_assistant=assistant)
            assert torch.equal(expected, actual)
        assert assistant.stats().lookup_tokens > 0


@pytest.mark.parametrize("kinds", [["lookup"], ["draft"], ["trial"], KINDS])
def test_a_processor_is_asked_about_nothing_that_it_forbids(kinds, monkeypatch):
    """Catches guesses that leave a user's trie, which is asked there, and raises: plain decoding never would ask."""
    inputs = repeating(1)

    def trie(row, ids):
        allowed = [token for token in range(3, VOCAB) if (token + len(ids)) % 3 == 0]
        assert all((int(token) + place) % 3 == 0 for place, token in enumerate(ids) if place >= 9), "never asked"
        return allowed

    call = dict(max_new_tokens=24, do_sample=False, prefix_allowed_tokens_fn=trie)
    expected = LLAMA.generate(**inputs, **call)
    assistant = measured(wrong_draft(LLAMA, "noisy"))
    plans = RandomPlans(3, kinds).install(monkeypatch)
    for _ in range(3):
        actual = hf_osd.generate(LLAMA, **inputs, **call, online_assistant=assistant)
        assert torch.equal(expected, actual)
    assert all(plans.planned[kind] for kind in kinds)


@pytest.mark.parametrize("kind", ["draft", "trial", "lookup"])
@pytest.mark.parametrize("step", [3, 7])
@pytest.mark.parametrize("looks", [True, False])
def test_nothing_is_asked_behind_an_eos(kind, step, looks, monkeypatch):
    """Catches a trial that drafts on behind an eos: a user's trie ends there, and raises when it is asked."""
    inputs = repeating(1)
    eos = int(LLAMA.generate(**inputs, max_new_tokens=9, do_sample=False)[0, 9 + step])

    def trie(row, ids):
        return [] if (ids[9:] == eos).any() else list(range(3, VOCAB))

    call = dict(max_new_tokens=24, do_sample=False, eos_token_id=eos, prefix_allowed_tokens_fn=trie)
    expected = LLAMA.generate(**inputs, **call)
    RandomPlans(3, [kind]).install(monkeypatch)
    if not looks:
        blind(monkeypatch)
    monkeypatch.setattr(MeasuredLength, "goes_on", lambda *_: True)  # as measured costs that fall with the length say
    for how in ("perfect", "noisy"):
        assistant = measured(wrong_draft(LLAMA, how))
        for _ in range(2):
            assert torch.equal(expected, hf_osd.generate(LLAMA, **inputs, **call, online_assistant=assistant))


# Sampling.


@torch.no_grad()
def exact_distribution(target, prompt, length, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """The probability of every continuation, from plain forwards of all prefixes; `(vocab,) * length`."""
    vocab, prefixes, probabilities = target.config.vocab_size, prompt, torch.ones(1, dtype=torch.float64)
    penalty = RepetitionPenaltyLogitsProcessor(repetition_penalty)
    for _ in range(length):
        logits = penalty(prefixes, target(prefixes).logits[:, -1]) / temperature
        logits = logits.masked_fill(logits < logits.topk(top_k or vocab).values[:, -1:], -torch.inf)
        following = nucleus(logits.softmax(-1), top_p)
        probabilities = (probabilities[:, None] * following).flatten()
        following = torch.arange(vocab).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(vocab, 0), following], dim=1)
    return probabilities.view((vocab,) * length)


def nucleus(probabilities, mass):
    """The likeliest tokens that reach a mass together, and nothing of the others."""
    best = probabilities.sort(dim=-1, descending=True)
    kept = best.values.cumsum(-1) - best.values < mass
    left = probabilities * torch.zeros_like(kept).scatter(-1, best.indices, kept)
    return left / left.sum(-1, keepdim=True)


PROMPT = [3, 4, 2, 0, 3, 4]  # "3 4" was followed by "2 0 3 4": a guess from the start


def some_guessed(monkeypatch):
    """A quarter of the rows each: guesses that promise 20%, 40%, 60% and 80%, beside a draft that promises 50%."""
    monkeypatch.setattr(MeasuredLength, "request_acceptance", lambda lengths, row: 0.5)
    monkeypatch.setattr(RowProposal, "_chance", lambda proposal, node, branch: 0.2 + 0.2 * (proposal._row % 4))


class LikelyTokens:
    """Believes in a drafted token if the draft gives it at least 0.3, and never learns better."""

    def rate(self, index):
        return float(index % confidence_bin(0.0, Stance.AGREES) >= confidence_bin(0.3))

    def note(self, index, accepted):
        pass


@pytest.mark.parametrize(
    ("how", "warped"),
    [
        ("random", {"temperature": 1.3, "top_k": 4}),
        ("shifted", {"temperature": 0.8, "top_p": 0.85}),
        ("noisy", {"repetition_penalty": 1.5}),
    ],
)
@pytest.mark.parametrize("rounds", ["draft", "lookup", "any", "blind", "chains"])
def test_sampled_sequences_have_the_targets_distribution(rounds, how, warped, monkeypatch):
    """
    Catches guesses and next best tokens that are verified as if the draft had sampled them, in the wrong order or
    against what is left in the wrong place, and a choice among the draft's own tokens that is made after looking at
    them: its likely ones would then be submitted too often.

    All 5^3 continuations against their exact probabilities, on ragged rows, half of which submit guesses.
    """
    vocab, rows, calls = 5, 800, 10
    target = tiny_model("llama", vocab_size=vocab, initializer_range=0.15, pad_token_id=None)
    # A padding token that is in the prompt, too: transformers before 5.24 penalises padding as if it were repeated.
    inputs = {"input_ids": torch.tensor([[PROMPT[0], *PROMPT]]).repeat(rows, 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ragged = torch.arange(rows) % 8 < 4
    inputs["attention_mask"][ragged, 0] = 0
    expected = exact_distribution(target, torch.tensor([PROMPT]), 3, **warped)
    kinds = {"any": KINDS, "blind": ["draft"], "chains": ["draft", "lookup"]}.get(rounds, [rounds])
    plans = RandomPlans(7, kinds, shuffles=rounds == "any")
    plans.install(monkeypatch)
    some_guessed(monkeypatch)
    monkeypatch.setattr(MeasuredLength, "goes_on", lambda lengths, reach, drafted, left: plans.random.random() < 0.7)
    if rounds == "blind":
        blind(monkeypatch)
    if rounds == "chains":  # as for a target that takes no trees
        monkeypatch.setattr(MeasuredSpeculator, "_may_branch", False)
    assistant = measured(wrong_draft(target, how), target, draft_length=2)
    assistant.experience.confidence = LikelyTokens()
    torch.manual_seed(11)
    counts = torch.zeros(vocab, vocab, vocab)
    call = dict(do_sample=True, max_new_tokens=3, **{"top_k": 0, **warped})
    for _ in range(calls):
        output = hf_osd.generate(target, **inputs, **call, online_assistant=assistant)[ragged, -3:]
        counts.index_put_(tuple(output.T), torch.ones(len(output)), accumulate=True)
    stats = assistant.stats()
    assert 0 < stats.accepted_lookup_tokens < stats.lookup_tokens
    assert rounds == "lookup" or 0 < stats.accepted_tokens < stats.draft_tokens
    assert bool(plans.shapes) == (rounds != "chains")
    for length in (1, 2, 3):
        seen, exact = (each.reshape(vocab**length, -1).sum(1) for each in (counts, expected))
        chance = chi_square(seen, exact)
        assert chance > FALSE_ALARM / 3, f"first {length} tokens: p = {chance:.1e}"


def test_sampling_where_every_row_decides_alone(monkeypatch):
    """Catches a bias from drafting that stops, row by row, depending on the very tokens drafted."""
    vocab, calls = 4, 1200
    target = tiny_model("llama", vocab_size=vocab, initializer_range=0.15, pad_token_id=None)
    expected = exact_distribution(target, torch.tensor([PROMPT[:3]]).clamp(max=3), 2)
    RandomPlans(7, ["draft"]).install(monkeypatch)
    monkeypatch.setattr(MeasuredLength, "request_acceptance", lambda lengths, row: 0.5)
    monkeypatch.setattr(MeasuredLength, "goes_on", lambda lengths, reach, drafted, left: reach > 0.3)
    assistant = measured(wrong_draft(target, "random"), target, draft_length=3)
    torch.manual_seed(5)
    counts = torch.zeros(vocab, vocab)
    ids = torch.tensor([PROMPT[:3]]).clamp(max=3)
    for _ in range(calls):
        output = hf_osd.generate(target, ids, online_assistant=assistant, do_sample=True, top_k=0, max_new_tokens=2)[
            :, -2:
        ]
        counts.index_put_(tuple(output.T), torch.ones(1), accumulate=True)
    for seen, exact in ((counts.sum(1), expected.sum(1)), (counts.flatten(), expected.flatten())):
        assert chi_square(seen, exact) > FALSE_ALARM / 2


# What is recorded, and what is learned.


@pytest.mark.parametrize("how", ["noisy", "shifted", "perfect"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("sample", [False, True])
def test_observations(batch, how, sample, monkeypatch):
    """Catches guesses noted as the draft's tokens, held-back tokens at the wrong place, and a wrong teacher."""
    draft = wrong_draft(LLAMA, how)
    assistant = measured(draft, learn=True, top_k_teacher=5)
    seen = []
    monkeypatch.setattr(assistant._learner, "observe", seen.append)
    RandomPlans(f"{how}{batch}").install(monkeypatch)
    for _ in range(2):
        hf_osd.generate(LLAMA, **repeating(batch), online_assistant=assistant, max_new_tokens=24, do_sample=sample)
    assert len(seen) == 2 * batch
    for one in seen:
        text, start = torch.cat([one.prompt_ids, one.output_ids])[None], len(one.prompt_ids) - 1
        with torch.no_grad():
            teacher, choices = LLAMA(text).logits[0, start:-1].float().log_softmax(-1), draft(text).logits[0, start:-1]
        torch.testing.assert_close(one.teacher_log_probs, teacher.gather(1, one.teacher_ids), atol=1e-5, rtol=1e-5)
        assert torch.equal(one.teacher_ids, teacher.topk(5).indices)
        drafted = one.draft_ids >= 0
        assert torch.equal(one.accepted, drafted & (one.draft_ids == one.output_ids))
        if not sample:
            assert torch.equal(one.draft_ids[drafted], choices.argmax(-1)[drafted])
    stats = assistant.stats()
    assert stats.lookup_tokens > 0
    assert sum(int(one.accepted.sum()) for one in seen) == stats.accepted_tokens
    assert sum(int((one.draft_ids >= 0).sum()) for one in seen) == stats.draft_tokens > 0


def test_held_back_tokens_are_judged(monkeypatch):
    """Catches a draft that is never judged where nothing of it is sent: it would never be seen to get better."""
    RandomPlans(1, ["draft"]).install(monkeypatch)
    monkeypatch.setattr(MeasuredLength, "best_cut", lambda *_: 0)
    assistant = measured(wrong_draft(LLAMA, "perfect"), prompt_lookup=False)
    hf_osd.generate(LLAMA, **prompts(2), online_assistant=assistant, max_new_tokens=20, do_sample=False)
    stats = assistant.stats()
    assert stats.tokens_per_target_pass == 1.0
    assert stats.accepted_tokens == stats.draft_tokens == 2 * 19  # behind the last token, there is no room
    assert assistant.experience.acceptance.value > 0.9


def test_without_lookup(monkeypatch):
    """Catches guesses that were not asked for, and outputs kept all the same."""
    RandomPlans(1).install(monkeypatch)
    assistant = measured(wrong_draft(LLAMA, "noisy"), prompt_lookup=False)
    hf_osd.generate(LLAMA, **repeating(2), online_assistant=assistant, max_new_tokens=20, do_sample=False)
    assert assistant.stats().lookup_tokens == 0
    assert assistant.stats().draft_tokens > 0
    assert assistant.experience.outputs.index.tokens == []


def test_experience_is_shared_by_requests():
    """Catches an assistant that measures from scratch at each request, and outputs that nobody can look up."""
    assistant = measured(wrong_draft(LLAMA, "noisy"))
    inputs, outputs = prompts(1), []
    for _ in range(2):
        output = hf_osd.generate(LLAMA, **inputs, online_assistant=assistant, max_new_tokens=20, do_sample=False)
        outputs += [*output[0, 9:].tolist(), -1]
        assert assistant.experience.outputs.index.tokens == outputs
    assert assistant.experience.target_costs.curve(1, 20, 1) is not None
    assert assistant.experience.target_costs.curve(2, 20, 1) is None
    assert assistant.experience.answer_length.value < 64


def test_concurrent_requests(monkeypatch):
    """Catches requests that disturb each other through what they share."""
    RandomPlans(2).install(monkeypatch)
    assistant = measured(wrong_draft(LLAMA, "noisy"))
    wrong = []

    def serve(seed):
        try:
            for step in range(4):
                batch = 1 + (seed + step) % 3
                inputs = repeating(batch, seed=step % 2)
                actual = hf_osd.generate(
                    LLAMA, **inputs, online_assistant=assistant, max_new_tokens=16, do_sample=False
                )
                if not torch.equal(actual, LLAMA.generate(**inputs, max_new_tokens=16, do_sample=False)):
                    wrong.append((seed, step))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert assistant.stats().requests == len(assistant.experience.outputs.index.tokens) // 17
