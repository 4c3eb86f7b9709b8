"""What is recorded must be the target's own distribution, at the right positions, without a forward more."""

import pytest
import torch
from fakes import prompts, tiny_model, wrong_draft

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.serving.recording import Recorder
from hf_osd.serving.sequences import Sequences

TARGET = tiny_model("llama")


def record(how, batch, monkeypatch, **settings):
    """Observations of one call, the output, and the number of forwards of the target."""
    config = OnlineConfig(top_k_teacher=6, draft_length=3, draft_length_schedule="constant")
    assistant = OnlineAssistant(wrong_draft(TARGET, how), TARGET, config)
    seen = []
    monkeypatch.setattr(assistant._learner, "observe", seen.append)
    output = hf_osd.generate(
        TARGET, **prompts(batch), online_assistant=assistant, max_new_tokens=17, pad_token_id=0, **settings
    )
    return seen, output, assistant.stats()


@pytest.mark.parametrize("how", ["noisy", "adversarial", "perfect"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("sample", [False, True])
def test_teacher_is_the_targets_own(how, batch, sample, monkeypatch):
    """Catches teachers of another position or row, after processors, or with a wrong tail."""
    settings = dict(do_sample=sample, temperature=0.7, top_k=9) if sample else dict(do_sample=False)
    observations, output, _ = record(how, batch, monkeypatch, **settings)
    assert len(observations) == batch
    for row, seen in enumerate(observations):
        inputs = prompts(batch)
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        assert torch.equal(seen.prompt_ids, prompt)
        assert torch.equal(seen.output_ids, output[row, 9:])
        with torch.no_grad():
            logits = TARGET(torch.cat([seen.prompt_ids, seen.output_ids])[None]).logits[0]
        expected = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        torch.testing.assert_close(seen.teacher_log_probs, expected.gather(1, seen.teacher_ids), atol=1e-5, rtol=1e-5)
        assert torch.equal(seen.teacher_ids, expected.topk(6).indices)
        torch.testing.assert_close(seen.teacher_tail, 1 - expected.exp().topk(6).values.sum(-1), atol=1e-6, rtol=1e-4)


def test_drafted_and_accepted(monkeypatch):
    """Catches proposals noted at the wrong position: accepted ones equal the output, refused ones differ from it."""
    for how in ("noisy", "shifted", "perfect"):
        observations, _, stats = record(how, 3, monkeypatch, do_sample=False)
        for seen in observations:
            proposed = seen.draft_ids >= 0
            assert torch.equal(seen.accepted & proposed, seen.accepted)
            assert (seen.draft_ids[seen.accepted] == seen.output_ids[seen.accepted]).all()
            assert (seen.draft_ids[seen.rejected] != seen.output_ids[seen.rejected]).all()
        assert sum(int(seen.accepted.sum()) for seen in observations) == stats.accepted_tokens
        assert sum(int((seen.draft_ids >= 0).sum()) for seen in observations) == stats.draft_tokens


def test_no_extra_forward(monkeypatch):
    """Catches a teacher that is paid for with forwards of the target."""
    calls = []  # the draft, a copy of the target, inherits the hook
    handle = TARGET.register_forward_pre_hook(lambda module, _: calls.append(1) if module is TARGET else None)
    record("noisy", 1, monkeypatch, do_sample=False)  # the first call also tries out what cache the target can use
    calls.clear()
    _, _, stats = record("noisy", 1, monkeypatch, do_sample=False)
    handle.remove()
    assert len(calls) == stats.target_passes


def test_output_is_cut_at_eos(monkeypatch):
    """Catches observations that run on behind the end of a row."""
    plain = TARGET.generate(**prompts(1), max_new_tokens=17, do_sample=False)
    eos = int(plain[0, 9 + 6])
    observations, _, _ = record("perfect", 3, monkeypatch, do_sample=False, eos_token_id=eos)
    for seen in observations:
        assert (seen.output_ids[:-1] != eos).all()
        assert len(seen.output_ids) == len(seen.teacher_ids) == len(seen.draft_ids) == len(seen.accepted)
    assert int(observations[0].output_ids[-1]) == eos


def test_fraction(monkeypatch):
    """Catches a sampling fraction that is ignored, or that cannot be repeated."""
    counts = []
    for _ in range(2):
        config = OnlineConfig(record_fraction=0.5, seed=3)
        assistant = OnlineAssistant(wrong_draft(TARGET, "random"), TARGET, config)
        seen = []
        monkeypatch.setattr(assistant._learner, "observe", seen.append)
        for _ in range(5):
            hf_osd.generate(TARGET, **prompts(4), online_assistant=assistant, max_new_tokens=2)
        counts.append(len(seen))
    assert counts[0] == counts[1]
    assert 0 < counts[0] < 20


def test_what_was_judged_need_not_be_what_was_sent():
    """Catches held-back tokens that are not recorded, tokens recorded behind the judged ones, and rows mixed up."""
    seen = []
    recorder = Recorder(2, [True, True], seen.append)
    logits = torch.zeros(2, 3, 11)
    recorder.record(logits, torch.tensor([[3, 4, 9, 9], [5, 9, 9, 9]]), judged=[3, 1], right=[2, 1], taken=[3, 2])
    recorder.record(logits[:, :1], torch.empty(2, 0, dtype=torch.long), judged=[0, 0], right=[0, 0], taken=[1, 1])
    recorder.record(logits, torch.tensor([[7], [8]]), judged=[0, 1], right=[0, 0], taken=[0, 3])
    sequences = Sequences(torch.tensor([[1], [2]]), [0, 0], max_length=7, slack=0, pad_token_id=0)
    sequences.ends = [5, 7]
    recorder.finish(sequences)
    assert [one.draft_ids.tolist() for one in seen] == [[3, 4, 9, -1], [5, -1, -1, 8, -1, -1]]
    assert [one.accepted.tolist() for one in seen] == [[True, True, False, False], [True] + [False] * 5]
    assert [len(one.teacher_ids) for one in seen] == [4, 6]
