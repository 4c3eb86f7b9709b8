"""What becomes of a request before learning keeps it."""

from dataclasses import replace

import torch

from ..records import Observation


def usable(observation: Observation) -> Observation | None:
    """
    Return a request as it can be learned from, `None` where it has no output or would fail every update.

    Args:
        observation (`Observation`): The request. Tensors that were made in inference mode are copied: outside of it
            they may not be written to.
    """
    if observation.output_ids.numel() == 0 or _is_poisoned(observation):
        return None
    fields = {name: getattr(observation, name) for name in observation.__slots__}
    with torch.inference_mode(False):
        copies = {
            name: tensor.clone() for name, tensor in fields.items() if tensor is not None and tensor.is_inference()
        }
    return replace(observation, **copies) if copies else observation


def _is_poisoned(observation: Observation) -> bool:
    """Whether its teacher is none: no probabilities, within rounding."""
    log_probs, tail = observation.teacher_log_probs, observation.teacher_tail
    return not bool((log_probs <= 1e-3).all() and (tail >= 0.0).all() and (tail <= 1.0 + 1e-3).all())
