"""Times of a round's stages, on a clock that the tests turn by hand."""

import pytest
import torch

from hf_osd.serving import stopwatch
from hf_osd.serving.stopwatch import Stopwatch

CPU = torch.device("cpu")


class Clock:
    """A clock that shows the next of some readings."""

    def __init__(self, *readings):
        self.readings = list(readings)

    def perf_counter(self):
        return self.readings.pop(0)


def test_stages_add_up_within_a_round_and_over_rounds(monkeypatch):
    """Catches laps counted from the start, a stage that overwrites its earlier lap, and time between two rounds."""
    monkeypatch.setattr(stopwatch, "time", Clock(1.0, 1.5, 3.5, 3.75, 4.0, 100.0, 108.0))
    watch = Stopwatch(CPU)
    watch.start()
    for stage in ("draft", "verify", "", "draft"):
        watch.lap(stage)
    assert watch.finish() == {"draft": 0.75, "verify": 2.0, "": 0.25}
    watch.start()
    watch.lap("verify")
    assert watch.finish() == {"verify": 8.0}
    assert watch.totals == {"draft": 0.75, "verify": 10.0, "": 0.25}


def test_a_round_without_a_stage():
    """Catches a round that ends before anything was timed."""
    watch = Stopwatch(CPU)
    watch.start()
    assert watch.finish() == {}


class FakeEvent(torch.Event):
    """An event of a device that is not here: it knows its number, and whether anybody waited for it."""

    made = 0

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, device, enable_timing):
        assert enable_timing
        self.waited = False

    def record(self):
        self.number, FakeEvent.made = FakeEvent.made, FakeEvent.made + 1

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        return 1000.0 * (end.number**2 - self.number**2)


@pytest.mark.parametrize("devices", [["cuda:0"], ["cuda:0", "cuda:0"]])
def test_on_an_accelerator_only_the_last_event_is_waited_for(devices, monkeypatch):
    """Catches a stopwatch that makes the host wait inside a round, or takes milliseconds for seconds."""
    FakeEvent.made = 0
    monkeypatch.setattr(torch, "Event", FakeEvent)
    watch = Stopwatch(*map(torch.device, devices))
    watch.start()
    watch.lap("draft")
    watch.lap("verify")
    marks = [event for _, event in watch._marks]
    assert not any(event.waited for event in marks)
    assert watch.finish() == {"draft": 1.0, "verify": 3.0}
    assert [event.waited for event in marks] == [False, False, True]


def test_two_devices_are_timed_by_the_clock(monkeypatch):
    """Catches events of one device that are meant to time the other."""
    monkeypatch.setattr(stopwatch, "time", Clock(1.0, 2.0))
    watch = Stopwatch(CPU, torch.device("cuda:0"))
    watch.start()
    watch.lap("draft")
    assert watch.finish() == {"draft": 1.0}
