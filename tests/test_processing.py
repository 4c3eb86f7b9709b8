"""Processors over rows of different lengths, against calling them row by row and token by token."""

import pytest
import torch
from transformers.generation import logits_process as lp

from hf_osd.serving.processing import on_device, process

PROCESSORS = {
    "temperature": lp.TemperatureLogitsWarper(0.6),
    "top_k": lp.TopKLogitsWarper(4),
    "top_p": lp.TopPLogitsWarper(0.7),
    "min_p": lp.MinPLogitsWarper(0.1),
    "typical": lp.TypicalLogitsWarper(0.8),
    "epsilon": lp.EpsilonLogitsWarper(0.02),
    "eta": lp.EtaLogitsWarper(0.02),
    "normalise": lp.LogitNormalization(),
    "suppress": lp.SuppressTokensLogitsProcessor([3, 5]),
    "repetition": lp.RepetitionPenaltyLogitsProcessor(1.5),
    "ngram": lp.NoRepeatNGramLogitsProcessor(2),
    "min_length": lp.MinLengthLogitsProcessor(8, eos_token_id=2),
    "forced_eos": lp.ForcedEOSTokenLogitsProcessor(9, eos_token_id=2),
}


@pytest.mark.parametrize("name", [*PROCESSORS, "all"])
def test_equals_one_call_a_token(name):
    """Catches the fast path for processors that are not context-free, and lengths or rows mixed up in the slow one."""
    processors = list(PROCESSORS.values()) if name == "all" else [PROCESSORS[name]]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (3, 12), generator=generator)
    scores = torch.randn(3, 4, 11, generator=generator)
    before = scores.clone()
    for rows, lengths in (([0, 1, 2], [5, 8, 6]), ([0, 1, 2], [7, 7, 7]), ([0, 2], [9, 9]), ([1], [4])):
        actual = process(processors, ids, scores[rows, 1], rows, lengths)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            expected = lp.LogitsProcessorList(processors)(
                ids[row : row + 1, :length], scores[row : row + 1, 1].clone()
            )
            torch.testing.assert_close(actual[place], expected[0])
    assert torch.equal(scores, before)


def test_processors_follow_the_scores_to_another_device():
    """Catches processors whose tensors stay with the inputs, where a draft or a target is on another device."""
    processor, meta = lp.MinLengthLogitsProcessor(8, eos_token_id=2), torch.device("meta")
    cpu = torch.device("cpu")
    assert on_device([processor], cpu, cpu)[0] is processor
    assert on_device([processor], meta, cpu)[0].eos_token_id.device == meta
    assert processor.eos_token_id.device == cpu


def test_nothing_behind_the_limit():
    """Catches processors asked about columns that there will never be."""
    lengths = []

    def processor(input_ids, scores):
        lengths.append(input_ids.shape[1])
        return scores + 1.0

    result = process([processor], torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 5), [0, 1], [6, 7], limit=7)
    assert lengths == [6]
    assert result[:, 0].tolist() == [1.0, 0.0]


def test_a_processor_sees_the_whole_batch():
    """Catches processors called with a part of the batch: one that looks at the row's number would be misled."""
    seen = []

    class Spy(lp.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((tuple(input_ids.shape), scores.shape[0]))
            scores += 1.0  # in place, as careless processors do
            return scores

    ids, scores = torch.zeros(3, 9, dtype=torch.long), torch.zeros(2, 5)
    result = process([Spy()], ids, scores, [0, 2], [4, 6])
    assert seen == [((3, length), 3) for length in (4, 6)]
    assert (result == 1.0).all()
    assert (scores == 0.0).all()


def test_a_processor_with_settings_for_each_row_sees_the_whole_batch():
    """Catches a penalty that ignores each row's prompt, called with fewer rows than it has settings for."""
    try:
        processor = lp.RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=torch.tensor([1, 2, 3]))
    except ValueError as error:  # in transformers 5.17
        pytest.skip(f"no settings for each row here: {error}")
    ids = torch.tensor([[0, 1, 2, 3]] * 3)
    result = process([processor], ids, torch.ones(2, 4), [0, 2], [4, 4])
    assert result.tolist() == [[1.0, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 0.5]]
