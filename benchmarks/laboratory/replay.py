"""A stream through a recipe: each request is scored by the live draft before the draft learns from it."""

import copy
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_osd.config import OnlineConfig
from hf_osd.drafts.features import FeatureDraft
from hf_osd.learning.features import reader_of
from hf_osd.learning.losses import overlap
from hf_osd.learning.online import OnlineLearner
from hf_osd.learning.scoring import accepted_run
from hf_osd.records import Observation
from hf_osd.serving.weights import LiveWeights

from .recipes import Recipe

_COUNTERS = ("updates", "failures", "steps", "positions", "last_loss")


@dataclass(frozen=True, slots=True)
class Score:
    """
    One request in numbers, each summed over the positions of its output.

    Attributes:
        positions (`int`): Tokens of the output.
        agreed (`int`): How many of them are the draft's first choice after the tokens before them.
        overlap (`float`): Probability that a token sampled from the draft is accepted: the sum of min(p, q).
        run (`int`): Tokens that a round of [`~hf_osd.learning.scoring.PROPOSAL_LENGTH`] greedily drafted ones, started
            there, has accepted.
    """

    positions: int
    agreed: int
    overlap: float
    run: int


@torch.no_grad()
def score(draft: PreTrainedModel, request: Observation) -> tuple[Score, Observation]:
    """
    Compare the draft's choices with a recorded answer, every position after the tokens that really came before.

    The measures are those of the learner's own [`~hf_osd.learning.scoring.Scorer`], which keeps no choices.

    Args:
        draft ([`~transformers.PreTrainedModel`]): The live draft.
        request (`Observation`): A recorded request.

    Returns:
        `tuple[Score, Observation]`: The score, and the request as serving would record it where it drafts everywhere.
    """
    count, reader = len(request.output_ids), reader_of(draft)
    collate = reader.collator(len(request.prompt_ids) + count, "all")
    collate.context = len(request.prompt_ids)  # all of it, as in serving
    batch = collate([request])
    logits = reader.logits(draft, batch)[0].float()  # (output, vocab)
    choices = logits.argmax(-1)
    if "vocabulary" in batch:  # what the draft proposes from
        choices = batch["vocabulary"][choices]
    agreed = choices == request.output_ids
    shared = overlap(logits, *(batch[f"teacher_{name}"][0] for name in ("ids", "log_probs", "tail")))
    result = Score(count, int(agreed.sum()), float(shared.sum()), int(accepted_run(agreed[None].float()).sum()))
    return result, replace(request, draft_ids=choices, accepted=agreed)


def replay(draft: PreTrainedModel, requests: Sequence[Observation], recipe: Recipe) -> dict[str, Any]:
    """
    Run a recipe over a stream.

    Args:
        draft ([`~transformers.PreTrainedModel`]): Where it starts; left as it is.
        requests (`Sequence[Observation]`): The recorded stream.
        recipe (`Recipe`): How to learn.

    Returns:
        `dict[str, Any]`: For each request, in order, the numbers of `Score`; the counters of the learner; seconds.
    """
    started = time.perf_counter()
    live = copied(draft)
    weights = LiveWeights(live)  # kept here: the learner publishes through it
    run = _train_then_score if recipe.epochs else _score_then_learn
    scores, learned = run(live, weights, requests, recipe)
    return result_of(scores, learned, started)


def result_of(scores: Sequence[Score], learned: dict[str, Any], started: float) -> dict[str, Any]:
    """Return a run that began at `started` as it is kept: see [`replay`]."""
    columns = {name: [round(getattr(one, name), 4) for one in scores] for name in Score.__slots__}
    return {"scores": columns, "learned": learned, "seconds": round(time.perf_counter() - started, 1)}


def copied(draft: PreTrainedModel) -> PreTrainedModel:
    """Copy a draft, with a vocabulary of its own that has seen no traffic."""
    live = copy.deepcopy(draft).eval()
    if isinstance(live, FeatureDraft):
        assert live.target is not None
        live.borrow(live.target)
    return live


def _learner(live: PreTrainedModel, weights: LiveWeights, config: OnlineConfig) -> OnlineLearner:
    return OnlineLearner(live, config, lambda parameters, acceptance: weights.publish(parameters))


def _score_then_learn(
    live: PreTrainedModel, weights: LiveWeights, requests: Iterable[Observation], recipe: Recipe
) -> tuple[list[Score], dict[str, Any]]:
    config = recipe.online_config()
    learner = _learner(live, weights, config)
    scores = []
    try:
        for request in requests:
            result, observation = score(live, request)
            scores.append(result)
            if config.learn:
                learner.observe(observation)
            if isinstance(live, FeatureDraft):
                live.vocabulary.note(request.output_ids.tolist())
    finally:
        learner.close()
    return scores, counters_of(learner)


def _train_then_score(
    live: PreTrainedModel, weights: LiveWeights, requests: Sequence[Observation], recipe: Recipe
) -> tuple[list[Score], dict[str, Any]]:
    """All of the stream goes into the buffer; one long update draws as many batches as make up the epochs."""
    size = recipe.online_config().batch_size
    steps = max(1, math.ceil(recipe.epochs * len(requests) / size))
    falling = steps // 3
    schedule = {"num_stable_steps": steps - falling, "num_decay_steps": max(falling, 1), "decay_type": "linear"}
    config = recipe.online_config(
        replay_size=len(requests),
        update_every=len(requests) + 1,  # none before the one that is asked for
        steps_per_update=steps,
        training_arguments={"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": schedule},
    )
    learner = _learner(live, weights, config)
    try:
        for request in requests:
            learner.observe(score(live, request)[1])
        with warnings.catch_warnings():  # the trainer's own number of steps, which stands for no end, is not used
            warnings.filterwarnings("ignore", "Both num_training_steps")
            learner.update()
    finally:
        learner.close()
    return [score(live, request)[0] for request in requests], counters_of(learner)


def counters_of(learner: OnlineLearner) -> dict[str, Any]:
    """Return what a learner has done, ready for JSON."""
    journal = learner.journal.to_dict()
    return (
        {name: getattr(learner.counters, name) for name in _COUNTERS}
        | {"seconds": round(learner.counters.seconds, 1)}
        | {"journal": {name: journal[name] for name in ("updates", "drifts")}}
    )
