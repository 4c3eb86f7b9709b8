"""How integers reach a device without making the host wait, and in which precision autocast computes there."""

from collections.abc import Sequence

import torch


def upload(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return integers as a tensor on a device; a copy from pageable memory would wait for the queue to drain."""
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast computes in on a device here and now; `None` where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
