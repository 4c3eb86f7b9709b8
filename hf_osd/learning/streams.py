"""A CUDA stream for the training thread. Not covered: several devices, and accelerators that are not CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingStream:
    """
    A CUDA stream of the lowest priority for training, apart from the default stream of the device, which serves.

    Only weights are shared between the two: the draft that is copied, the target of a re-run teacher, and what is
    published. Each hand-over is ordered on the device; neither host thread waits for it.

    Args:
        device (`torch.device`): Of the draft. Other kinds than CUDA have no streams, and nothing happens.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream, self._serving = None, None
        if device.type == "cuda":
            # 0 is CUDA's lowest; serving goes first where its own stream has a higher one, and shares otherwise.
            self._stream = torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]
            self._serving = torch.cuda.default_stream(device)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that the clock shows it."""
        if self._stream is not None:
            self._stream.synchronize()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Train here: after what serving was given so far, and done with everything on leaving."""
        if self._stream is None or self._serving is None:
            yield
            return
        self._stream.wait_stream(self._serving)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._stream.synchronize()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Copy weights in the order of serving: after the rounds that read the old ones, before those to come."""
        if self._stream is None or self._serving is None:
            yield
            return
        self._serving.wait_stream(self._stream)
        with torch.cuda.stream(self._serving):
            yield
        self._stream.wait_stream(self._serving)  # the next step writes what was copied
