from __future__ import annotations

from scheduler.cluster.watch import Watch
from tests.fakes import Clock

TRAINING = {"type": "phase", "name": "training"}
STEP = {"type": "metrics", "step": 1}


def watch(clock: Clock, *, always: bool = False) -> Watch:
    return Watch(hang_floor_s=600, grace_s=25, always=always, clock=clock)


def train(watched: Watch, clock: Clock, steps: int, step_s: float) -> None:
    watched.heard(TRAINING)
    for _ in range(steps):
        clock.advance(step_s)
        watched.heard(STEP)


def test_hung_after_the_floor_when_steps_are_short() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 10, 1.0)

    clock.advance(599)
    assert watched.overdue() is None
    clock.advance(2)
    assert watched.overdue() == ("HUNG", "no training step for 600 s")


def test_long_steps_move_the_deadline() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 10, 60.0)

    clock.advance(1199)
    assert watched.overdue() is None
    clock.advance(2)
    assert watched.overdue() == ("HUNG", "no training step for 1200 s")


def test_loading_and_evaluating_have_no_deadline() -> None:
    clock = Clock()
    watched = watch(clock)
    clock.advance(10_000)
    assert watched.overdue() is None
    train(watched, clock, 3, 1.0)
    watched.heard({"type": "phase", "name": "evaluating"})
    clock.advance(10_000)
    assert watched.overdue() is None
    watched.heard(TRAINING)
    assert watched.overdue() is None


def test_a_verdict_is_always_watched() -> None:
    clock = Clock()
    watched = watch(clock, always=True)
    watched.heard({"type": "progress", "percent": 10})
    clock.advance(601)
    assert watched.overdue() == ("HUNG", "no training step for 600 s")


def test_unresponsive_after_the_grace_unless_it_shows_that_it_saves() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 3, 1.0)
    watched.stopping()
    clock.advance(24)
    watched.heard(STEP)
    assert watched.overdue() is None
    watched.heard({"type": "phase", "name": "saving"})
    clock.advance(24)
    assert watched.overdue() is None
    clock.advance(2)
    found = watched.overdue()
    assert found is not None
    assert found[0] == "UNRESPONSIVE"


def test_asking_again_does_not_prolong_the_grace() -> None:
    clock = Clock()
    watched = watch(clock)
    watched.stopping()
    clock.advance(20)
    watched.stopping()
    clock.advance(6)
    assert watched.overdue() is not None


def test_a_long_step_is_waited_for() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 5, 30.0)
    watched.stopping()
    clock.advance(89)
    assert watched.overdue() is None
