"""Schedulers that are killed, superseded or do not hear what became of what they did."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from control_plane.db import Database
from control_plane.states import Status
from control_plane.tables import (
    Attempt,
    ModelArtifact,
    Notification,
)
from scheduler.executor import AttemptSpec
from tests.integration.scheduler.conftest import House
from tests.integration.scheduler.looking import in_order, rows
from tests.rows import events_of


async def test_a_scheduler_killed_between_commit_and_start_is_taken_over(house: House) -> None:
    job_id = await house.new_job()
    asked = asyncio.Event()

    async def never(spec: AttemptSpec) -> None:
        asked.set()
        await asyncio.Event().wait()

    start, house.executor.start = house.executor.start, never  # type: ignore[method-assign]
    first = house.scheduler()
    task = asyncio.create_task(first.run(asyncio.Event()))
    await asyncio.wait_for(asked.wait(), 10)
    await house.kill(task, first)
    assert (await house.job(job_id)).status is Status.INITIALIZING
    assert house.executor.attempts == {}

    house.executor.start = start  # type: ignore[method-assign]
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
    assert list(house.executor.attempts) == [f"{job_id}/1"]
    assert len(house.tracking.runs) == 1


async def test_a_scheduler_killed_between_start_and_its_note_adopts(house: House) -> None:
    job_id = await house.new_job()
    started = asyncio.Event()
    start = house.executor.start

    async def die_after(spec: AttemptSpec) -> None:
        await start(spec)
        started.set()
        await asyncio.Event().wait()

    house.executor.start = die_after  # type: ignore[method-assign]
    first = house.scheduler()
    task = asyncio.create_task(first.run(asyncio.Event()))
    await asyncio.wait_for(started.wait(), 10)
    await house.kill(task, first)
    assert (await house.attempts(job_id))[0].cluster_id is None
    async with house.scheduling():
        house.complete(f"{job_id}/1")
        await house.until_job(job_id, "COMPLETED")
        await house.until("the note", lambda: rows(house, Attempt, Attempt.cluster_id == "cluster-1"))
    assert len(await house.attempts(job_id)) == 1


async def test_a_killed_scheduler_in_mid_job_is_replaced_and_nothing_is_told_twice(house: House) -> None:
    job_id = await house.new_job()
    first = house.scheduler()
    task = asyncio.create_task(first.run(asyncio.Event()))
    name = await house.until_running(job_id)
    house.train(name, 1, 7)
    await house.until_heard(name)
    await house.kill(task, first)
    house.train(name, 8, 20)
    async with house.scheduling():
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
    events = await events_of(house.database, job_id)
    assert [e.payload["step"] for e in events if e.type == "metrics"] == list(range(1, 21))
    assert (await house.job(job_id)).final_cost_microusd == 2_000
    await in_order(house)


async def test_of_two_schedulers_one_acts(house: House) -> None:
    job_id = await house.new_job()
    first, second = house.scheduler("one:x/1/1.0"), house.scheduler("two:x/1/1.0")
    task = asyncio.create_task(first.run(asyncio.Event()))
    name = await house.until_running(job_id)
    async with house.scheduling(second):
        house.train(name, 1, 5)
        await house.until_heard(name)
        assert second.lease.epoch == 0
        await house.kill(task, first)
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
        assert second.lease.epoch == 2
    await in_order(house)


async def test_an_answer_that_gets_lost_starts_nothing_twice(house: House) -> None:
    job_id = await house.new_job()
    house.executor.lost_answers = ["start", "poll", "poll", "times", "release"]
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 20)
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
        await house.until("release", lambda: rows(house, Attempt, Attempt.released))
    assert len(await house.attempts(job_id)) == 1
    await in_order(house)


class Unlucky(Database):
    """Commits whose callers see an error: every third."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.writes = 0

    def write(self) -> Any:
        self.writes += 1
        return self._lost(super().write()) if self.writes > 3 and self.writes % 3 == 0 else super().write()

    def _lost(self, inner: Any) -> Any:
        class Lost:
            async def __aenter__(self) -> Any:
                return await inner.__aenter__()

            async def __aexit__(self, *error: Any) -> None:
                await inner.__aexit__(*error)
                raise ConnectionError("the commit's answer was lost")

        return Lost()


async def test_commits_whose_success_nobody_sees_change_nothing(
    house: House, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.collect.LONGEST_PAUSE_S", 0.05)
    unlucky = Unlucky(database_url)
    job_id = await house.new_job()
    async with house.scheduling(house.scheduler(database=unlucky)):
        name = await house.until_running(job_id)
        for step in range(1, 21):
            house.train(name, step, step)
            await house.until_heard(name)
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
    assert unlucky.writes > 20
    await unlucky.close()
    events = await events_of(house.database, job_id)
    assert [e.payload["step"] for e in events if e.type == "metrics"] == list(range(1, 21))
    assert len(await rows(house, Notification)) == len(await rows(house, ModelArtifact)) == 1
    assert (await house.job(job_id)).final_cost_microusd == 2_000
    await in_order(house)


async def test_an_orderly_end_leaves_running_work_alone(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
    assert house.executor.attempts[name].alive
    async with house.scheduling() as again:
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
        assert again.lease.epoch == 2


async def test_a_scheduler_superseded_while_it_makes_a_run_leaves_no_other(house: House) -> None:
    job_id = await house.new_job()
    made = asyncio.Event()
    ensure = house.tracking.ensure_run

    async def hang(**asked: Any) -> Any:
        await ensure(**asked)
        made.set()
        await asyncio.Event().wait()

    house.tracking.ensure_run = hang  # type: ignore[method-assign]
    first = house.scheduler()
    task = asyncio.create_task(first.run(asyncio.Event()))
    await asyncio.wait_for(made.wait(), 10)
    await house.kill(task, first)
    assert (await house.job(job_id)).mlflow_run_id is None

    house.tracking.ensure_run = ensure  # type: ignore[method-assign]
    async with house.scheduling():
        name = await house.until_running(job_id)
        job = await house.job(job_id)
        house.tracking.stray(team_id=job.team_id, job_id=job_id, name="of a request that came late")
        house.complete(name)

        async def alone() -> bool:
            return [(key, run.status) for key, run in house.tracking.runs.items()] == [(job.mlflow_run_id, "FINISHED")]

        await house.until("the stray to go", alone)
