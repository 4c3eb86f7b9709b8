"""`OnlineAssistant`: counting, learning, saving, threads, closing."""

import copy
import gc
import json
import shutil
import threading
import weakref

import pytest
import torch
from fakes import prompts, tiny_model, wrong_draft
from transformers import AutoModelForCausalLM

import hf_osd
from hf_osd import ClosedError, LearningError, OnlineAssistant, OnlineConfig, StateError
from hf_osd.storage import read_state

TARGET = tiny_model("llama", dtype=torch.float32)
# Measured lengths would depend on how busy the machine is, and these models are too fast to be speculated on.
ALWAYS = {"draft_length_schedule": "constant", "draft_length": 3}
# Without the gate, every update is published, and can be counted.
FAST = OnlineConfig(update_every=4, steps_per_update=2, batch_size=4, learning_rate=3e-3, gate=False, **ALWAYS)


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
    config = OnlineConfig(steps_per_update=8, learning_rate=1e-2, gate=False, **ALWAYS)
    with OnlineAssistant(draft, target, config) as assistant:
        rates = []
        for _ in range(6):
            before = assistant.stats()
            for seed in range(8):
                assert torch.equal(serve(assistant, seed=seed, batch=1), plain(seed, batch=1))
            rates.append((assistant.stats() - before).acceptance_rate)
        assert assistant.stats().updates == 6
    assert rates[-1] > rates[0] + 0.2, rates


def test_serving_expects_what_learning_has_seen():
    """Catches a draft that has learned and is still left alone, for what it was before."""
    draft = tiny_model("llama", seed=5, layers=1, dtype=torch.float32)
    config = OnlineConfig(steps_per_update=8, learning_rate=1e-2, gate=False)  # measured lengths
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
    config = OnlineConfig(
        update_every=2, steps_per_update=1, batch_size=2, background=True, gate=False, duty_cycle=1.0
    )
    expected = {seed: plain(seed) for seed in range(4)}
    served, wrong, errors = [], [], []
    with OnlineAssistant(tiny_model("llama", seed=5, dtype=torch.float32), TARGET, config) as assistant:
        serve(assistant, seed=0)
        assistant.update()  # what an update imports takes longer than all requests of this test

        def work(seed):
            try:
                while assistant.stats().updates < 4 and len(served) < 2000:  # as long as it takes to publish thrice
                    served.append(seed)
                    if not torch.equal(serve(assistant, seed=seed), expected[seed]):
                        wrong.append(seed)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not errors
        assert not wrong
        stats = assistant.stats()
        assert stats.requests == 2 + 2 * len(served)
        assert stats.updates >= 4


def test_save_and_load(tmp_path, caplog):
    """
    Catches a checkpoint that other tools cannot load, a draft that forgets how to go on learning, and a check of the
    tokenizers that is left out without a word.
    """
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
        assert caplog.text.count("nothing checks that draft and target share one") == 1
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


def test_the_selector_end_to_end():
    """Catches a selector that lets nothing through, one that is not asked, and outputs that depend on it."""
    draft = tiny_model("llama", seed=5, layers=1, dtype=torch.float32)
    config = OnlineConfig(steps_per_update=8, learning_rate=1e-2, gate=True, **ALWAYS)
    with OnlineAssistant(draft, TARGET, config) as assistant:
        for number in range(80):
            seed = number % 5
            assert torch.equal(serve(assistant, seed=seed, batch=1), plain(seed, batch=1))
        stats, journal = assistant.stats(), assistant.journal
    assert [entry.request for entry in journal.requests] == list(range(1, 81))
    assert 0 < stats.updates == sum(entry.decision == "published" for entry in journal.updates)
    assert stats.failed_updates == 0
    acceptance = [entry.acceptance for entry in journal.requests]
    assert sum(acceptance[-16:]) / 16 > sum(acceptance[:16]) / 16 + 0.2
    assert journal.updates[0].decision == "held"  # no request has scored it yet


def test_a_report(tmp_path):
    """Catches a report that is not written, that says nothing of what learning did, or that has tokens in it."""
    with OnlineAssistant(tiny_model("llama", seed=5, dtype=torch.float32), TARGET, FAST) as assistant:
        for seed in range(4):
            serve(assistant, seed=seed)
        written = assistant.report(tmp_path / "report", window=3)
        assert [path.name for path in written] == ["report.json", "report.png"]
        assert assistant.report(tmp_path / "plain", plot=False) == [tmp_path / "plain" / "report.json"]
        document = json.loads(written[0].read_text())
        assert len(assistant.journal.requests) == 8
        assert len(assistant.journal.updates) == assistant.stats().updates == 2
    assert written[1].stat().st_size > 1000
    assert "output_ids" not in json.dumps(document)
    assert "published" in json.dumps(document)


def same_weights(draft, other):
    return all(torch.equal(a, b) for a, b in zip(draft.parameters(), other.parameters(), strict=True))


def fresh_draft():
    return tiny_model("llama", seed=5, dtype=torch.float32)


