"""A stream through several drafts: the router chooses one for each request, which scores it and learns from it."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from hf_osd.drafts.features import FeatureDraft
from hf_osd.learning.online import OnlineLearner
from hf_osd.records import Observation
from hf_osd.routes import Routes
from hf_osd.routing import ByKey, ByLanguage, ByTopic, Prompt, Router

from .recipes import Recipe
from .replay import Score, copied, counters_of, result_of, score

_MOST = 8  # drafts

ROUTERS: dict[str, Callable[[PreTrainedModel, Sequence[str]], Router]] = {
    "key": lambda target, domains: ByKey(),
    "topic": lambda target, domains: ByTopic(),
    "language": lambda target, domains: ByLanguage(AutoTokenizer.from_pretrained(target.name_or_path), domains),
}


def replay_routed(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    requests: Sequence[Observation],
    domains: Sequence[str],
    recipe: Recipe,
) -> dict[str, Any]:
    """
    Run a recipe that has a router over a stream.

    Args:
        draft ([`~transformers.PreTrainedModel`]): Where every route starts; left as it is.
        target ([`~transformers.PreTrainedModel`]): Whose answers these are.
        requests (`Sequence[Observation]`): The recorded stream.
        domains (`Sequence[str]`): The domain of each.
        recipe (`Recipe`): How to learn.

    Returns:
        `dict[str, Any]`: As [`~benchmarks.laboratory.replay.replay`]; counters are those of all drafts together, and
        `"routes"` has their requests by domain, the bytes that each holds, and what its own learner has done.
    """
    started, router = time.perf_counter(), ROUTERS[recipe.router](target, sorted(set(domains)))
    routes = Routes({"first": copied(draft)}, target, recipe.online_config(), router, _MOST)
    scores: list[Score] = []
    seen: dict[str, Counter[str]] = {}
    try:
        for request, domain in zip(requests, domains, strict=True):
            key = domain if recipe.router == "key" else None
            name = routes.route(Prompt(request.prompt_ids, target), key)
            scores.append(_serve(routes, name, request))
            seen.setdefault(name, Counter())[domain] += 1
    finally:
        routes.close()
    about = {
        name: {"requests": dict(seen.get(name, {})), "bytes": held_by(one.learner)} for name, one in routes.items()
    }
    return result_of(
        scores, {**_together(counters_of(one.learner) for one in routes.values()), "routes": about}, started
    )


def _serve(routes: Routes, name: str, request: Observation) -> Score:
    """Score a request by the draft of its route, and have that one learn from it."""
    one = routes[name]
    result, observation = score(one.draft, request)
    one.learner.observe(observation)
    routes.note([name], [(result.agreed, result.positions)])
    if isinstance(one.draft, FeatureDraft):
        one.draft.vocabulary.note(request.output_ids.tolist())
    return result


def _together(counted: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Add up the counters of several learners; their journals stay apart."""
    total: Counter[str] = Counter()
    for one in counted:
        total.update({name: value for name, value in one.items() if isinstance(value, int | float)})
    return {name: round(value, 1) for name, value in total.items() if name != "last_loss"}


def held_by(online: OnlineLearner) -> dict[str, int]:
    """Return the bytes that the draft of a learner, and learning it, hold between updates."""
    learner = online.learner
    if learner is None:
        return {}
    groups, _ = learner.state()
    moments = [value for values in learner.optimizer_state().values() for value in values.values()]
    replay = [getattr(one, name) for one in learner.replay.observations() for name in one.__slots__]
    trained = [weight for weight in learner.student.model.parameters() if weight.requires_grad]
    tensors = {
        "candidates": [tensor for name, group in groups.items() if name != "student" for tensor in group.values()],
        "training": [*learner.student.model.parameters(), *trained, *moments],  # with their gradients
        "replay": replay,
    }
    return {name: sum(_size(one) for one in found) for name, found in tensors.items()}


def _size(value: Any) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else 0
