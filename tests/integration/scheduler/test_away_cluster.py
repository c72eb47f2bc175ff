"""The cluster is away, or another one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from control_plane.states import Status
from control_plane.tables import (
    Attempt,
    ClusterState,
)
from scheduler.executor import AttemptSpec, Demand, Look, Unreachable
from scheduler.loop import ClusterLost
from tests.integration.scheduler.conftest import House
from tests.integration.scheduler.looking import rows


async def test_a_new_cluster_means_that_the_old_attempt_is_lost(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        await house.until_heard(name)
        house.executor.new_cluster()
        await house.until_running(job_id, 2)
        await house.until("the note", lambda: rows(house, Attempt, Attempt.cluster_id == "cluster-2"))
    first, second = await house.attempts(job_id)
    assert (first.exit_reason, first.cluster_id, second.number) == ("CLUSTER_LOST", "cluster-1", 2)


async def test_while_the_cluster_is_away_nothing_fails(house: House) -> None:
    running, waiting = await house.new_job(), await house.new_job()
    async with house.scheduling():
        name = await house.until_running(running)
        await house.until_heard(name)
        house.executor.reachable = False

        async def shown() -> bool:
            (state,) = await rows(house, ClusterState)
            told = (await house.job(waiting)).queue_reason
            return (await house.job(running)).reconnecting and not state.reachable and "reached" in (told or "")

        await house.until("reconnecting", shown)
        assert (await house.job(running)).status is Status.RUNNING
        house.executor.reachable = True

        async def back() -> bool:
            return not (await house.job(running)).reconnecting

        await house.until("connected", back)
        house.complete(name)
        await house.until_job(running, "COMPLETED")
        await house.until_running(waiting)
    assert len(await house.attempts(running)) == 1


async def test_a_driver_whose_cluster_stays_away_ends(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.loop.CLUSTER_PATIENCE_S", 0.1)
    task = asyncio.create_task(house.scheduler().run(asyncio.Event()))
    await house.until("a look", lambda: rows(house, ClusterState, ClusterState.reachable))
    house.executor.reachable = False
    with pytest.raises(ClusterLost):
        await asyncio.wait_for(task, 10)
    assert not await rows(house, ClusterState, ClusterState.reachable)
    house.executor.reachable = True
    async with house.scheduling():
        await house.until("a look", lambda: rows(house, ClusterState, ClusterState.reachable))


async def test_one_that_has_connected_and_is_never_answered_ends(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def look() -> Look:
        return Look(reachable=False, bound=True)

    monkeypatch.setattr("scheduler.loop.FIRST_PATIENCE_S", 0.1)
    monkeypatch.setattr(house.executor, "look", look)
    with pytest.raises(ClusterLost):
        await asyncio.wait_for(house.scheduler().run(asyncio.Event()), 10)


async def test_one_that_never_reached_a_cluster_waits_for_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLUSTER_PATIENCE_S", "FIRST_PATIENCE_S"):
        monkeypatch.setattr(f"scheduler.loop.{name}", 0.1)
    house.executor.reachable = False
    job_id = await house.new_job()
    async with house.scheduling():
        await asyncio.sleep(0.4)
        house.executor.reachable = True
        await house.until_running(job_id)


async def test_supervisors_that_nobody_knows_are_ended(house: House) -> None:
    stray = AttemptSpec("stray/1", "stray", 1, {}, Demand(resources={"slot_cpu": 1}), ())
    await house.executor.start(stray)
    async with house.scheduling():

        async def gone() -> bool:
            return not house.executor.attempts["stray/1"].alive

        await house.until("the stray's end", gone)


async def test_a_cluster_that_fails_in_a_call_is_asked_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    look, calls = house.executor.look, 0

    async def flaky() -> Any:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise (Unreachable("no"), RuntimeError("a bug"), TimeoutError())[calls - 1]
        return await look()

    monkeypatch.setattr(house.executor, "look", flaky)
    job_id = await house.new_job()
    async with house.scheduling():
        await house.until_running(job_id)


async def test_a_new_cluster_is_no_proof_while_old_nodes_may_live(house: House) -> None:
    house.settings = replace(house.settings, node_timeout_s=1.0)
    job_id = await house.new_job()
    async with house.scheduling():
        await asyncio.sleep(1.1)
        name = await house.until_running(job_id)
        await house.until_heard(name)
        house.executor.new_cluster()

        async def reconnecting() -> bool:
            return (await house.job(job_id)).reconnecting

        await house.until("reconnecting", reconnecting)
        assert (await house.attempts(job_id))[0].outcome is None
        await house.until_running(job_id, 2)
    assert (await house.attempts(job_id))[0].exit_reason == "CLUSTER_LOST"
