"""How long the stages of a round take, without making the host wait inside one."""

import time
from collections import Counter

import torch

STAGES = ("draft", "verify", "accept", "record")  # whatever else a request spends is bookkeeping


class Stopwatch:
    """
    Times consecutive stages.

    On the CPU it reads the clock. On an accelerator it leaves events in the device's queue and reads them when the
    round is over, so that timing a stage does not wait for it.

    Args:
        devices (`torch.device`): Where the stages run. On several devices the clock is read: moving a proposal from
            one to the other waits anyway.

    Attributes:
        totals (`Counter[str]`): Seconds by stage, over all finished rounds.
    """

    def __init__(self, *devices: torch.device) -> None:
        asynchronous = len(set(devices)) == 1 and devices[0].type != "cpu"
        self._device = devices[0] if asynchronous else None
        self._marks: list[tuple[str, float | torch.Event]] = []
        self.totals: Counter[str] = Counter()

    def start(self) -> None:
        """Begin a round."""
        self._marks = [("", self._now())]

    def lap(self, stage: str) -> None:
        """End a stage: what passed since the last lap was its time."""
        self._marks.append((stage, self._now()))

    def finish(self) -> dict[str, float]:
        """End the round; its seconds by stage."""
        seconds: dict[str, float] = {}
        last = self._marks[-1][1]
        if isinstance(last, torch.Event):
            last.synchronize()
        for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False):
            seconds[stage] = seconds.get(stage, 0.0) + _elapsed(before, after)
        self.totals.update(seconds)
        return seconds

    def _now(self) -> float | torch.Event:
        if self._device is None:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event


def _elapsed(before: float | torch.Event, after: float | torch.Event) -> float:
    if isinstance(before, torch.Event) and isinstance(after, torch.Event):
        return float(before.elapsed_time(after)) / 1e3
    assert isinstance(before, float)
    assert isinstance(after, float)
    return after - before
