"""Recording what a target says of texts: in batches, on disk, and again after an interruption."""

import pytest
import torch
from fakes import ARCHITECTURES, VOCAB, tiny_model
from toys import END, word_tokenizer

import hf_osd.design.recording
from hf_osd import OnlineAssistant, OnlineConfig, UnsupportedModelError, generate
from hf_osd.design.reading import read_texts
from hf_osd.design.recording import record
from hf_osd.design.requests import Request
from hf_osd.design.writing import write_answers, write_prompts
from hf_osd.drafts.features import FeatureDraft
from hf_osd.errors import StateError
from hf_osd.records import sparse_teacher

FIELDS = ("prompt_ids", "output_ids", "teacher_ids", "teacher_log_probs", "teacher_tail", "states")


def texts(count, seed=0, shortest=4):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(shortest, 20, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (size,), generator=generator) for size in sizes]


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "mistral", "gemma3"])
def test_reading_in_batches_says_what_each_text_says_alone(kind):
    """Catches padding that leaks into a text, states a token off, and texts that change places."""
    target, some = tiny_model(kind, layers=4), texts(7)
    found = read_texts(target, some, [1, 2, 3, 1, 1, 1, 2], (2, 4), top_k=8)
    for ids, head, one in zip(some, [1, 2, 3, 1, 1, 1, 2], found, strict=True):
        with torch.no_grad():
            alone = target(ids[None, :-1], output_hidden_states=True)
        top, log_probs, tail = sparse_teacher(alone.logits[0, head - 1 :].float(), 8)
        assert torch.equal(torch.cat((one.prompt_ids, one.output_ids)), ids)
        assert len(one.prompt_ids) == head
        assert torch.equal(one.teacher_ids, top)
        torch.testing.assert_close(one.teacher_log_probs, log_probs)
        torch.testing.assert_close(one.teacher_tail, tail)
        states = torch.cat([alone.hidden_states[layer][0] for layer in (2, 4)], dim=-1)
        torch.testing.assert_close(one.states.float(), states.float(), atol=0.05, rtol=0.01)


def test_recording_is_what_serving_records():
    """Catches a laboratory or a distillation that learns from something else than the learner will."""
    target = tiny_model(layers=4)
    draft = FeatureDraft.of(target)
    prompt = texts(1)[0]
    assistant = OnlineAssistant(draft, target, OnlineConfig(update_every=100))
    generate(target, prompt[None], online_assistant=assistant, max_new_tokens=12, do_sample=False)
    (served,) = assistant._learner.learner.replay.observations()
    assistant.close()
    (answer,) = write_answers(target, [prompt], 12)
    (read,) = read_texts(target, [torch.cat((prompt, answer))], [len(prompt)], draft.state_layers)
    assert torch.equal(read.output_ids, served.output_ids)
    assert torch.equal(read.teacher_ids, served.teacher_ids)
    torch.testing.assert_close(read.teacher_log_probs, served.teacher_log_probs)
    torch.testing.assert_close(read.states.float(), served.states.float(), atol=0.05, rtol=0.01)


def test_answers_are_those_of_generate_alone():
    """Catches padded rows that answer another prompt, and answers that go on behind their end."""
    target = tiny_model(layers=2, eos_token_id=17)
    prompts = texts(40)
    for prompt, answer in zip(prompts, write_answers(target, prompts, 9), strict=True):
        alone = target.generate(prompt[None], max_new_tokens=9, do_sample=False)[0, len(prompt) :]
        assert torch.equal(answer, alone)


def test_prompts_of_the_targets_own():
    """Catches prompts with template tokens in them, a sampling that disturbs the caller's, and one without a seed."""
    target, tokenizer = tiny_model(eos_token_id=END), word_tokenizer()
    before = torch.get_rng_state()
    found = write_prompts(target, tokenizer, 40, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert found
    assert found == write_prompts(target, tokenizer, 40, seed=1)
    assert all(text.answer is None and "<" not in text.prompt for text in found)
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        write_prompts(target, word_tokenizer(None), 4)


def test_what_does_not_fit_into_memory_is_written_in_parts(monkeypatch):
    """Catches a GPU that is too small for so many answers at once, where fewer would do."""
    target, tried = tiny_model(eos_token_id=None), []
    before = hf_osd.design.writing._continue

    def small(target, some, *given, **options):
        tried.append(len(some))
        if len(some) > 8:
            raise RuntimeError("CUDA out of memory.")
        return before(target, some, *given, **options)

    expected = write_answers(target, texts(20), 4)
    monkeypatch.setattr(hf_osd.design.writing, "_continue", small)
    assert all(map(torch.equal, write_answers(target, texts(20), 4), expected))
    assert tried == [20, 18, 16, 14, 12, 10, 9, 8, 8, 4]


def test_a_recording_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    """Catches work that is done twice, files of another target or of other settings that are taken for these."""
    monkeypatch.setattr(hf_osd.design.recording, "_LOT", 4)
    monkeypatch.setattr(hf_osd.design.recording, "rows_at_once", lambda _: 1)
    target = tiny_model(layers=4)
    requests = [Request(ids, texts(1, seed=9)[0] if row % 2 else None, 2) for row, ids in enumerate(texts(10))]
    options = dict(state_layers=(2, 4), top_k=4, max_new_tokens=6)
    written = []
    before = hf_osd.design.recording.write_shard
    monkeypatch.setattr(hf_osd.design.recording, "write_shard", lambda *a: (written.append(a[0]), before(*a)))
    first = record(target, requests[:8], tmp_path, **options)
    assert len(written) == 2
    told = []
    whole = record(target, requests, tmp_path, **options, tell=told.append)
    assert len(written) == 3
    assert told == [4, 8, 10]
    assert [len(whole), len(first)] == [10, 8]
    assert all(same(one, other) for one, other in zip(first, whole, strict=False))
    assert all(len(one.prompt_ids) == 2 for one in whole)
    assert whole.lengths == [len(one.prompt_ids) + len(one.output_ids) for one in whole]
    record(target, requests[:4], tmp_path, **{**options, "top_k": 5})
    record(tiny_model(layers=4, seed=5), requests[:4], tmp_path, **options)
    assert len({*written}) == 5


def test_a_recording_on_disk_is_the_one_in_memory(tmp_path):
    """Catches places in a file that are off by one for the second text."""
    target, some = tiny_model(layers=4), texts(9)
    kept = record(target, [Request(ids[:2], ids[2:], 1) for ids in some], tmp_path, state_layers=(2, 4))
    assert all(same(*pair) for pair in zip(kept, read_texts(target, some, [1] * 9, (2, 4)), strict=True))
    assert [len(one.prompt_ids) for one in kept[2:4]] == [1, 1]
    plain = record(target, [Request(ids[:2], ids[2:], 1) for ids in some], tmp_path)
    assert plain[0].states is None


def test_a_damaged_file_is_named(tmp_path):
    """Catches an error of a format that nobody has heard of."""
    target, some = tiny_model(), [Request(ids, ids, 1) for ids in texts(3)]
    record(target, some, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"nothing")
    with pytest.raises(StateError, match="delete it to record anew"):
        record(target, some, tmp_path)
