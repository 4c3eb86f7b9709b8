"""Scores of weights, against a loop over requests and positions that reads the definition."""

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from fakes import ARCHITECTURES, VOCAB, tiny_model, wrong_draft
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from traffic import recorded
from transformers import PreTrainedModel

from hf_osd.learning.reading import Reader
from hf_osd.learning.scoring import PROPOSAL_LENGTH, Score, Scorer, acceptance, accepted_run, has_dropped
from hf_osd.records import Observation

KINDS = (*ARCHITECTURES, "bloom", "neo", "gpt1", "mistral", "gemma3")
MAX_LENGTH = 1000


def requests_of(target: PreTrainedModel, *shapes: tuple[int, int, bool], k: int = 8) -> list[Observation]:
    """Recorded requests: lengths of the prompt and of the output, and whether it was decoded greedily."""
    found = []
    for number, (prompt, length, greedy) in enumerate(shapes):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, VOCAB, (prompt,), generator=generator)
        found.append(recorded(target, ids, length, greedy, k, seed=number))
    return found


MIXED = ((9, 7, True), (3, 12, False), (5, 1, True), (12, 4, False), (2, 9, True))


@torch.no_grad()
def by_definition(model: PreTrainedModel, observation: Observation, max_length: int = MAX_LENGTH) -> Score:
    """One request, one position after the other."""
    ids = torch.cat((observation.prompt_ids, observation.output_ids))
    last = len(ids) - 2  # the input that predicts the last token
    first = max(len(observation.prompt_ids) - 1, last + 1 - max_length)
    start = max(last + 1 - max_length, 0)
    logits = model(ids[None, start : last + 1]).logits[0].double()
    greedy = torch.equal(observation.output_ids, observation.teacher_ids[:, 0])
    rates = []
    for position in range(first, last + 1):
        row = position + 1 - len(observation.prompt_ids)
        q = logits[position - start].softmax(-1)
        top = observation.teacher_ids[row]
        p = observation.teacher_log_probs[row].double().exp()
        tail = min(float(observation.teacher_tail[row]), 1.0 - float(q[top].sum()))
        shared = sum(min(float(p[i]), float(q[token])) for i, token in enumerate(top)) + tail
        rates.append(float(q.argmax() == top[0]) if greedy else shared)
    return Score(sum(rates) / len(rates), sum(runs(rates)) / len(rates), len(rates))


def runs(rates: list[float], length: int = PROPOSAL_LENGTH) -> list[float]:
    """Tokens that are accepted of a proposal that begins at each position; nothing is behind the last."""
    return [
        sum(
            math.prod(rates[start : start + tokens]) for tokens in range(1, length + 1) if start + tokens <= len(rates)
        )
        for start in range(len(rates))
    ]


def scores(scorer: Scorer, weights: dict[str, torch.Tensor], requests: list[Observation]) -> list[Score]:
    """Of one candidate."""
    return [found["one"] for found in scorer.scores({"one": weights}, requests)]


def assert_equal(found: list[Score], expected: list[Score], tolerance: float = 2e-5) -> None:
    assert [score.positions for score in found] == [score.positions for score in expected]
    for name in ("acceptance", "accepted"):
        pairs = zip(found, expected, strict=True)
        assert all(abs(getattr(mine, name) - getattr(other, name)) < tolerance for mine, other in pairs), name


