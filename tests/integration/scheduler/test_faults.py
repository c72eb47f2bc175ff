"""What goes wrong with one attempt, and what becomes of its work."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from control_plane.states import Outcome, StopReason
from control_plane.tables import (
    JobLog,
    MetricsPoint,
    Notification,
)
from scheduler.executor import Unreachable
from tests.integration.scheduler.conftest import House
from tests.integration.scheduler.looking import PLAN, in_order, rows, stop
from tests.rows import events_of


async def lose_rank(house: House, name: str) -> None:
    house.executor.end(name, Outcome.FAULT, code="RANK_DIED", message="the actor died")


async def lose_supervisor(house: House, name: str) -> None:
    house.executor.lose(name)


@pytest.mark.parametrize("lose", [lose_rank, lose_supervisor])
async def test_a_platform_fault_goes_on_from_the_last_checkpoint(house: House, lose: Any) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.executor.emit(name, PLAN)
        house.train(name, 1, 10)
        await house.put_checkpoint(name, 10)
        house.train(name, 11, 13)
        await house.until_heard(name)
        await lose(house, name)
        second = await house.until_running(job_id, 2)
        point = house.executor.attempts[second].spec.resume_points[0]
        assert (point.step, point.key) == (
            10,
            f"{house.executor.attempts[second].spec.artifact_prefix}/checkpoints/a1-s10",
        )
        house.executor.clock.advance(2)
        house.train(second, 11, 20)
        house.complete(second)
        job = await house.until_job(job_id, "COMPLETED")
    attempts = await house.attempts(job_id)
    assert [attempt.outcome for attempt in attempts] == [Outcome.FAULT, Outcome.COMPLETED]
    assert [attempt.recovery for attempt in attempts] == [False, True]
    assert (attempts[1].resumed_from, job.retry_count) == (point.checkpoint_id, 1)
    assert [attempt.held_ms for attempt in attempts] == [13_000, 12_000]
    assert job.final_cost_microusd == 2_000
    assert [point.step for point in await rows(house, MetricsPoint)] == list(range(1, 21))
    warnings = [entry.message for entry in await rows(house, JobLog) if entry.level == "WARNING"]
    assert "goes on from step 10" in warnings[0]
    await in_order(house)


async def test_after_too_many_faults_the_job_fails(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        for number in range(1, 5):
            name = await house.until_running(job_id, number)
            house.train(name, 1, 2)
            house.executor.end(name, Outcome.FAULT, code="CHILD_KILLED", message="ended by SIGKILL", stack="stack")
        job = await house.until_job(job_id, "FAILED")
    assert (job.error_code, job.error_message, job.error_stack) == ("CHILD_KILLED", "ended by SIGKILL", "stack")
    assert (job.retry_count, job.final_cost_microusd) == (4, 0)
    (notice,) = await rows(house, Notification)
    assert (notice.type, notice.priority, notice.action_url) == ("JOB_FAILED", "HIGH", f"/training/jobs/{job_id}")
    assert (await events_of(house.database, job_id))[-1].payload == {
        "code": "CHILD_KILLED",
        "message": "ended by SIGKILL",
    }
    await in_order(house)


async def test_a_users_fault_is_not_tried_again(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 3)
        failed = {"type": "failed", "code": "NAN_LOSS", "message": "Loss is NaN.", "advice": "Lower the rate."}
        house.executor.emit(name, failed)
        house.executor.end(name, Outcome.FAILED, code="NAN_LOSS", message="Loss is NaN. Lower the rate.")
        job = await house.until_job(job_id, "FAILED")
    assert (job.error_code, job.error_message) == ("NAN_LOSS", "Loss is NaN. Lower the rate.")
    assert (job.attempt, job.final_cost_microusd) == (1, 300)
    await in_order(house)


async def test_completion_without_an_adapter_is_a_fault(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.executor.end(name, Outcome.COMPLETED)
        await house.until_running(job_id, 2)
    assert (await house.attempts(job_id))[0].exit_reason == "NO_ADAPTER"


async def test_a_stuck_supervisor_delays_no_other(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.executor.total["slot_cpu"] = 2.0
    stuck, other = await house.new_job(), await house.new_job()
    poll = house.executor.poll

    async def hang(name: str, cursor: int, **rest: Any) -> Any:
        if name.startswith(stuck):
            await asyncio.Event().wait()
        return await poll(name, cursor, **rest)

    monkeypatch.setattr(house.executor, "poll", hang)
    async with house.scheduling():
        await house.until_running(stuck)
        name = await house.until_running(other)
        house.complete(name)
        await house.until_job(other, "COMPLETED")


async def test_an_attempt_whose_events_cannot_be_stored_is_given_up(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.collect.LONGEST_PAUSE_S", 0.05)
    verdict_id = await house.new_verdict()
    async with house.scheduling():
        name = await house.until_running(verdict_id)
        house.executor.emit(name, {"type": "verdict", "report": {"nonsense": True}})
        house.executor.end(name, Outcome.COMPLETED)
        await house.until_running(verdict_id, 2)
    assert (await house.attempts(verdict_id))[0].exit_reason == "EVENTS_REFUSED"


async def test_a_supervisor_that_answers_nothing_is_ended(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.policy.SILENCE_S", 0.3)
    monkeypatch.setattr("scheduler.policy.RECONNECTING_S", 0.1)
    job_id = await house.new_job()
    poll, deaf = house.executor.poll, False

    async def silence(name: str, cursor: int, **rest: Any) -> Any:
        if deaf and name.endswith("/1"):
            raise Unreachable("no answer")
        return await poll(name, cursor, **rest)

    monkeypatch.setattr(house.executor, "poll", silence)
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 5)
        await house.put_checkpoint(name, 5)
        await house.until_heard(name)
        deaf = True
        second = await house.until_running(job_id, 2)
        assert not house.executor.attempts[name].alive
        house.complete(second)
        await house.until_job(job_id, "COMPLETED")
    assert (await house.attempts(job_id))[0].exit_reason == "SUPERVISOR_DIED"
    await in_order(house)


async def test_a_cancelled_job_is_ended_though_its_supervisor_is_deaf(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.policy.SILENCE_STOPPING_S", 0.3)
    job_id = await house.new_job()

    async def silence(*_: Any, **__: Any) -> Any:
        raise Unreachable("no answer")

    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 5)
        await house.until_heard(name)
        monkeypatch.setattr(house.executor, "poll", silence)
        monkeypatch.setattr(house.executor, "stop", silence)
        assert not await stop(house, job_id, StopReason.CANCEL)
        job = await house.until_job(job_id, "CANCELLED")
    assert not house.executor.attempts[name].alive
    assert (job.attempt, job.final_cost_microusd) == (1, 0)
    await in_order(house)
