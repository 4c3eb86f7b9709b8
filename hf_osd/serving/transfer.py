"""From host to device without making the host wait."""

from collections.abc import Sequence

import torch


def upload(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return integers as a tensor on a device; a copy from pageable memory would wait for the queue to drain."""
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