def other_weights(draft: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What learning would publish: float32, under the names of the parameters."""
    other = wrong_draft(draft, "noisy")
    return {name: weight.detach().float() for name, weight in other.named_parameters()}


@torch.no_grad()
def loaded(draft: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    model = copy.deepcopy(draft)
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_definition(kind: str) -> None:
    """Catches windows that are off by one, padding that leaks into a row, and wrong positions: every architecture."""
    target = tiny_model(kind, seed=1, dtype=torch.float32)  # Bloom pads with NaN in float64
    draft = wrong_draft(target, "noisy")
    requests = requests_of(target, *MIXED)
    expected = [by_definition(draft, request) for request in requests]
    assert len({round(score.acceptance, 3) for score in expected}) > 2
    assert_equal(scores(Scorer(draft, MAX_LENGTH, 3), {}, requests), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_candidate_has_the_scores_of_a_draft_with_its_weights(kind: str) -> None:
    """Catches tied weights of which only one is replaced, and buffers or names that get lost on the way."""
    target = tiny_model(kind, seed=1, dtype=torch.float32)
    draft = tiny_model(kind, seed=2, dtype=torch.float32)
    weights = other_weights(target)
    requests = requests_of(target, *MIXED)
    found = scores(Scorer(draft, MAX_LENGTH, 4), weights, requests)
    assert found == scores(Scorer(loaded(draft, weights), MAX_LENGTH, 4), {}, requests)
    assert max(score.acceptance for score in found) > 0.3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_candidate_is_scored_in_the_precision_in_which_it_would_serve(kind: str) -> None:
    """Catches float32 weights scored as such, where a bfloat16 draft would round them."""
    target = tiny_model(kind, seed=1)
    draft = tiny_model(kind, seed=2).bfloat16()
    weights = other_weights(target)
    requests = requests_of(target, *MIXED)
    found = scores(Scorer(draft, MAX_LENGTH, 4), weights, requests)
    assert found == scores(Scorer(loaded(draft, weights), MAX_LENGTH, 4), {}, requests)
    assert found != scores(Scorer(draft.float(), MAX_LENGTH, 4), weights, requests)


def test_missing_names_are_as_in_the_live_draft() -> None:
    """Catches a scorer that remembers the weights that were live when it was made."""
    target = tiny_model(seed=1)
    draft = tiny_model(seed=2)
    requests = requests_of(target, *MIXED)
    scorer = Scorer(draft, MAX_LENGTH, 4)
    before = scores(scorer, {}, requests)
    draft.load_state_dict(target.state_dict())
    after = scores(scorer, {}, requests)
    assert before != after
    assert after == scores(Scorer(target, MAX_LENGTH, 4), {}, requests)
    one = {"lm_head.weight": other_weights(target)["lm_head.weight"] * 0.1}
    assert scores(scorer, one, requests) == scores(Scorer(loaded(target, one), MAX_LENGTH, 4), {}, requests)


def test_the_live_draft_is_untouched() -> None:
    """Catches weights that are swapped in the modules that serve: a request in flight would see the candidate."""
    target = tiny_model(seed=1)
    draft = tiny_model(seed=2).train()
    draft.lm_head.weight.requires_grad_(False)
    before = {name: weight.clone() for name, weight in draft.named_parameters()}
    flags = {name: weight.requires_grad for name, weight in draft.named_parameters()}
    ids = torch.arange(3, 9)[None]
    outputs, inside = draft(ids).logits, []

    def in_flight(module: nn.Module, inputs: object, result: object) -> None:
        if module is not draft.model.norm:  # in the middle of scoring, in the scorer's copy
            inside.append(torch.equal(draft(ids).logits, outputs) and torch.equal(draft.model.norm.weight, norm))

    norm = draft.model.norm.weight.clone()
    hook = draft.model.norm.register_forward_hook(in_flight)
    scorer = Scorer(draft, MAX_LENGTH, 2)
    scores(scorer, other_weights(target), requests_of(target, *MIXED))
    hook.remove()
    assert inside == [True] * 3
    assert draft.training
    assert all(module.training for module in draft.modules())
    assert {name: weight.requires_grad for name, weight in draft.named_parameters()} == flags
    assert all(weight.grad is None and torch.equal(weight, before[name]) for name, weight in draft.named_parameters())
    assert not any(module._forward_hooks for module in draft.modules())
    assert torch.equal(draft(ids).logits, outputs)
    assert all(weight.is_meta for weight in scorer._skeleton.parameters())  # no memory of its own


def test_a_draft_that_returns_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the first positions taken for the last, in models that know no `logits_to_keep`."""
    target = tiny_model(seed=1)
    draft = wrong_draft(target, "noisy")
    requests = requests_of(target, *MIXED)
    reader = replace(Reader.of(draft), parameters=frozenset({"position_ids"}))
    monkeypatch.setattr(Reader, "of", lambda *_: reader)
    found = scores(Scorer(draft, MAX_LENGTH, 3), {}, requests)
    assert_equal(found, [by_definition(draft, request) for request in requests])


def test_dropout_is_off_while_scoring() -> None:
    """Catches scores that are drawn by lot, where somebody has left the draft in training mode."""
    target = tiny_model("gpt2", seed=1)
    draft = wrong_draft(target, "noisy").train()
    requests = requests_of(target, *MIXED)
    assert_equal(
        scores(Scorer(draft, MAX_LENGTH, 4), {}, requests), scores(Scorer(draft.eval(), MAX_LENGTH, 4), {}, requests)
    )


@pytest.mark.parametrize("max_length", [2, 6, 14])
def test_long_requests_lose_their_beginning(max_length: int) -> None:
    """Catches a cut at the end, and teachers that are shifted against what is left."""
    target = tiny_model(seed=1)
    draft = wrong_draft(target, "noisy")
    requests = requests_of(target, *MIXED)
    found = scores(Scorer(draft, max_length, 3), {}, requests)
    assert_equal(found, [by_definition(draft, request, max_length) for request in requests])
    assert max(score.positions for score in found) == min(max_length, 12)


def test_no_more_is_read_than_the_draft_has_positions_for() -> None:
    """Catches an index error in a draft whose context is shorter than the target's."""
    target = tiny_model("gpt2", seed=1)
    draft = tiny_model("gpt2", seed=2, n_positions=16)
    requests = requests_of(target, (20, 12, True), (3, 5, False))
    assert_equal(
        scores(Scorer(draft, MAX_LENGTH, 2), {}, requests), [by_definition(draft, request, 16) for request in requests]
    )


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches(batch_size: int) -> None:
    """Catches a last batch that is forgotten, another order, and serving that is not let in between."""
    target = tiny_model(seed=1)
    draft = wrong_draft(target, "noisy")
    requests = requests_of(target, *MIXED)
    pauses: list[None] = []
    scorer = Scorer(draft, MAX_LENGTH, batch_size, lambda: pauses.append(None))
    assert_equal(scores(scorer, {}, requests), [by_definition(draft, request) for request in requests])
    assert len(pauses) == math.ceil(len(requests) / batch_size)
    assert scores(scorer, {}, []) == []


def test_candidates_share_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches requests that are padded anew for each candidate, and candidates that get each other's scores."""
    target = tiny_model(seed=1)
    draft, requests = wrong_draft(target, "noisy"), requests_of(target, *MIXED)
    scorer, made = Scorer(draft, MAX_LENGTH, 4), []
    collate = scorer._collate
    monkeypatch.setattr(scorer, "_collate", lambda batch: made.append(batch) or collate(batch))
    other = other_weights(target)
    found = scorer.scores({"live": {}, "other": other}, requests)
    assert len(made) == 2
    for name, weights in (("live", {}), ("other", other)):
        assert [row[name] for row in found] == scores(scorer, weights, requests)


def test_recordings_of_different_k_share_a_batch() -> None:
    """Catches teachers that lose mass where the smaller k of a batch cuts them off."""
    target = tiny_model(seed=1)
    draft = wrong_draft(target, "noisy")
    wide = requests_of(target, (4, 6, False), k=20)
    narrow = requests_of(target, (4, 6, False), k=5)
    alone, narrow_alone = (scores(Scorer(draft, MAX_LENGTH, 2), {}, requests) for requests in (wide, narrow))
    assert alone[0].acceptance < narrow_alone[0].acceptance  # a bucket hides differences
    assert_equal(scores(Scorer(draft, MAX_LENGTH, 2), {}, wide + narrow), narrow_alone * 2)


def test_a_broken_candidate_scores_nothing() -> None:
    """
    Catches finite weights whose logits are not: argmax of NaN is a token, and right wherever the target repeats it.
    """
    target = tiny_model(seed=1)
    draft = wrong_draft(target, "noisy").float()
    for greedy in (True, False):
        request = requests_of(target, (4, 6, greedy))[0]
        spam = torch.zeros_like(request.output_ids)
        teacher = request.teacher_ids.clone()
        if greedy:
            teacher[:, 0] = spam
        request = Observation(
            request.prompt_ids, spam, teacher, request.teacher_log_probs, request.teacher_tail, spam, spam.bool()
        )
        broken = {"model.norm.weight": torch.full_like(draft.model.norm.weight, 3e38)}
        broken["lm_head.weight"] = torch.full_like(draft.lm_head.weight, 3e38)
        with torch.no_grad():
            assert not loaded(draft, broken)(spam[None]).logits.isfinite().any()
        assert scores(Scorer(draft, MAX_LENGTH, 1), broken, [request]) == [Score(0.0, 0.0, 6)]


@pytest.mark.parametrize("greedy", [True, False])
def test_a_broken_teacher_is_no_score(greedy: bool) -> None:
    """Catches NaN of a target that overflowed: averages would stay NaN, and no drift would be noticed any more."""
    target = tiny_model(seed=1)
    requests = requests_of(target, (4, 6, greedy), (5, 6, greedy))
    broken = replace(requests[0], teacher_log_probs=requests[0].teacher_log_probs * math.nan)
    found = scores(Scorer(target, MAX_LENGTH, 2), {}, [broken, requests[1]])
    assert all(0.0 <= value <= 5.0 for score in found for value in (score.acceptance, score.accepted))
    assert_equal(found[1:], [by_definition(target, requests[1])])


def test_acceptance_of_greedy_and_sampled_rows() -> None:
    """Catches one measure for all rows of a batch, and positions of other rows' padding that count."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator)
    ids = logits.argsort(-1, descending=True)[..., :2]
    batch = {
        "teacher_ids": ids,
        "teacher_log_probs": torch.tensor([0.5, 0.2]).log().expand(2, 3, 2),
        "teacher_tail": torch.full((2, 3), 0.3),
        "learn_mask": torch.tensor([[False, True, True], [True, True, True]]),
        "greedy": torch.tensor([True, False]),
    }
    q = logits.softmax(-1).gather(-1, ids)
    shared = torch.minimum(q, torch.tensor([0.5, 0.2])).sum(-1) + torch.minimum(1 - q.sum(-1), torch.tensor(0.3))
    found = acceptance(logits, batch)
    assert found[0].tolist() == [0.0, 1.0, 1.0]
    assert torch.allclose(found[1], shared[1], atol=1e-6)
    assert acceptance(logits, {**batch, "greedy": torch.tensor([True, True])})[1].tolist() == [1.0, 1.0, 1.0]


@given(
    rates=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12),
    padding=st.integers(0, 4),
    length=st.integers(1, 7),
)
def test_accepted_run_against_brute_force(rates: list[float], padding: int, length: int) -> None:
    """Catches windows that look backwards, wrap around, or count what is behind the end of the output."""
    row = torch.tensor([[0.0] * padding + rates], dtype=torch.float64)
    found = accepted_run(row, length)
    assert found.shape == row.shape
    assert found[0, padding:].tolist() == pytest.approx(runs(rates, length), abs=1e-12)


def test_a_drop_is_one_of_several_requests():
    """Catches an alarm at one bad request, at noise, or never; 1,000 streams of noise give no false alarm here."""
    usual = [0.5, 0.6, 0.55, 0.45] * 7
    assert not has_dropped([*usual, 0.0])
    assert not has_dropped([*usual, 0.4, 0.4, 0.4, 0.4])
    assert has_dropped([*usual, 0.1, 0.15, 0.1, 0.1])
    assert not has_dropped([0.9] * 7 + [0.1] * 4)  # too few to tell what is usual
    draw = random.Random(0)
    assert not any(has_dropped([draw.gauss(0.5, 0.15) for _ in range(32)]) for _ in range(1000))
