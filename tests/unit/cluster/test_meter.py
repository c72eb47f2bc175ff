from __future__ import annotations

from scheduler.cluster.meter import Meter
from tests.fakes import Clock


def test_time_goes_to_the_kind_of_the_moment() -> None:
    clock = Clock()
    meter = Meter(clock)
    clock.advance(1.5)
    meter.switch("training")
    clock.advance(2)
    meter.switch("saving")
    clock.advance(0.25)
    meter.switch("training")
    clock.advance(1)

    assert meter.read() == {"loading": 1500, "training": 3000, "saving": 250}


def test_readings_lose_less_than_a_millisecond_a_kind() -> None:
    clock = Clock()
    clock.now = 0.0
    meter = Meter(clock)
    for step in range(1000):
        clock.advance(0.0007)
        meter.switch("training" if step % 2 else "evaluating")
        meter.read()

    assert 697 <= sum(meter.read().values()) <= 700
