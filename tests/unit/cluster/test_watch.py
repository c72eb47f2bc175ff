from __future__ import annotations

import pytest

from scheduler.cluster.watch import Watch
from tests.fakes import Clock

TRAINING = {"type": "phase", "name": "training"}
EVALUATING = {"type": "phase", "name": "evaluating"}
SAVING = {"type": "phase", "name": "saving"}
STEP = {"type": "metrics", "step": 1}
LOG = {"type": "log", "level": "INFO", "message": "hm"}
STORED = {"type": "stored", "step": 1}


def watch(clock: Clock, *, always: bool = False) -> Watch:
    return Watch(hang_floor_s=600, grace_s=20, always=always, clock=clock)


def train(watched: Watch, clock: Clock, steps: int, step_s: float) -> None:
    watched.heard(TRAINING)
    for _ in range(steps):
        clock.advance(step_s)
        watched.heard(STEP)


def verdict(watched: Watch) -> tuple[str, str] | None:
    found = watched.overdue()
    return found and (found.code, found.message)


def is_given_up_after(watched: Watch, clock: Clock, seconds: float) -> str:
    """The message then; nothing a second before."""
    clock.advance(seconds - 1)
    assert watched.overdue() is None
    clock.advance(2)
    found = watched.overdue()
    assert found is not None
    assert found.by_s == pytest.approx(1)
    return f"{found.code}: {found.message}"


def test_hung_after_the_floor_when_steps_are_short() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 10, 1.0)
    assert is_given_up_after(watched, clock, 600) == "HUNG: no training step for 600 s"


def test_long_steps_move_the_deadline() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 10, 60.0)
    assert is_given_up_after(watched, clock, 1200) == "HUNG: no training step for 1200 s"


@pytest.mark.parametrize("noise", [LOG, STORED, "beat"])
def test_while_training_nothing_but_a_step_counts(noise: dict[str, str] | str) -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 10, 1.0)
    for _ in range(12):
        clock.advance(50)
        watched.beat() if isinstance(noise, str) else watched.heard(noise)
    clock.advance(1)
    assert verdict(watched) == ("HUNG", "no training step for 600 s")


@pytest.mark.parametrize(("phase", "name"), [(EVALUATING, "evaluating"), (SAVING, "saving")])
def test_evaluating_and_saving_hang_when_they_give_no_sign(phase: dict[str, str], name: str) -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 3, 1.0)
    watched.heard(phase)
    for _ in range(100):
        clock.advance(599)
        watched.beat()
    clock.advance(599)
    watched.heard(LOG)
    watched.heard(STORED)
    assert is_given_up_after(watched, clock, 600) == f"HUNG: no sign of work for 600 s while {name}"


def test_loading_hangs_when_it_gives_no_sign_for_an_hour() -> None:
    clock = Clock()
    watched = watch(clock)
    clock.advance(100_000)
    watched.begin()
    clock.advance(3599)
    watched.beat()
    assert is_given_up_after(watched, clock, 3600) == "HUNG: no sign of work for 3600 s while loading"


def test_a_new_phase_begins_anew() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 3, 1.0)
    watched.heard(EVALUATING)
    clock.advance(599)
    watched.heard(TRAINING)
    assert is_given_up_after(watched, clock, 600) == "HUNG: no training step for 600 s"


def test_a_verdict_is_always_watched() -> None:
    clock = Clock()
    watched = watch(clock, always=True)
    watched.heard({"type": "progress", "percent": 10})
    assert is_given_up_after(watched, clock, 600).startswith("HUNG")


@pytest.mark.parametrize("phase", [None, TRAINING, EVALUATING, SAVING])
def test_whoever_is_deaf_has_the_grace_in_any_phase(phase: dict[str, str] | None) -> None:
    clock = Clock()
    watched = watch(clock)
    if phase:
        watched.heard(phase)
    watched.stopping()
    watched.heard(LOG)
    watched.beat()
    late = "its checkpoint was not stored" if phase is SAVING else "the trainer did not stop"
    told = f"UNRESPONSIVE: {late} within 20 s" + (" of being asked to" if phase is not SAVING else "")
    assert is_given_up_after(watched, clock, 20) == told


def test_saving_and_storing_have_one_grace_together() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 3, 1.0)
    watched.stopping()
    clock.advance(19)
    watched.heard(STEP)
    watched.heard(EVALUATING)
    watched.heard(SAVING)
    clock.advance(10)
    watched.heard(STORED)
    watched.heard(EVALUATING)
    watched.heard(SAVING)
    assert is_given_up_after(watched, clock, 10) == "UNRESPONSIVE: its checkpoint was not stored within 20 s"


def test_who_is_asked_while_it_saves_has_no_step_to_end() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 3, 60.0)
    watched.heard(SAVING)
    clock.advance(30)
    watched.stopping()
    assert is_given_up_after(watched, clock, 20) == "UNRESPONSIVE: its checkpoint was not stored within 20 s"


def test_asking_again_does_not_prolong_the_grace() -> None:
    clock = Clock()
    watched = watch(clock)
    watched.stopping()
    clock.advance(15)
    watched.stopping()
    clock.advance(6)
    assert watched.overdue() is not None


def test_a_long_step_is_waited_for() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 5, 30.0)
    watched.stopping()
    assert "within 90 s" in is_given_up_after(watched, clock, 90)


def test_the_earlier_deadline_counts() -> None:
    clock = Clock()
    watched = watch(clock)
    train(watched, clock, 3, 1.0)
    clock.advance(590)
    watched.stopping()
    assert is_given_up_after(watched, clock, 10).startswith("HUNG")
