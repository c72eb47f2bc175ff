"""Decisions, without a database or a cluster."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import pytest

from control_plane.states import StopReason, WorkKind
from scheduler.executor import Demand, Liveness, Look
from scheduler.policy import (
    Action,
    AskStop,
    DeclareFault,
    Dispatch,
    EndByForce,
    Follow,
    Held,
    Release,
    SetQueueReason,
    SetReconnecting,
    Snapshot,
    Start,
    Waiting,
    Withdraw,
    decide,
)

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
SLOT = Demand(resources={"slot_cpu": 1})
LOOK = Look(reachable=True, cluster_id="c1", total={"slot_cpu": 1.0, "slot_io": 2.0, "GPU": 8.0})
AWAY = Look(reachable=False)


def job(name: str, **fields: Any) -> Waiting:
    values: dict[str, Any] = {"demand": SLOT, "priority": 0, "queued_at": NOW}
    return Waiting(kind=WorkKind.JOB, work_id=name, **{**values, **fields})


def verdict(name: str) -> Waiting:
    demand = Demand(resources={"slot_io": 1}, metered=False)
    return replace(job(name, demand=demand), kind=WorkKind.VERDICT)


def held(name: str, **fields: Any) -> Held:
    values: dict[str, Any] = {"demand": SLOT, "cluster_id": "c1"}
    return Held(WorkKind.JOB, name, f"attempt of {name}", f"{name}/1", **{**values, **fields})


def plan(
    *waiting: Waiting, held: tuple[Held, ...] = (), look: Look = LOOK, now: datetime = NOW, **rest: Any
) -> list[Action]:
    return decide(Snapshot(waiting, held, look, **rest), now)


def with_actors(**actors: Liveness) -> Look:
    named = {f"{name}/1": liveness for name, liveness in actors.items()}
    return Look(True, "c1", named, total=LOOK.total)


def test_the_queue_goes_by_priority_then_age() -> None:
    first, second = job("b", priority=5), job("a", queued_at=NOW - timedelta(hours=1))
    assert plan(second, first)[0] == Dispatch(WorkKind.JOB, "b")
    assert plan(job("young"), second)[0] == Dispatch(WorkKind.JOB, "a")


def test_every_waiting_job_gets_a_reason_once() -> None:
    actions = plan(job("a"), job("b", queued_at=NOW + timedelta(seconds=1)))
    assert actions[0] == Dispatch(WorkKind.JOB, "a")
    assert isinstance(actions[1], SetQueueReason)
    assert "slot_cpu" in actions[1].reason
    again = plan(job("a"), job("b", queued_at=NOW + timedelta(seconds=1), reason=actions[1].reason))
    assert again == [Dispatch(WorkKind.JOB, "a")]


def test_training_never_blocks_verdicts() -> None:
    look = with_actors(running=Liveness.ALIVE)
    actions = plan(job("a"), verdict("v1"), verdict("v2"), verdict("v3"), held=(held("running"),), look=look)
    assert {a.work_id for a in actions if isinstance(a, Dispatch)} == {"v1", "v2"}
    assert {a.work_id for a in actions if isinstance(a, SetQueueReason)} == {"a", "v3"}


def test_what_an_ended_attempt_has_not_released_is_not_free() -> None:
    actions = plan(job("a"), held=(held("done", ended=True),))
    assert Release("done/1", "attempt of done") in actions
    assert not any(isinstance(action, Dispatch) for action in actions)


def test_while_an_attempt_may_hold_something_yet_the_next_waits_and_says_why() -> None:
    waiting, release = job("a"), Release("a/1", "attempt of a")
    roomy = Look(True, "c1", total={"slot_cpu": 2.0})
    told = SetQueueReason(WorkKind.JOB, "a", "Waits until nothing is left of its last attempt")
    assert plan(waiting, held=(held("a", ended=True),), look=roomy) == [release, told]
    assert plan(waiting, held=(held("b", ended=True),), look=roomy)[-1] == Dispatch(WorkKind.JOB, "a")
    assert plan(waiting, look=roomy) == [Dispatch(WorkKind.JOB, "a")]


def test_a_gang_is_not_overtaken_by_those_behind_it() -> None:
    gang = job("gang", demand=Demand(resources={}, num_gpus=1, ranks=8), priority=1)
    small = job("small", demand=Demand(resources={}, num_gpus=1))
    other = job("other")
    running = held("running", demand=Demand(resources={}, num_gpus=1))
    actions = plan(gang, small, other, held=(running,), look=with_actors(running=Liveness.ALIVE))
    assert [a.work_id for a in actions if isinstance(a, Dispatch)] == ["other"]


def test_what_the_cluster_could_never_hold_blocks_nobody() -> None:
    giant = job("giant", demand=Demand(resources={"slot_cpu": 4}), priority=9)
    rare = job("rare", demand=Demand(resources={}, num_gpus=1, labels={"ray.io/accelerator-type": "H200"}), priority=9)
    actions = plan(giant, rare, job("a"))
    reasons = {a.work_id: a.reason for a in actions if isinstance(a, SetQueueReason)}
    assert Dispatch(WorkKind.JOB, "a") in actions
    assert "has 1 slot_cpu, 4 needed" in reasons["giant"]
    assert "H200" in reasons["rare"]


@pytest.mark.parametrize(
    ("waiting", "rest", "told"),
    [
        (job("a", not_before=NOW + timedelta(seconds=9)), {}, "12:00:09"),
        (job("a"), {"look": AWAY}, "cannot be reached"),
        (job("a", needs_tracking=True), {"tracking_problem": "MLflow is away"}, "MLflow is away"),
        (job("a", demand=None, blocked="No such GPU type"), {}, "No such GPU type"),
    ],
)
def test_what_stands_in_the_way_is_said(waiting: Waiting, rest: dict[str, Any], told: str) -> None:
    (action,) = plan(waiting, **rest)
    assert isinstance(action, SetQueueReason)
    assert told in action.reason


def test_an_mlflow_outage_keeps_nothing_that_has_a_run() -> None:
    actions = plan(job("a"), tracking_problem="MLflow is away")
    assert actions == [Dispatch(WorkKind.JOB, "a")]


def test_a_setback_is_its_own_and_is_told() -> None:
    actions = plan(job("a"), job("b"), setbacks={"a": "MLflow refuses it"})
    assert actions == [SetQueueReason(WorkKind.JOB, "a", "MLflow refuses it"), Dispatch(WorkKind.JOB, "b")]


def test_a_pause_after_a_fault_ends() -> None:
    assert plan(job("a", not_before=NOW - timedelta(seconds=1))) == [Dispatch(WorkKind.JOB, "a")]


def test_a_clock_that_was_set_back_prolongs_no_pause() -> None:
    assert plan(job("a", not_before=NOW + timedelta(hours=1))) == [Dispatch(WorkKind.JOB, "a")]


def test_an_attempt_that_the_cluster_never_saw_is_started_again() -> None:
    assert plan(held=(held("a", cluster_id=None),)) == [Start("a", "attempt of a")]


@pytest.mark.parametrize("change", [{"stop_requested": StopReason.CANCEL}, {"demand": None}])
def test_unless_it_is_not_wanted_or_not_offered_any_more(change: dict[str, Any]) -> None:
    never_seen = held("a", cluster_id=None, **change)
    assert plan(held=(never_seen,)) == [Withdraw("a", "attempt of a")]


def test_an_attempt_that_nobody_noted_is_adopted() -> None:
    actions = plan(held=(held("a", cluster_id=None),), look=with_actors(a=Liveness.ALIVE))
    assert actions == [Follow("attempt of a", "a/1", adopt=True)]


@pytest.mark.parametrize(
    ("cluster_id", "look", "code"),
    [
        ("c1", with_actors(a=Liveness.DEAD), "SUPERVISOR_DIED"),
        (None, with_actors(a=Liveness.DEAD), "SUPERVISOR_DIED"),
        ("c1", LOOK, "SUPERVISOR_LOST"),
        ("c0", LOOK, "CLUSTER_LOST"),
    ],
)
def test_confirmed_death_is_a_fault(cluster_id: str | None, look: Look, code: str) -> None:
    (action,) = plan(held=(held("a", cluster_id=cluster_id),), look=look)
    assert isinstance(action, DeclareFault)
    assert action.code == code


@pytest.mark.parametrize("look", [AWAY, with_actors(a=Liveness.UNKNOWN)])
def test_unknown_is_not_dead(look: Look) -> None:
    assert plan(held=(held("a"),), look=look) == [SetReconnecting(WorkKind.JOB, "a", "a/1", True)]
    assert plan(held=(held("a", reconnecting=True),), look=look) == []


def test_what_answers_again_reconnects() -> None:
    actions = plan(held=(held("a", reconnecting=True),), look=with_actors(a=Liveness.ALIVE))
    assert SetReconnecting(WorkKind.JOB, "a", "a/1", False) in actions


def test_a_stop_is_asked_until_it_is_heard() -> None:
    stopping = held("a", stop_requested=StopReason.PAUSE)
    look = with_actors(a=Liveness.ALIVE)
    assert AskStop("a/1", StopReason.PAUSE) in plan(held=(stopping,), look=look)
    asked = frozenset({("a/1", StopReason.PAUSE)})
    assert plan(held=(stopping,), look=look, asked=asked) == [Follow("attempt of a", "a/1", adopt=False)]


def test_supervisors_that_belong_to_nothing_are_released() -> None:
    look = with_actors(stray=Liveness.ALIVE, old=Liveness.DEAD)
    assert plan(look=look) == [Release("stray/1")]


def test_nothing_is_released_while_the_cluster_is_away() -> None:
    assert plan(held=(held("a", ended=True),), look=AWAY) == []


@pytest.mark.parametrize(
    ("known_s", "cluster_id", "expected"),
    [
        (89.0, "c0", [SetReconnecting(WorkKind.JOB, "a", "a/1", True)]),
        (90.0, "c0", [DeclareFault("attempt of a", "a/1", "CLUSTER_LOST", mock.ANY)]),
        (89.0, None, []),
        (90.0, None, [Start("a", "attempt of a")]),
        (0.0, "c1", [DeclareFault("attempt of a", "a/1", "SUPERVISOR_LOST", mock.ANY)]),
    ],
)
def test_nodes_may_outlive_their_cluster_for_a_while(
    known_s: float, cluster_id: str | None, expected: list[Action]
) -> None:
    """Whatever may run on them yet is neither lost nor started again."""
    lost = held("a", cluster_id=cluster_id)
    assert plan(held=(lost,), known_s=known_s, node_timeout_s=90.0) == expected
    away = plan(held=(replace(lost, reconnecting=True),), look=AWAY, known_s=known_s, node_timeout_s=90.0)
    assert not any(isinstance(action, DeclareFault | Start) for action in away)


def test_while_nodes_may_live_on_their_jobs_place_is_not_given_away() -> None:
    actions = plan(job("b"), held=(held("a", cluster_id="c0"),), known_s=1.0, node_timeout_s=90.0)
    assert not any(isinstance(action, Dispatch) for action in actions)


@pytest.mark.parametrize(
    ("silent_s", "stop", "expected"),
    [
        (14, None, [Follow]),
        (16, None, [Follow, SetReconnecting]),
        (599, None, [Follow, SetReconnecting]),
        (601, None, [EndByForce]),
        (9, StopReason.CANCEL, [Follow, AskStop]),
        (11, StopReason.CANCEL, [EndByForce]),
    ],
)
def test_who_answers_nothing_is_ended_though_it_is_called_alive(
    silent_s: float, stop: StopReason | None, expected: list[type]
) -> None:
    """Late, as it may be training on: but soon when it is to stop."""
    look = with_actors(a=Liveness.ALIVE)
    actions = plan(held=(held("a", stop_requested=stop),), look=look, silent_s={"a/1": silent_s})
    assert [type(action) for action in actions] == expected


def test_who_answers_nothing_beyond_its_allowance_is_not_waited_for_as_long() -> None:
    running, look = held("a", reconnecting=True), with_actors(a=Liveness.ALIVE)
    for silent_s, spent, ended in ((119, {"a/1"}, False), (121, {"a/1"}, True), (121, {"b/1"}, False)):
        actions = plan(held=(running,), look=look, silent_s={"a/1": silent_s}, spent=frozenset(spent))
        assert (EndByForce("a/1") in actions) is ended


def test_silence_says_nothing_while_the_cluster_is_away() -> None:
    actions = plan(held=(held("a", reconnecting=True),), look=AWAY, silent_s={"a/1": 1000.0})
    assert actions == []
