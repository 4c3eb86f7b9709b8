"""`OnlineAssistedGenerator`: its own loop, and as a candidate generator of transformers' stock assisted decoding."""

import pytest
import torch
from fakes import prompts, tiny_model, wrong_draft
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from hf_osd import OnlineAssistedGenerator
from hf_osd.records import Observation
from hf_osd.serving.randomness import Randomness
from hf_osd.serving.recording import Recorder
from hf_osd.serving.sequences import Sequences

TARGET = tiny_model("llama")


def drafter_for(draft, ids, sample=False, **kwargs):
    config = GenerationConfig(do_sample=sample, max_length=ids.shape[1] + 20)
    return OnlineAssistedGenerator(ids, draft, config, {}, draft_length=4, **kwargs)


def test_proposes_what_the_draft_would_generate():
    """Catches a drafting loop that reads stale cache entries after a rollback."""
    draft = tiny_model("gpt2", seed=3)
    ids = prompts(1)["input_ids"]
    drafter = drafter_for(draft, ids)
    text = ids
    for accepted in (0, 2, 4, 1):
        buffer = torch.nn.functional.pad(text, (0, 4))
        proposal = drafter.propose(buffer, [text.shape[1]], 4)
        expected = draft.generate(text, max_new_tokens=4, do_sample=False)[:, -4:]
        assert torch.equal(proposal.tokens, expected)
        text = torch.cat([text, proposal.tokens[:, :accepted], torch.tensor([[7]])], dim=1)


def test_returns_the_probabilities_it_sampled_from():
    """Catches raw or unprocessed probabilities, which make sampling lossy (huggingface/transformers#47932)."""
    draft = tiny_model("llama", seed=3)
    ids = prompts(1)["input_ids"]
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)])
    drafter = drafter_for(draft, ids, sample=True, logits_processor=processors, randomness=Randomness())
    proposal = drafter.propose(torch.nn.functional.pad(ids, (0, 4)), [9], 4)
    text = torch.cat([ids, proposal.tokens], dim=1)
    with torch.no_grad():
        logits = draft(text).logits[0, 8:-1].float()
    expected = processors(text, logits).softmax(-1)
    torch.testing.assert_close(proposal.probabilities[0], expected)
    assert ((proposal.probabilities[0] > 0).sum(-1) == 5).all()
    assert (proposal.probabilities[0].gather(1, proposal.tokens[0][:, None]) > 0).all()


def test_counts_only_what_the_target_judged():
    """Catches an acceptance rate diluted by tokens behind a refusal, or by finished rows."""
    ids = prompts(3)["input_ids"]
    drafter = drafter_for(tiny_model("llama", seed=3), ids)
    drafted = drafter.propose(torch.nn.functional.pad(ids, (0, 4)), [9, 9, 9], 4).tokens.tolist()
    wrong = [-2] * 5  # no token
    tokens = [[*drafted[0], 7], [*drafted[1][:1], *wrong], drafted[2]]
    right = drafter.note(torch.zeros(3, 5, 7), tokens, taken=[5, 2, 0])
    assert right == [4, 1, 0]
    assert [(one.proposed, one.judged, one.accepted) for one in drafter.counts] == [(4, 4, 4), (4, 2, 1), (0, 0, 0)]


def test_length_follows_what_is_accepted():
    """Catches a draft length that never falls for a bad draft, never rises again, or leaves its bounds."""
    ids = prompts(1)["input_ids"]
    drafter = drafter_for(tiny_model("llama", seed=3), ids, draft_length_schedule="heuristic")
    lengths = []
    for accepted in (0, 1, 0, 0, 1, 3, 4):  # of 4, 3, 2, 1, 1, 3, 4
        k = drafter.num_assistant_tokens
        lengths.append(k)
        (drafted,) = drafter.propose(torch.nn.functional.pad(ids, (0, k)), [9], k).tokens.tolist()
        drafter.note(torch.zeros(1, k + 1, 7), [[*drafted[:accepted], -2]], [accepted + 1])
    assert lengths == [4, 3, 2, 1, 1, 3, 4]
    assert drafter.num_assistant_tokens == 4
    drafter.propose(torch.nn.functional.pad(ids, (0, 2)), [9], 2)  # cut short by the budget
    drafter.note(torch.zeros(1, 3, 7), [[-2]], [1])
    assert drafter.num_assistant_tokens == 4


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("how", ["noisy", "shifted", "random", "perfect"])
def test_inside_stock_assisted_decoding(how, sample, monkeypatch):
    """Catches a candidate generator that only works in our own loop; what it records there must be right as well."""
    draft = wrong_draft(TARGET, how)
    ids = prompts(1)["input_ids"]
    observations: list[Observation] = []
    recorder = Recorder(8, [True], observations.append)
    made = []

    def make(input_ids, generation_config, model_kwargs, logits_processor, inputs_tensor=None, **_):
        made.append(
            OnlineAssistedGenerator(
                input_ids, draft, generation_config, model_kwargs, inputs_tensor, logits_processor,
                draft_length=3, recorder=recorder,
            )
        )  # fmt: skip
        return made[-1]

    monkeypatch.setattr(TARGET, "_get_candidate_generator", make)
    # Without processors: transformers does not hand over the logits before them.
    settings = dict(max_new_tokens=18, do_sample=sample, assistant_model=draft, **({"top_k": 0} if sample else {}))
    torch.manual_seed(0)
    output = TARGET.generate(ids, **settings)
    assert len(made) == 1
    if how == "perfect" and not sample:
        assert made[0].counts[0].accepted == made[0].counts[0].judged > 0
    if not sample:
        assert torch.equal(output, TARGET.generate(ids, max_new_tokens=18, do_sample=False))
    sequences = Sequences(ids, [0], output.shape[1], 0, 0)
    sequences.ids[:] = output
    sequences.ends = [output.shape[1]]
    recorder.finish(sequences)
    with torch.no_grad():
        expected = TARGET(output).logits[0, 8:-1].float().log_softmax(-1)
    (observation,) = observations
    torch.testing.assert_close(
        observation.teacher_log_probs, expected.gather(1, observation.teacher_ids), atol=1e-5, rtol=1e-5
    )
