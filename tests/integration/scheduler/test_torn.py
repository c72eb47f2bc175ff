"""A checkpoint whose files turn out to be damaged: the one before is used, and what lay between is nobody's debt."""

from __future__ import annotations

from sqlalchemy import select

from control_plane.states import Status
from control_plane.tables import Checkpoint
from scheduler.verify import verify
from tests.integration.scheduler.conftest import House
from tests.rows import PRICE


async def checkpoints(house: House, job_id: str) -> dict[int, Checkpoint]:
    async with house.database.read() as session:
        found = await session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id))
        return {checkpoint.step: checkpoint for checkpoint in found}


async def test_work_that_a_torn_checkpoint_lost_is_billed_once(house: House) -> None:
    job_id = await house.new_job(total_steps=20)
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 5)
        await house.put_checkpoint(name, 5)
        house.train(name, 6, 10)
        await house.put_checkpoint(name, 10)
        await house.until_heard(name)
        saved = await checkpoints(house, job_id)
        house.executor.torn.add(saved[10].id)
        house.executor.lose(name)

        name = await house.until_running(job_id, 2)
        await house.until_heard(name)
        assert (await house.attempts(job_id))[1].resumed_from == saved[5].id
        saved = await checkpoints(house, job_id)
        assert (saved[5].deleted_at, saved[10].deleted_at is None) == (None, False)
        assert (await house.job(job_id)).current_cost_microusd == 5 * PRICE // 3600

        async def files_gone() -> bool:
            return not await house.storage.list(saved[10].storage_key + "/")

        await house.until("the torn checkpoint's files to be deleted", files_gone)
        assert await house.storage.list(saved[5].storage_key + "/")
        house.train(name, 6, 20)
        house.complete(name)
        job = await house.until_job(job_id, Status.COMPLETED)
    assert job.final_cost_microusd == 20 * PRICE // 3600
    async with house.database.read() as session:
        assert await verify(session) == []
