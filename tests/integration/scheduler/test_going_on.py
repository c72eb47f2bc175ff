"""Jobs that go on: those that the budget paused, by themselves; those that are retried, from what they left behind."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.db import Database
from control_plane.errors import BudgetExceeded
from control_plane.services import paused
from control_plane.services.lifecycle import request_stop
from control_plane.states import MAX_FAULT_RETRIES, Outcome, Status, StopReason
from control_plane.tables import (
    Attempt,
    AttemptUsage,
    BudgetHold,
    CostRecord,
    Dataset,
    JobLog,
    Team,
    TrainingJob,
)
from scheduler.verify import verify
from tests.integration.scheduler.conftest import House
from tests.ledgers import checkpoint
from tests.rows import make_attempt, make_job, make_team

SECOND = 100
"""Micro-dollars of a GPU-second."""
PLAN = {"type": "plan", "total_steps": 40, "total_epochs": 4, "train_conversations": 80, "validation_conversations": 8}


async def in_order(house: House) -> None:
    async with house.database.read() as session:
        assert await verify(session) == []


async def set_budget(house: House, amount: int | None) -> None:
    async with house.database.write() as session:
        await session.execute(update(Team).values(monthly_budget_microusd=amount))


async def hold_of(house: House, job_id: str) -> int:
    async with house.database.read() as session:
        found = await session.scalar(select(BudgetHold.amount_microusd).where(BudgetHold.job_id == job_id))
        return found or 0


async def new_job(house: House, budget_s: int, held_s: int) -> str:
    async with house.database.write() as session:
        team = await make_team(session, budget_microusd=budget_s * SECOND)
        return (await make_job(session, team, held_microusd=held_s * SECOND)).id


async def to_the_ceiling(house: House, job_id: str) -> TrainingJob:
    """2 s of loading, 18 s for 18 steps, a checkpoint at step 18: the 20 s that the budget pays for."""
    name = await house.until_running(job_id)
    house.executor.attempts[name].on_stop = lambda reason: None
    house.executor.emit(name, PLAN)
    house.executor.clock.advance(2)
    house.train(name, 1, 18)

    async def stopping() -> bool:
        return (await house.job(job_id)).stop_requested is StopReason.BUDGET

    await house.until("it to stop", stopping)
    await house.put_checkpoint(name, 18)
    house.executor.end(name, Outcome.STOPPED)
    return await house.until_job(job_id, "PAUSED")


async def test_a_job_at_the_ceiling_goes_on_once_it_can_get_further(house: House) -> None:
    job_id = await new_job(house, 20, 20)
    async with house.scheduling():
        job = await to_the_ceiling(house, job_id)
        assert (job.paused_by, job.current_cost_microusd) == (StopReason.BUDGET, 20 * SECOND)
        needed = 2 + 10
        assert f"once it leaves 0.00{needed * SECOND:04d} USD" in (job.queue_reason or "")
        await set_budget(house, (20 + needed) * SECOND - 1)
        await asyncio.sleep(0.3)
        assert (await house.job(job_id)).status is Status.PAUSED
        await set_budget(house, (20 + needed) * SECOND)
        second = await house.until_running(job_id, 2)
        assert house.executor.attempts[second].spec.resume_points[0].step == 18
        assert house.executor.attempts[second].spec.allowance_ms == needed * 1000
        assert await hold_of(house, job_id) == (20 + needed) * SECOND
        house.complete(second)
        job = await house.until_job(job_id, "COMPLETED")
    assert (job.queue_reason, job.paused_by, job.retry_count) == (None, None, 0)
    await in_order(house)
    async with house.database.read() as session:
        said = list(await session.scalars(select(JobLog.message).order_by(JobLog.id)))
    assert any(message.startswith("Stopping: the GPU time") for message in said)
    assert any(message.startswith("Paused with its last checkpoint.") for message in said)
    assert "The budget allows it again: the job goes on from its last checkpoint." in said


async def test_a_new_month_lets_it_go_on(house: House) -> None:
    job_id = await new_job(house, 20, 20)
    async with house.scheduling():
        await to_the_ceiling(house, job_id)
        async with house.database.write() as session:
            records = list(await session.scalars(select(CostRecord)))
            for record in records:
                record.billing_period -= timedelta(days=32)
        await house.until_running(job_id, 2)


async def test_a_hold_that_is_released_lets_it_go_on(house: House) -> None:
    job_id = await new_job(house, 50, 20)
    async with house.database.write() as session:
        team = await session.get_one(Team, (await session.get_one(TrainingJob, job_id)).team_id)
        other = (await make_job(session, team, held_microusd=30 * SECOND, status=Status.PAUSED)).id
    async with house.scheduling():
        await to_the_ceiling(house, job_id)
        await asyncio.sleep(0.2)
        assert (await house.job(job_id)).status is Status.PAUSED
        async with house.database.write() as session:
            await request_stop(session, await session.get_one(TrainingJob, other), StopReason.CANCEL)
        await house.until_running(job_id, 2)


async def test_a_users_pause_stays(house: House) -> None:
    job_id = await new_job(house, 20, 20)
    async with house.scheduling():
        await to_the_ceiling(house, job_id)
        async with house.database.write() as session:
            await request_stop(session, await session.get_one(TrainingJob, job_id), StopReason.PAUSE)
        await set_budget(house, None)
        await asyncio.sleep(0.3)
        job = await house.job(job_id)
        assert (job.status, job.paused_by, job.queue_reason) == (Status.PAUSED, StopReason.PAUSE, None)
        async with house.database.write() as session:
            await paused.resume(session, await session.get_one(TrainingJob, job_id))
        await house.until_running(job_id, 2)


async def test_pausing_it_as_well_does_not_get_around_the_budget(database: Database) -> None:
    async with database.write() as session:
        team = await make_team(session, budget_microusd=10 * SECOND)
    job = await at_the_ceiling(database, team, training=10)
    async with database.write() as session:
        row = await session.get_one(TrainingJob, job.id)
        await request_stop(session, row, StopReason.PAUSE)
        with pytest.raises(BudgetExceeded, match="it can be resumed once it leaves"):
            await paused.resume(session, row)
    async with database.read() as session:
        assert (await session.get_one(TrainingJob, job.id)).status is Status.PAUSED


async def test_a_user_who_pauses_it_in_the_meantime_is_heeded(database: Database) -> None:
    job = await at_the_ceiling(database, training=10)
    async with database.write() as session:
        row = await session.get_one(TrainingJob, job.id)
        await request_stop(session, row, StopReason.PAUSE)
        assert not await paused.go_on(session, row)
    async with database.read() as session:
        assert (await session.get_one(TrainingJob, job.id)).status is Status.PAUSED


async def at_the_ceiling(database: Database, team: Team | None = None, **usage_s: int) -> TrainingJob:
    """A job that the budget has paused at step 10 of 40; ``usage_s``: seconds by kind, all charged."""
    async with database.write() as session:
        team = team or await make_team(session, budget_microusd=1_000_000 * SECOND)
        spent = sum(usage_s.values())
        fields: dict[str, Any] = {"total_steps": 40, "total_epochs": 4, "current_step": 10, "attempt": 1}
        job = await make_job(
            session, team, held_microusd=spent * SECOND, status="PAUSED", paused_by=StopReason.BUDGET, **fields
        )
        attempt: Attempt = await make_attempt(session, job, outcome=Outcome.STOPPED)
        for kind, seconds in usage_s.items():
            session.add(AttemptUsage(attempt_id=attempt.id, rank=0, kind=kind, gpu_ms=seconds * 1000, absorbed_ms=0))
        session.add(
            CostRecord(
                team_id=team.id, created_by=job.created_by, job_id=job.id, attempt_id=attempt.id, cost_type="COMPUTE",
                amount_microusd=spent * SECOND, details={"kind": "charge", "gpuMs": spent * 1000},
                billing_period=job.queued_at,
            )
        )  # fmt: skip
    return job


@pytest.mark.parametrize("where", ["means", "go_on"])
async def test_what_is_wrong_with_one_job_keeps_no_other_paused(
    house: House, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    broken, sound = [await at_the_ceiling(house.database, training=10) for _ in range(2)]
    real = getattr(paused, where)

    async def failing(session: AsyncSession, job: TrainingJob) -> Any:
        if job.id == broken.id:
            raise ZeroDivisionError
        return await real(session, job)

    monkeypatch.setattr(paused, where, failing)
    async with house.scheduling():
        await house.until_running(sound.id, 2)
    assert (await house.job(broken.id)).status is Status.PAUSED


async def test_with_nothing_left_it_stays_though_it_has_used_nothing(database: Database) -> None:
    async with database.write() as session:
        team = await make_team(session, budget_microusd=10 * SECOND)
    await at_the_ceiling(database, team, training=10)
    job = await at_the_ceiling(database, team)
    async with database.write() as session:
        assert not await paused.go_on(session, await session.get_one(TrainingJob, job.id))


@pytest.mark.parametrize(
    ("recipe", "step", "needed_s"),
    [({}, 10, 7 + 20), ({"checkpointSteps": 5}, 10, 7 + 10), ({}, 38, 7 + 2), ({"checkpointSteps": 500}, 10, 7 + 60)],
)
async def test_what_it_needs_is_loading_and_the_way_to_the_next_checkpoint(
    database: Database, recipe: dict[str, int], step: int, needed_s: int
) -> None:
    """A step has taken two seconds, or half of that at step 38."""
    job = await at_the_ceiling(database, loading=7, training=15, evaluating=4, saving=1)
    async with database.write() as session:
        job = await session.get_one(TrainingJob, job.id)
        job.hyperparameters, job.current_step = {**job.hyperparameters, **recipe}, step
        found = await paused.means(session, job)
    expected = needed_s if step == 10 else 7 + 20 / 38 * 2
    assert found.needed == pytest.approx(expected * SECOND, abs=1)


async def test_the_steps_of_the_job_that_it_retries_are_not_its_own(database: Database) -> None:
    """From step 300 it has trained five steps of ten seconds; it saves every ten."""
    old = await at_the_ceiling(database, training=10)
    job = await at_the_ceiling(database, loading=2, training=50)
    async with database.write() as session:
        before, attempt = [
            await session.scalar(select(Attempt).where(Attempt.work_id == work)) for work in (old.id, job.id)
        ]
    point = await checkpoint(database, (old.id, before.id), 300, {})
    async with database.write() as session:
        attempt = await session.get_one(Attempt, attempt.id)
        attempt.started_at, attempt.resumed_from = job.queued_at, point
        job = await session.get_one(TrainingJob, job.id)
        job.hyperparameters = {**job.hyperparameters, "checkpointSteps": 10}
        job.total_steps, job.current_step = 400, 305
        assert (await paused.means(session, job)).needed == (2 + 10 * 10) * SECOND


async def test_the_same_money_is_promised_to_one(database: Database) -> None:
    async with database.write() as session:
        team = await make_team(session, budget_microusd=(27 + 27 + 30) * SECOND)
    jobs = [await at_the_ceiling(database, team, loading=7, training=20) for _ in range(2)]

    async def go_on(job_id: str) -> bool:
        async with database.write() as session:
            job = await session.get_one(TrainingJob, job_id, with_for_update=True)
            return await paused.go_on(session, job)

    results = await asyncio.gather(*(go_on(job.id) for job in jobs))
    assert sorted(results) == [False, True]


async def test_a_user_cannot_resume_what_the_budget_does_not_pay_for(database: Database) -> None:
    job = await at_the_ceiling(database, loading=7, training=20)
    for budget, allowed in ((27 + 26, False), (27 + 27, True)):
        async with database.write() as session:
            await session.execute(update(Team).values(monthly_budget_microusd=budget * SECOND))
            job = await session.get_one(TrainingJob, job.id, with_for_update=True)
            if allowed:
                await paused.resume(session, job)
            else:
                with pytest.raises(BudgetExceeded, match=r"leaves 0\.002600 USD .* once it leaves 0\.002700 USD"):
                    await paused.resume(session, job)
            assert job.status is (Status.QUEUED if allowed else Status.PAUSED)


async def retried(house: House, job_id: str) -> str:
    """The row that POST /api/jobs/{id}/retry makes."""
    async with house.database.write() as session:
        old = await session.get_one(TrainingJob, job_id)
        team = await session.get_one(Team, old.team_id)
        dataset = await session.get_one(Dataset, old.dataset_id)
        return (await make_job(session, team, dataset=dataset, retry_of=job_id)).id


async def test_a_retried_job_goes_on_from_the_checkpoints_of_those_before_it(house: House) -> None:
    first = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(first)
        house.train(name, 1, 10)
        await house.put_checkpoint(name, 10)
        house.executor.end(name, Outcome.FAILED, code="NAN_LOSS", message="no")
        await house.until_job(first, "FAILED")

        second = await retried(house, first)
        name = await house.until_running(second)
        assert [point.step for point in house.executor.attempts[name].spec.resume_points] == [10]
        house.train(name, 11, 15)
        await house.put_checkpoint(name, 15)
        house.executor.end(name, Outcome.FAILED, code="NAN_LOSS", message="no")
        await house.until_job(second, "FAILED")

        third = await retried(house, second)
        name = await house.until_running(third)
        spec = house.executor.attempts[name].spec
        points = [(point.step, point.key.rpartition("/checkpoints/")[0]) for point in spec.resume_points]
        prefixes = [(await house.job(job_id)).artifact_prefix for job_id in (second, first)]
        assert points == [(15, prefixes[0]), (10, prefixes[1])]
        assert spec.artifact_prefix not in prefixes
        house.train(name, 16, 20)
        await house.put_checkpoint(name, 20)
        house.executor.end(name, Outcome.FAULT, code="RANK_DIED", message="no")
        again = await house.until_running(third, 2)
        assert [point.step for point in house.executor.attempts[again].spec.resume_points] == [20, 15, 10]
        house.complete(again)
        await house.until_job(third, "COMPLETED")
    assert [attempt.recovery for attempt in await house.attempts(third)] == [False, True]
    await in_order(house)


async def test_a_job_retried_after_faults_of_the_platform_loads_at_its_cost(house: House) -> None:
    first = await house.new_job()
    async with house.scheduling():
        for number in range(1, MAX_FAULT_RETRIES + 2):
            name = await house.until_running(first, number)
            house.executor.end(name, Outcome.FAULT, code="RANK_DIED", message="no")
        await house.until_job(first, "FAILED")
        second = await retried(house, first)
        name = await house.until_running(second)
        house.executor.clock.advance(5)
        house.train(name, 1, 20)
        house.complete(name)
        job = await house.until_job(second, "COMPLETED")
    assert job.final_cost_microusd == 20 * SECOND
    await in_order(house)


async def test_a_job_that_gets_further_outlives_any_number_of_faults(house: House) -> None:
    job_id = await house.new_job()
    faults = 2 * MAX_FAULT_RETRIES
    async with house.scheduling():
        for number in range(1, faults + 1):
            name = await house.until_running(job_id, number)
            house.train(name, number, number)
            await house.put_checkpoint(name, number)
            house.executor.end(name, Outcome.FAULT, code="RANK_DIED", message="no")
        name = await house.until_running(job_id, faults + 1)
        house.complete(name)
        job = await house.until_job(job_id, "COMPLETED")
    assert (job.retry_count, job.attempt) == (faults, faults + 1)
    await in_order(house)


async def test_one_that_gets_no_further_does_not(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        for number, step in enumerate((5, 5, 4, 5), 1):
            name = await house.until_running(job_id, number)
            await house.put_checkpoint(name, step)
            house.executor.end(name, Outcome.FAULT, code="RANK_DIED", message="no")
        job = await house.until_job(job_id, "FAILED")
    assert (job.retry_count, job.error_code) == (4, "RANK_DIED")


@pytest.mark.parametrize("budget_s", [None, 1_000])
async def test_reloading_after_nobody_was_there_to_extend_the_allowance_is_not_billed(
    house: House, budget_s: int | None
) -> None:
    job_id = await (house.new_job() if budget_s is None else new_job(house, budget_s, 50))
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.executor.clock.advance(2)
        house.train(name, 1, 5)
        await house.until_heard(name)
    await house.put_checkpoint(name, 5)
    house.executor.attempts[name].stop_reason = StopReason.BUDGET
    house.executor.end(name, Outcome.STOPPED)
    async with house.scheduling():
        name = await house.until_running(job_id, 2)
        house.executor.clock.advance(3)
        house.train(name, 6, 20)
        house.complete(name)
        job = await house.until_job(job_id, "COMPLETED")
    first, second = await house.attempts(job_id)
    assert (first.exit_reason, second.recovery, job.retry_count) == ("ALLOWANCE_LAPSED", True, 0)
    assert job.final_cost_microusd == (2 + 20) * SECOND
    async with house.database.read() as session:
        said = list(await session.scalars(select(JobLog.message)))
    assert any("loading it again is not billed" in message for message in said)
    await in_order(house)


async def test_faults_at_the_ceiling_are_counted(house: House) -> None:
    """An attempt that does not stop when its allowance is used up is ended by force, each time again."""
    job_id = await house.new_job()
    async with house.scheduling():
        for number in range(1, MAX_FAULT_RETRIES + 2):
            name = await house.until_running(job_id, number)
            house.executor.attempts[name].stop_reason = StopReason.BUDGET
            house.executor.end(name, Outcome.FAULT, code="OVER_ALLOWANCE", message="not stopped")
        job = await house.until_job(job_id, "FAILED")
    assert (job.retry_count, job.error_code) == (MAX_FAULT_RETRIES + 1, "OVER_ALLOWANCE")
    await in_order(house)
