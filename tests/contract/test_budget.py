"""A job at its budget's ceiling, on Ray: the supervisor stops it, whether a scheduler is there or not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from control_plane.db import Database
from control_plane.states import Outcome, Status, StopReason
from control_plane.tables import Attempt, Checkpoint, Dataset, MetricsPoint, TrainingJob
from scheduler.verify import verify
from tests.contract.harness import RayHarness, until_all_is_free
from tests.integration.scheduler.conftest import House
from tests.rows import PRICE, make_job, make_team

AFFORDED_S = 4
"""GPU-seconds that the budget pays for."""
BUDGET = AFFORDED_S * PRICE // 3600
CEILING = BUDGET + 30 * PRICE // 3600
FOREVER = [{"do": "train", "steps": 100_000, "every_s": 0.05}]


@pytest.fixture
async def house(database: Database, tmp_path: Path, ray_harness: RayHarness) -> House:
    """Schedulers on Ray, with a child that only steps."""
    house = House(database, tmp_path / "data")
    house.settings = replace(
        house.settings, tick_s=0.2, storage_url=ray_harness.url, work_dir=str(ray_harness.work_root)
    )
    house.storage = ray_harness.storage
    house.executor = ray_harness.executor  # type: ignore[assignment]
    return house


async def new_job(house: House) -> str:
    async with house.database.write() as session:
        job = await make_job(session, await make_team(session, budget_microusd=BUDGET), held_microusd=BUDGET)
        dataset = await session.get_one(Dataset, job.dataset_id)
    await house.storage.put(dataset.storage_key, json.dumps(FOREVER).encode())
    return job.id


async def until(probe: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.timeout(60):
        while not (found := await probe()):
            await asyncio.sleep(0.1)
    return found


async def stepping(house: House, job_id: str) -> bool:
    async with house.database.read() as session:
        return await session.scalar(select(MetricsPoint.id).where(MetricsPoint.job_id == job_id)) is not None


async def paused(house: House, job_id: str) -> TrainingJob | None:
    job = await house.job(job_id)
    return job if job.status is Status.PAUSED else None


async def stopped_within_its_means(house: House, job_id: str) -> None:
    job = await house.job(job_id)
    (attempt,) = await house.attempts(job_id)
    assert (job.status, job.paused_by) == (Status.PAUSED, StopReason.BUDGET)
    assert (attempt.outcome, attempt.exit_reason) == (Outcome.STOPPED, StopReason.BUDGET)
    assert BUDGET <= job.current_cost_microusd <= CEILING
    async with house.database.read() as session:
        (checkpoint,) = await session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id))
        last = await session.scalar(select(MetricsPoint.step).order_by(MetricsPoint.step.desc()).limit(1))
        assert checkpoint.step == last
        assert await verify(session) == []


async def test_a_job_at_its_ceiling_stops_with_a_checkpoint(house: House, ray_harness: RayHarness) -> None:
    job_id = await new_job(house)
    async with house.scheduling():
        await until(lambda: paused(house, job_id))
        await until_all_is_free(ray_harness.executor)
    await stopped_within_its_means(house, job_id)


async def test_it_does_so_with_the_scheduler_dead(house: House, ray_harness: RayHarness) -> None:
    job_id = await new_job(house)
    scheduler = house.scheduler()
    running = asyncio.create_task(scheduler.run(asyncio.Event()))
    await until(lambda: stepping(house, job_id))
    child = ray_harness.child(f"{job_id}/1")

    await house.kill(running, scheduler)
    await asyncio.to_thread(child.wait, 30 + AFFORDED_S)

    assert not psutil.pid_exists(child.pid)
    async with house.database.read() as session:
        open_attempt = await session.scalar(select(Attempt).where(Attempt.work_id == job_id))
        assert open_attempt is not None
        assert open_attempt.outcome is None
    async with house.scheduling():
        await until(lambda: paused(house, job_id))
        await until_all_is_free(ray_harness.executor)
    await stopped_within_its_means(house, job_id)
