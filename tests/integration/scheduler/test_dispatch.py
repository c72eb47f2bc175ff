"""From the queue to the cluster, when something is in the way."""

from __future__ import annotations

import pytest

from control_plane.services import paused
from control_plane.services.lifecycle import request_stop
from control_plane.states import Outcome, Status, StopReason
from control_plane.tables import TrainingJob
from scheduler.executor import AttemptSpec, Unreachable
from scheduler.tracking import Run, TrackingDown, TrackingRefused
from scheduler.verify import verify
from tests.integration.scheduler.conftest import House


async def never_started(house: House, monkeypatch: pytest.MonkeyPatch, job_id: str | None = None) -> str:
    """A job whose attempt is committed, but of which the cluster has never heard."""

    async def start(spec: AttemptSpec) -> None:
        raise Unreachable("no answer within 20 s")

    job_id = job_id or await house.new_job()
    with monkeypatch.context() as patch:
        patch.setattr(house.executor, "start", start)
        async with house.scheduling():
            await house.until_job(job_id, "INITIALIZING")
    return job_id


async def ask(house: House, job_id: str, reason: StopReason) -> None:
    async with house.database.write() as session:
        await request_stop(session, await session.get_one(TrainingJob, job_id, with_for_update=True), reason)


async def in_order(house: House) -> None:
    async with house.database.read() as session:
        assert await verify(session) == []


@pytest.mark.parametrize("offered", [True, False])
@pytest.mark.parametrize(("reason", "status"), [(StopReason.CANCEL, "CANCELLED"), (StopReason.PAUSE, "PAUSED")])
async def test_an_attempt_that_was_never_started_can_be_stopped(
    house: House, monkeypatch: pytest.MonkeyPatch, reason: StopReason, status: str, offered: bool
) -> None:
    job_id = await never_started(house, monkeypatch)
    await ask(house, job_id, reason)
    if not offered:
        house.catalog.base_models.clear()
    async with house.scheduling():
        job = await house.until_job(job_id, status)
    assert (job.stop_requested, job.current_cost_microusd, house.executor.attempts) == (None, 0, {})
    await in_order(house)


async def test_what_is_no_longer_offered_goes_back_into_the_queue_and_waits(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await never_started(house, monkeypatch)
    offers = dict(house.catalog.base_models)
    house.catalog.base_models.clear()
    async with house.scheduling():
        job = await house.until_job(job_id, "QUEUED")

        async def told() -> bool:
            return "no longer offered" in ((await house.job(job_id)).queue_reason or "")

        await house.until("a reason to wait", told)
        house.catalog.base_models.update(offers)
        await house.until_running(job_id, 2)
    assert (job.status, job.retry_count) == (Status.QUEUED, 0)
    await in_order(house)


async def test_reloading_after_a_fault_is_absorbed_also_when_an_attempt_between_was_never_started(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        await house.until_heard(name)
    house.executor.end(name, Outcome.FAULT, code="RANK_DIED", message="no")
    await never_started(house, monkeypatch, job_id)
    await ask(house, job_id, StopReason.PAUSE)
    async with house.scheduling():
        await house.until_job(job_id, "PAUSED")
        async with house.database.write() as session:
            await paused.resume(session, await session.get_one(TrainingJob, job_id, with_for_update=True))
        await house.until_running(job_id, 3)
    assert [attempt.recovery for attempt in await house.attempts(job_id)] == [False, True, True]
    assert f"{job_id}/2" not in house.executor.attempts
    await in_order(house)


@pytest.mark.parametrize("error", [TrackingRefused("400 the experiment is deleted"), TrackingDown("500"), KeyError()])
async def test_a_job_that_cannot_be_dispatched_stands_in_nobodys_way(
    house: House, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """One slot; whatever is wrong with the first of the queue is wrong with it alone."""
    bad, good = [await house.new_job() for _ in range(2)]
    ensure_run, tries = house.tracking.ensure_run, 0

    async def refusing(*, team_id: str, job_id: str, name: str) -> Run:
        nonlocal tries
        if job_id == bad:
            tries += 1
            raise error
        return await ensure_run(team_id=team_id, job_id=job_id, name=name)

    monkeypatch.setattr(house.tracking, "ensure_run", refusing)
    async with house.scheduling():
        house.complete(await house.until_running(good))
        await house.until_job(good, "COMPLETED")

        async def tried_again() -> bool:
            return tries > 2

        await house.until("another try", tried_again)
        job = await house.job(bad)
        assert (job.status, job.attempt, bool(job.queue_reason)) == (Status.QUEUED, 0, True)
        monkeypatch.setattr(house.tracking, "ensure_run", ensure_run)
        await house.until_running(bad)
