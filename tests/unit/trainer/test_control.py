from __future__ import annotations

import pytest

from trainer import control
from trainer.control import BEAT_S, StopRequest
from trainer.errors import Stopped


def test_work_that_asks_often_beats_now_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(control.time, "monotonic", lambda: clock[0])
    beats = []
    stop = StopRequest()
    stop.beat = lambda: beats.append(clock[0])
    for _ in range(100):
        clock[0] += 1
        stop.check()
    assert beats == [16, 32, 48, 64, 80, 96]


def test_what_must_be_brought_to_its_end_beats_but_cannot_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(control.time, "monotonic", lambda: clock[0])
    beats = []
    stop = StopRequest()
    stop.beat = lambda: beats.append(clock[0])
    deaf = stop.deaf()
    stop.ask("CANCEL")
    with pytest.raises(Stopped):
        stop.check()
    clock[0] = BEAT_S + 1
    deaf.check()
    assert beats == [BEAT_S + 1]