def test_going_on_from_a_state_directory(tmp_path):
    """Catches an assistant that cannot be made again, or begins anew, or leaves its draft alone, after a restart."""
    config = OnlineConfig(**{**vars(FAST), "state_dir": tmp_path})
    with OnlineAssistant(fresh_draft(), TARGET, config) as assistant:
        for seed in range(3):
            serve(assistant, seed=seed)
        with pytest.raises(StateError, match="in use"):
            OnlineAssistant(fresh_draft(), TARGET, config)
    before = assistant.stats()
    assert before.updates == 1
    with OnlineAssistant(fresh_draft(), TARGET, config) as again:
        assert same_weights(assistant.draft, again.draft)
        assert not same_weights(again.draft, fresh_draft())
        stats = again.stats()
        assert (stats.updates, stats.learned_steps) == (before.updates, before.learned_steps)
        assert again.experience.acceptance.value == pytest.approx(assistant._learner.acceptance)
        for seed in range(3):
            assert torch.equal(serve(again, seed=seed), plain(seed))
        assert again.stats().updates > before.updates
        assert again.stats().failed_updates == 0


def test_a_state_directory_is_newer_than_a_saved_draft(tmp_path):
    """Catches a server that forgets at each restart what it has learned since it was saved once."""
    config = OnlineConfig(**{**vars(FAST), "state_dir": tmp_path / "state"})
    with OnlineAssistant(fresh_draft(), TARGET, FAST) as assistant:
        serve(assistant, batch=4)
        assistant.save_pretrained(tmp_path / "saved")
    with OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET, config) as first:
        assert same_weights(first.draft, assistant.draft)  # an empty directory has nothing to say
        serve(first, batch=4)
        assert first.stats().updates == 2
    with OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET, config) as second:
        assert same_weights(second.draft, first.draft)
        assert second.stats().updates == 2


def test_a_draft_that_does_not_learn_is_saved(tmp_path):
    """Catches a folder of settings that nobody makes, or that is taken for a damaged state."""
    with OnlineAssistant(fresh_draft(), TARGET, OnlineConfig(learn=False)) as assistant:
        assistant.save_pretrained(tmp_path)
    with OnlineAssistant.from_pretrained(tmp_path, TARGET) as again:
        assert not again.config.learn
    with OnlineAssistant.from_pretrained(tmp_path, TARGET, FAST) as again:
        serve(again, batch=1)
        assert again.stats().failed_updates == 0


def hide(observation):
    return None


def test_settings_of_this_machine_are_not_saved(tmp_path):
    """Catches a config.json that cannot be written or read, or has a path or a function of this machine in it."""
    from peft import LoraConfig

    adapters = [{"r": 4, "target_modules": ["q_proj"]}, LoraConfig(r=4, target_modules={"q_proj", "v_proj"}), None]
    for number, adapter in enumerate(adapters):
        folder = tmp_path / str(number)
        settings = {"peft_config": adapter, "redact": hide, "state_dir": tmp_path / "private", "update_every": 1}
        with OnlineAssistant(fresh_draft(), TARGET, OnlineConfig(**{**vars(FAST), **settings})) as assistant:
            serve(assistant, batch=1)
            assistant.save_pretrained(folder)
            saved = [weight.clone() for weight in assistant.draft.parameters()]
        text = (folder / "hf_osd" / "config.json").read_text()
        assert "private" not in text
        assert "redact" not in text
        with OnlineAssistant.from_pretrained(folder, TARGET) as again:
            assert again.config.state_dir is None
            assert again.config.redact is None
            assert (again.config.peft_config is None) == (adapter is None)
            assert all(torch.equal(a, b) for a, b in zip(saved, again.draft.parameters(), strict=True))
            serve(again, batch=1)
            assert again.stats().updates == 2
            assert again.stats().failed_updates == 0
        assert read_state(folder / "hf_osd")[1] == []  # all hidden
        shutil.rmtree(tmp_path / "private")


def test_threads_serve_while_the_state_is_saved_and_closed(tmp_path):
    """Catches a deadlock between serving, learning, saving, flushing and closing."""
    settings = {"background": True, "duty_cycle": 1.0, "flush_seconds": 0.02, "state_dir": tmp_path / "state"}
    assistant = OnlineAssistant(fresh_draft(), TARGET, OnlineConfig(**{**vars(FAST), **settings}))
    errors = []

    def work(seed):
        try:
            while True:
                assert torch.equal(serve(assistant, seed=seed), plain(seed))
        except ClosedError:
            return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    serve(assistant)
    for thread in threads:
        thread.start()
    try:
        for number in range(2):
            assistant.update()
            assistant.save_pretrained(tmp_path / str(number))
    finally:
        assistant.close()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()
    assert not errors
    snapshot, observations = read_state(tmp_path / "state")
    assert snapshot.numbers["counters"]["updates"] >= 2
    assert observations


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


def test_weights_that_are_borrowed_later() -> None:
    """Catches learning that writes into a target whose embedding the draft was given after its assistant was made."""
    target, draft = tiny_model("llama", dtype=torch.float32), tiny_model("llama", seed=1, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    config = OnlineConfig(update_every=2, steps_per_update=1, gate=False, learning_rate=1e-2)
    with OnlineAssistant(draft, target, config) as assistant:
        draft.set_input_embeddings(target.get_input_embeddings())
        for seed in range(4):
            hf_osd.generate(target, **prompts(1, seed=seed), online_assistant=assistant, max_new_tokens=8)
        assert assistant.stats().failed_updates > 0
    assert all(torch.equal(before[name], weight) for name, weight in target.state_dict().items())
