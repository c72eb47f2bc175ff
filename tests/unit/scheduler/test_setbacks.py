"""How long work that cannot be dispatched stands aside."""

from __future__ import annotations

import pytest

from scheduler.setbacks import Setbacks


def test_each_time_for_twice_as_long_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    setbacks = Setbacks()
    for pause_s in (5.0, 10.0, 20.0, 30.0, 30.0):
        setbacks.note("a", "refused", first_s=5, longest_s=30)
        now += pause_s - 0.1
        assert setbacks.current(["a", "b"]) == {"a": "refused"}
        now += 0.1
        assert setbacks.current(["a", "b"]) == {}


def test_work_that_waits_no_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    setbacks = Setbacks()
    for _ in range(4):
        setbacks.note("a", "refused", first_s=5, longest_s=600)
    assert setbacks.current([]) == setbacks.current(["a"]) == {}
    setbacks.note("a", "refused", first_s=5, longest_s=600)
    now = 5.0
    assert setbacks.current(["a"]) == {}
