"""Guarded transitions and gapless events, on both databases."""

from __future__ import annotations

import asyncio
from itertools import product

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from control_plane.db import Database
from control_plane.errors import Conflict
from control_plane.services.lifecycle import append_event, request_stop, stronger, transition
from control_plane.states import ACTIVE, TERMINAL, Stage, Status, StopReason, may
from control_plane.tables import BudgetHold, TrainingJob, Verdict
from control_plane.tables.money import HoldState
from tests.rows import events_of, make_dataset, make_job, make_running_job, make_team, make_verdict


async def job_in(database: Database, status: Status, **fields: object) -> str:
    async with database.write() as session:
        return (await make_job(session, status=status, **fields)).id


async def job_of(database: Database, job_id: str) -> TrainingJob:
    async with database.read() as session:
        return await session.get_one(TrainingJob, job_id)


async def hold_of(database: Database, job_id: str) -> HoldState:
    async with database.read() as session:
        return (await session.scalars(select(BudgetHold.state).where(BudgetHold.job_id == job_id))).one()


async def test_every_pair_moves_or_not_as_the_machine_says(database: Database) -> None:
    for source, target in product(Status, Status):
        job_id = await job_in(database, source)
        async with database.write() as session:
            moved = await transition(session, await session.get_one(TrainingJob, job_id), target)
        assert moved is may(source, target), (source, target)
        assert (await job_of(database, job_id)).status is (target if moved else source)
        assert bool(await events_of(database, job_id)) is moved


async def test_another_attempt_changes_nothing(database: Database) -> None:
    job_id = await job_in(database, Status.RUNNING, attempt=2)
    async with database.write() as session:
        job = await session.get_one(TrainingJob, job_id)
        assert not await transition(session, job, Status.COMPLETED, attempt=1, artifact_id="stale")
        assert await transition(session, job, Status.PAUSED, attempt=2, paused_by=StopReason.PAUSE)
        assert job.paused_by is StopReason.PAUSE
    job = await job_of(database, job_id)
    assert (job.status, job.artifact_id) == (Status.PAUSED, None)


async def test_pending_changes_of_the_caller_are_not_lost(database: Database) -> None:
    job_id = await job_in(database, Status.INITIALIZING, attempt=1)
    async with database.write() as session:
        job = await session.get_one(TrainingJob, job_id)
        job.progress = 12.5
        await transition(session, job, Status.RUNNING, attempt=1)
        assert job.progress == 12.5
    assert (await job_of(database, job_id)).progress == 12.5


async def test_of_concurrent_movers_one_wins(database: Database) -> None:
    job_id = await job_in(database, Status.RUNNING, attempt=1)

    async def move(target: Status) -> bool:
        async with database.write() as session:
            return await transition(session, await session.get_one(TrainingJob, job_id), target, attempt=1)

    targets = [Status.COMPLETED, Status.FAILED, Status.CANCELLED] * 4
    results = await asyncio.gather(*(move(target) for target in targets))
    assert sum(results) == 1
    assert (await job_of(database, job_id)).status is targets[results.index(True)]
    assert [event.type for event in await events_of(database, job_id)].count("stage") == 1


async def test_the_end_of_a_job_tells_closes_and_sums(database: Database) -> None:
    for target, last in ((Status.COMPLETED, "complete"), (Status.CANCELLED, "complete"), (Status.FAILED, "error")):
        job_id = await job_in(database, Status.RUNNING, reconnecting=True, stop_requested=StopReason.CANCEL)
        async with database.write() as session:
            job = await session.get_one(TrainingJob, job_id)
            error = {"error_code": "NAN_LOSS", "error_message": "no"} if target is Status.FAILED else {}
            await transition(session, job, target, **error)
        job = await job_of(database, job_id)
        stage, end = await events_of(database, job_id)
        assert (stage.type, stage.payload["status"], end.type) == ("stage", target, last)
        expected = {"code": "NAN_LOSS", "message": "no"} if last == "error" else {"status": target}
        assert end.payload == expected
        assert (job.final_cost_microusd, job.stop_requested, job.reconnecting) == (0, None, False)
        assert job.completed_at is not None
        assert await hold_of(database, job_id) is HoldState.CLOSED


