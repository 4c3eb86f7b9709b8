"""Where an output leaves that of `generate`, and what rounding explains."""

import pytest
import torch
from fakes import prompts, tiny_model

from hf_osd.evaluation.exactness import (
    Answer,
    Difference,
    compare,
    find_difference,
    first_difference,
    measure_rounding,
    plain_answers,
)

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def answer_of(scores: list[list[float]], logits: list[list[float]] | None = None) -> Answer:
    kept = torch.tensor(scores)
    return Answer(kept.argmax(1), kept, kept if logits is None else torch.tensor(logits))


@pytest.mark.parametrize(
    ("tokens", "position", "gap"),
    [
        ([0, 1, 2], None, None),
        ([0, 2, 2], 1, 1.5),  # the third best token, not the second
        ([2, 1, 2], 0, None),  # a token that is forbidden
        ([0, 1], 2, None),
        ([0, 1, 2, 2], 3, None),
        ([], 0, None),
    ],
)
def test_a_difference_is_measured_where_the_outputs_part(
    tokens: list[int], position: int | None, gap: float | None
) -> None:
    """Would catch the gap of another position, of the two best tokens whatever was written, and an infinite one."""
    answer = answer_of([[1.0, 0.5, -torch.inf], [3.0, 20.5, 19.0], [0.0, 1.0, 5.0]])
    found = find_difference(7, answer, torch.tensor(tokens, dtype=torch.long), torch.bfloat16)
    if position is None:
        assert found is None
    else:
        assert (found.request, found.position, found.gap) == (7, position, gap)
        if gap is not None:
            assert found.step == 2 * 0.125  # bfloat16 counts in eighths between 16 and 32


def test_sequences_differ_where_the_shorter_one_ends() -> None:
    """Would catch an output that is taken for equal since it is the beginning of the other."""
    long, short = torch.tensor([4, 5, 6]), torch.tensor([4, 5])
    assert first_difference(long, long.clone()) is None
    assert first_difference(long, short) == first_difference(short, long) == 2
    assert first_difference(long, torch.tensor([4, 9, 6])) == 1


def test_rounding_is_the_largest_change_between_the_two_best_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch logits of other tokens, both logits moving together, and a batch that has taken another way."""
    alone = answer_of([[5.0, 4.0, 0.0], [2.0, 6.0, 1.0], [7.0, 0.0, 6.5]])
    one_pass = torch.tensor([[5.5, 4.5, 9.0], [2.0, 6.1, 1.0], [7.0, 0.0, 6.5]])  # moved by 0, .1 and 0
    batch = answer_of([[5.0, 4.2, 0.0], [6.3, 6.0, 1.0], [0.0, 0.0, 99.0]])  # by .2, and 4.3 where it is another text
    monkeypatch.setattr("hf_osd.evaluation.exactness.logits_of_one_pass", lambda *_: one_pass)
    prompt = torch.zeros(1, dtype=torch.long)
    assert measure_rounding(None, prompt, alone) == pytest.approx(0.1, abs=1e-5)
    assert measure_rounding(None, prompt, alone, batch) == pytest.approx(4.3)
    same = answer_of([[5.0, 4.2, 0.0], [2.0, 6.0, 1.0], [7.0, 0.0, 6.5]])
    assert measure_rounding(None, prompt, alone, same) == pytest.approx(0.2)


def test_what_rounding_explains() -> None:
    """Would catch a bound that the smaller of the two sets, and a missing token that is explained."""
    assert Difference(0, 0, gap=0.3, step=0.1).is_explained(0.3)
    assert Difference(0, 0, gap=9.0, step=0.1, is_batch=True).is_explained(0.3)
    assert Difference(0, 0, gap=0.4, step=0.5).is_explained(0.3)
    assert not Difference(0, 0, gap=0.31, step=0.1).is_explained(0.3)
    assert not Difference(0, 0, gap=None, step=9.0).is_explained(0.3)


def test_what_generate_writes_in_the_same_batch_is_the_targets_own() -> None:
    """Would catch exit code 1 for a penalty on padding, and a batch that excuses what it does not write."""
    answer = answer_of([[9.0, 0.0, 1.0], [0.0, 9.0, 1.0]])
    for in_batch, explained in ([0, 2], True), ([0, 1], False), ([2, 2], False), ([0], False), (None, False):
        same = None if in_batch is None else torch.tensor(in_batch)
        found = find_difference(0, answer, torch.tensor([0, 2]), torch.float32, same)
        assert found is not None
        assert found.is_explained(1e-4) is explained


def test_rows_of_a_batch_are_compared_without_their_padding() -> None:
    """Would catch a row that is compared with another one, and a gap that is of the logits behind padding."""
    target = tiny_model()
    request = {"input_ids": torch.tensor([[0, 0, 7, 8], [3, 4, 5, 6]]), "attention_mask": torch.ones(2, 4)}
    request["attention_mask"][0, :2] = 0
    expected = target.generate(**request, **OPTIONS)[:, 4:]
    wrong = expected.clone()
    wrong[0, 1] = (wrong[0, 1] + 1) % 50 + 3
    (found,), rounding = compare(target, request, {"plain": expected, "ours": wrong}, OPTIONS, index=3)
    text = torch.cat([torch.tensor([7, 8]), expected[0, :1]])
    logits = target(text[None]).logits[0, -1].detach()
    assert (found.request, found.contender, found.position) == (3, "ours", 1)
    assert found.gap == pytest.approx(float(logits.max() - logits[wrong[0, 1]]), abs=1e-4)
    assert rounding < 1e-4
    assert not found.is_explained(rounding)


def test_equal_outputs_cost_nothing_to_compare() -> None:
    """Would catch a target that decodes every request once more."""
    same = torch.tensor([[4, 5]])
    assert compare(None, {}, {"plain": same, "ours": same.clone()}, {}, index=0) == ([], 0.0)


def test_padding_behind_an_end_is_no_difference() -> None:
    """Would catch two ways to pad that are taken for two answers."""
    target, request = tiny_model(), prompts(1)
    (answer,) = plain_answers(target, request, OPTIONS)
    target.generation_config.eos_token_id = int(answer.tokens[0])
    short = answer.tokens[None, :1]
    padded = torch.nn.functional.pad(short, (0, 3), value=9)
    assert compare(target, request, {"plain": short, "ours": padded}, OPTIONS, index=0) == ([], 0.0)
