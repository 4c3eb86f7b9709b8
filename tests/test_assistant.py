"""`OnlineAssistant`: counting, learning, saving, threads, closing."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from fakes import prompts, tiny_model, wrong_draft
from transformers import AutoModelForCausalLM

import hf_osd
from hf_osd import ClosedError, LearningError, OnlineAssistant, OnlineConfig

TARGET = tiny_model("llama", dtype=torch.float32)
# Measured lengths would depend on how busy the machine is, and these models are too fast to be speculated on.
ALWAYS = {"draft_length_schedule": "constant", "draft_length": 3}
FAST = OnlineConfig(update_every=4, steps_per_update=2, batch_size=4, learning_rate=3e-3, **ALWAYS)


def serve(assistant, seed=0, batch=2, **kwargs):
    settings = {"max_new_tokens": 12, "do_sample": False, **kwargs}
    return hf_osd.generate(TARGET, **prompts(batch, seed=seed), online_assistant=assistant, **settings)


def plain(seed=0, batch=2):
    return TARGET.generate(**prompts(batch, seed=seed), max_new_tokens=12, do_sample=False)


def test_stats_of_a_perfect_draft():
    """Catches rates that count what was never judged: a perfect draft accepts everything."""
    assistant = OnlineAssistant(wrong_draft(TARGET, "perfect"), TARGET, OnlineConfig(learn=False, **ALWAYS))
    assert assistant.stats().acceptance_rate == 0.0
    serve(assistant, batch=3)
    stats = assistant.stats()
    assert (stats.requests, stats.generated_tokens, stats.updates) == (3, 36, 0)
    assert stats.acceptance_rate == 1.0
    assert stats.tokens_per_target_pass == 4.0
    assert stats.accepted_tokens == stats.draft_tokens == stats.proposed_tokens == 27
    assert stats.to_dict()["tokens_per_second"] > 0


def test_passes_of_finished_rows_do_not_count():
    """Catches a rate below one token a pass, which a batch of unequal rows would otherwise report."""
    inputs = prompts(3)
    output = TARGET.generate(**inputs, max_new_tokens=12, do_sample=False)
    eos = [int(output[0, 9]), int(output[1, 9])]  # two rows end at once
    assistant = OnlineAssistant(wrong_draft(TARGET, "shifted"), TARGET, OnlineConfig(learn=False))
    serve(assistant, batch=3, eos_token_id=eos, pad_token_id=0)
    assert assistant.stats().tokens_per_target_pass >= 1.0


def test_inline_learning_raises_acceptance():
    """Catches learning that trains on the wrong positions, or never reaches the live draft."""
    target = TARGET
    draft = tiny_model("llama", seed=5, layers=1, dtype=torch.float32)
    config = OnlineConfig(update_every=8, steps_per_update=8, batch_size=8, learning_rate=1e-2, **ALWAYS)
    with OnlineAssistant(draft, target, config) as assistant:
        rates = []
        for _ in range(12):
            before = assistant.stats()
            for seed in range(8):
                assert torch.equal(serve(assistant, seed=seed, batch=1), plain(seed, batch=1))
            after = assistant.stats()
            accepted = after.accepted_tokens - before.accepted_tokens
            rates.append(accepted / (after.draft_tokens - before.draft_tokens))
        assert assistant.stats().updates == 12
    assert rates[-1] > rates[0] + 0.2, rates


def test_serving_expects_what_learning_has_seen():
    """Catches a draft that has learned and is still left alone, for what it was before."""
    draft = tiny_model("llama", seed=5, layers=1, dtype=torch.float32)
    config = OnlineConfig(update_every=8, steps_per_update=8, batch_size=8, learning_rate=1e-2)  # measured lengths
    with OnlineAssistant(draft, TARGET, config) as assistant:
        assistant.experience.acceptance.value = 0.0
        for number in range(48):
            assert torch.equal(serve(assistant, seed=number % 8, batch=1), plain(number % 8, batch=1))
        assert assistant.stats().updates == 6
        assert assistant._learner.acceptance > 0.3
        assert assistant.experience.acceptance.value == pytest.approx(assistant._learner.acceptance)


def test_inline_is_deterministic_and_leaves_the_random_state_alone():
    """Catches trainers that reseed the global generators, which would make samples repeat."""
    weights, states = [], []
    for _ in range(2):
        torch.manual_seed(4)
        with OnlineAssistant(tiny_model("gpt2", seed=5, dtype=torch.float32), TARGET, FAST) as assistant:
            outputs = [serve(assistant, seed=seed) for seed in range(4)]
            assert assistant.stats().updates == 2
            weights.append([p.clone() for p in assistant.draft.parameters()])
            states.append(torch.get_rng_state())
        assert all(torch.equal(out, plain(seed)) for seed, out in enumerate(outputs))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    torch.manual_seed(4)
    assert torch.equal(states[0], torch.get_rng_state())


def test_publishing_under_concurrent_generation():
    """Catches outputs that change while weights are swapped under several threads that serve."""
    config = OnlineConfig(update_every=2, steps_per_update=1, batch_size=2, background=True)
    expected = {seed: plain(seed) for seed in range(4)}
    wrong, errors = [], []
    with OnlineAssistant(tiny_model("llama", seed=5, dtype=torch.float32), TARGET, config) as assistant:

        def work(seed):
            try:
                for _ in range(6):
                    if not torch.equal(serve(assistant, seed=seed), expected[seed]):
                        wrong.append(seed)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assistant.update()  # waits for what the threads left
        assert not errors
        assert not wrong
        stats = assistant.stats()
        assert stats.requests == 48
        assert stats.updates >= 2


def test_save_and_load(tmp_path):
    """Catches a checkpoint that other tools cannot load, and a draft that forgets how to go on learning."""
    with OnlineAssistant(tiny_model("llama", seed=5, dtype=torch.float32), TARGET, FAST) as assistant:
        for seed in range(3):
            serve(assistant, seed=seed)
        assistant.save_pretrained(tmp_path)
        serve(assistant, seed=3)
        expected = [p.clone() for p in assistant.draft.parameters()]
        assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.num_hidden_layers == 2
    with OnlineAssistant.from_pretrained(tmp_path, TARGET) as assistant:
        assert assistant.config == FAST
        serve(assistant, seed=3)
        assert all(torch.equal(a, b) for a, b in zip(expected, assistant.draft.parameters(), strict=True))


def test_a_failing_update_costs_nothing_but_itself(monkeypatch):
    """Catches serving that stops, or changed weights, because training failed."""
    draft = tiny_model("llama", seed=5, dtype=torch.float32)
    before = copy.deepcopy(draft.state_dict())
    config = OnlineConfig(update_every=2, learning_rate=float("1e30"), adaptive_learning_rate=False)
    with OnlineAssistant(draft, TARGET, config) as assistant:
        for seed in range(3):
            assert torch.equal(serve(assistant, seed=seed), plain(seed))
        stats = assistant.stats()
    assert stats.failed_updates + stats.updates >= 1
    if not stats.updates:
        assert all(torch.equal(before[name], value) for name, value in draft.state_dict().items())
    assert all(torch.isfinite(value).all() for value in draft.state_dict().values())


def test_nothing_to_learn_from():
    """Catches an update that pretends to have happened."""
    with OnlineAssistant(tiny_model("llama", seed=5), TARGET) as assistant, pytest.raises(LearningError, match="reco"):
        assistant.update()


def test_closed():
    """Catches requests served by an assistant that no longer learns."""
    assistant = OnlineAssistant(tiny_model("llama", seed=5), TARGET)
    assistant.close()
    assistant.close()
    with pytest.raises(ClosedError):
        serve(assistant)
    with pytest.raises(ClosedError):
        assistant.update()


def test_an_error_while_decoding_records_nothing(monkeypatch):
    """Catches half a request that is learned from."""
    assistant = OnlineAssistant(tiny_model("llama", seed=5), TARGET)
    seen = []
    monkeypatch.setattr(assistant._learner, "observe", seen.append)

    def explode(ids, scores):
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        serve(assistant, logits_processor=[explode])
    assert not seen
    assert assistant.stats().requests == 0


def test_a_wrapped_draft_dies_with_its_target():
    """Catches models kept in memory for ever by the table of wrapped drafts."""
    target, draft = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    hf_osd.generate(target, **prompts(1), online_assistant=draft, max_new_tokens=3)
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None