async def test_stages_follow_the_status_and_stay_when_it_fails(database: Database) -> None:
    job_id = await job_in(database, Status.QUEUED, queue_reason="waits")
    async with database.write() as session:
        job = await session.get_one(TrainingJob, job_id)
        await transition(session, job, Status.INITIALIZING)
        assert (job.current_stage, job.queue_reason) == (Stage.INITIALIZING, None)
        job.current_stage = Stage.SAVING
        await transition(session, job, Status.FAILED)
        assert job.current_stage is Stage.SAVING


async def test_seqs_have_no_gap_under_concurrent_writers(database: Database) -> None:
    job_id = await job_in(database, Status.RUNNING)

    async def write(i: int) -> None:
        async with database.write() as session:
            for part in range(3):
                await append_event(session, job_id, "log", {"i": i, "part": part})

    await asyncio.gather(*(write(i) for i in range(8)))
    events = await events_of(database, job_id)
    assert len(events) == 24
    for first in range(0, 24, 3):
        assert len({event.payload["i"] for event in events[first : first + 3]}) == 1


async def test_the_database_takes_an_event_of_an_attempt_once(database: Database) -> None:
    async with database.write() as session:
        job, attempt = await make_running_job(session)
        await append_event(session, job.id, "log", {}, attempt_id=attempt.id, number=1)
    with pytest.raises(IntegrityError):
        async with database.write() as session:
            await append_event(session, job.id, "log", {}, attempt_id=attempt.id, number=1)
    assert len(await events_of(database, job.id)) == 1


async def test_a_queued_or_paused_job_is_cancelled_at_once(database: Database) -> None:
    for status in (Status.QUEUED, Status.PAUSED):
        job_id = await job_in(database, status)
        async with database.write() as session:
            assert await request_stop(session, await session.get_one(TrainingJob, job_id), StopReason.CANCEL)
        assert (await job_of(database, job_id)).status is Status.CANCELLED
        assert await hold_of(database, job_id) is HoldState.CLOSED


async def test_a_queued_job_is_paused_at_once_and_a_paused_one_not_again(database: Database) -> None:
    job_id = await job_in(database, Status.QUEUED)
    async with database.write() as session:
        job = await session.get_one(TrainingJob, job_id)
        assert await request_stop(session, job, StopReason.PAUSE)
        assert (job.status, job.paused_by) == (Status.PAUSED, StopReason.PAUSE)
        with pytest.raises(Conflict):
            await request_stop(session, job, StopReason.PAUSE)
    assert await hold_of(database, job_id) is HoldState.OPEN


async def test_an_active_job_is_only_asked(database: Database) -> None:
    for status in ACTIVE:
        job_id = await job_in(database, status)
        async with database.write() as session:
            job = await session.get_one(TrainingJob, job_id)
            assert not await request_stop(session, job, StopReason.PAUSE)
            assert not await request_stop(session, job, StopReason.CANCEL)
            assert not await request_stop(session, job, StopReason.PAUSE)
        job = await job_of(database, job_id)
        assert (job.status, job.stop_requested) == (status, StopReason.CANCEL)


async def test_what_has_ended_cannot_be_stopped(database: Database) -> None:
    for status in TERMINAL:
        job_id = await job_in(database, status)
        async with database.write() as session:
            with pytest.raises(Conflict):
                await request_stop(session, await session.get_one(TrainingJob, job_id), StopReason.CANCEL)


async def test_a_verdict_moves_by_the_same_rules(database: Database) -> None:
    async with database.write() as session:
        verdict = await make_verdict(session, await make_dataset(session, await make_team(session)))
        assert await transition(session, verdict, Status.INITIALIZING, attempt=0)
        assert not await transition(session, verdict, Status.RUNNING, attempt=1)
        assert await transition(session, verdict, Status.RUNNING, attempt=0)
        assert await transition(session, verdict, Status.COMPLETED)
        assert not await transition(session, verdict, Status.FAILED)
    async with database.read() as session:
        assert (await session.get_one(Verdict, verdict.id)).status is Status.COMPLETED


def test_the_stronger_stop_wins() -> None:
    order = [None, StopReason.PREEMPT, StopReason.BUDGET, StopReason.PAUSE, StopReason.CANCEL]
    for (i, one), (j, other) in product(enumerate(order), enumerate(order)):
        assert stronger(one, other) is order[max(i, j)]
