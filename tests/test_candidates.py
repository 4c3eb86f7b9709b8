"""The weights that could be live."""

import torch

from hf_osd.learning.candidates import ALPHAS, Candidates, Checkpoint
from hf_osd.learning.selector import STATIC


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((2, 3), value)}


def scored(candidates: Candidates, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    return {name: found["layer.weight"].mean().item() for name, found in candidates.to_score(dtype).items()}


def test_what_is_scored_follows_what_is_learned() -> None:
    """Catches scores of the weights from before an update, a new beginning or a saved state."""
    candidates = Candidates(Checkpoint.of(weights(0.0), weights(0.0)), size=1)
    assert scored(candidates) == {STATIC: 0.0}
    candidates.follow(weights(4.0))
    assert scored(candidates) == {STATIC: 0.0, "half": 2.0, "whole": 4.0}
    groups, numbers = candidates.state()
    candidates.follow(weights(1.0))  # the second of two counts for 2/3 of the average
    assert scored(candidates) == {STATIC: 0.0, "half": 1.0, "whole": 2.0}
    candidates.restart(weights(8.0))
    assert scored(candidates) == {STATIC: 0.0, "half": 4.0, "whole": 8.0}
    candidates.load_state(groups, numbers)
    assert scored(candidates) == {STATIC: 0.0, "half": 2.0, "whole": 4.0}


def test_learned_weights_are_cast_once_for_each_update() -> None:
    """Catches casts and averages that are made again for each request, which took half of the time of scoring."""
    candidates = Candidates(Checkpoint.of(weights(0.0), weights(0.0)), size=1)
    candidates.follow(weights(3.0))
    first, second = (candidates.to_score(torch.bfloat16) for _ in range(2))
    for name in ALPHAS:
        assert first[name] is second[name]
        assert first[name]["layer.weight"].dtype == torch.bfloat16
    assert candidates.weights("half")["layer.weight"].dtype == torch.float32  # what goes live
