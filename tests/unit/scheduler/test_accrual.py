"""Storage by the day, on both databases: what was there, at the price of the day, once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import pytest
from sqlalchemy import select

from control_plane.db import Database
from control_plane.tables import (
    Checkpoint,
    CostRecord,
    Dataset,
    ModelArtifact,
    Notification,
    PriceVersion,
    Team,
    TrainingJob,
    base,
)
from scheduler.accrual import Accrual
from scheduler.lease import Lease, LeaseLost
from scheduler.verify import verify
from tests.rows import make_dataset, make_job, make_running_job, make_team

GIB = 1024**3
NOON = datetime(2026, 4, 10, 12, tzinfo=UTC)
MONTH_DAYS = 30
PRICE = 30_000_000
"""Micro-dollars a GiB and month: a dollar a GiB and day of April."""


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    time = [NOON]
    monkeypatch.setattr(base, "clock", lambda: time[0])
    return time


class Bench:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.lease = Lease(database, 60)
        self.accrual = Accrual(database, self.lease)

    async def records(self) -> list[CostRecord]:
        async with self.database.read() as session:
            return list(await session.scalars(select(CostRecord).order_by(CostRecord.recorded_at, CostRecord.id)))

    async def amounts(self) -> list[tuple[str, int]]:
        return [(record.details["day"], record.amount_microusd) for record in await self.records()]

    async def sound(self) -> None:
        async with self.database.read() as session:
            assert await verify(session) == []


@pytest.fixture
async def bench(database: Database) -> Bench:
    bench = Bench(database)
    await bench.lease.try_acquire()
    await price(database, 1, NOON - timedelta(days=100), PRICE)
    return bench


async def price(database: Database, number: int, effective_from: datetime, microusd: int) -> None:
    async with database.write() as session:
        session.add(
            PriceVersion(
                id="price" if number == 1 else f"price{number}",
                number=number,
                effective_from=effective_from,
                gpu_microusd_per_hour={"cpu": 360_000},
                storage_microusd_per_gib_month=microusd,
            )
        )


async def upload(database: Database, size: int, at: datetime, **fields: Any) -> tuple[str, str]:
    """Ids of a team and its dataset."""
    async with database.write() as session:
        team = await make_team(session)
        dataset = await make_dataset(session, team, file_size=size, uploaded_at=at, **fields)
        return team.id, dataset.id


async def test_a_finished_day_is_charged_once(bench: Bench) -> None:
    team_id, _ = await upload(bench.database, GIB, NOON - timedelta(days=1))
    assert await bench.accrual.catch_up() == 1
    assert await bench.accrual.catch_up() == await Accrual(bench.database, bench.lease).catch_up() == 0
    (record,) = await bench.records()
    assert (record.cost_type, record.amount_microusd, record.job_id) == ("STORAGE", 500_000, None)
    assert record.dedupe_key == f"storage:{team_id}:2026-04-09"
    assert record.billing_period == NOON.replace(hour=0)
    assert record.details == {
        "kind": "charge",
        "day": "2026-04-09",
        "bytes": GIB // 2,
        "gibDays": "0.500000000",
        "datasets": GIB // 2,
        "priceVersion": 1,
    }
    await bench.sound()


async def test_schedulers_at_once_charge_a_day_once(bench: Bench) -> None:
    await upload(bench.database, GIB, NOON - timedelta(days=3))
    made = await asyncio.gather(*(Accrual(bench.database, bench.lease).catch_up() for _ in range(3)))
    assert sum(made) == len(await bench.records()) == 3


async def test_missed_days_are_caught_up_within_bounds(bench: Bench, clock: list[datetime]) -> None:
    await upload(bench.database, GIB, NOON - timedelta(days=4))
    await bench.accrual.catch_up()
    assert len(await bench.records()) == 4
    clock[0] += timedelta(days=3)
    assert await bench.accrual.catch_up() == 3
    clock[0] -= timedelta(days=5)
    assert await bench.accrual.catch_up() == 0
    clock[0] += timedelta(days=300)
    assert await bench.accrual.catch_up() == 31
    await bench.sound()


async def test_each_day_has_the_price_and_the_length_of_its_month(bench: Bench, clock: list[datetime]) -> None:
    clock[0] = datetime(2026, 5, 2, 1, tzinfo=UTC)
    await upload(bench.database, GIB, datetime(2026, 4, 30, tzinfo=UTC))
    await price(bench.database, 2, datetime(2026, 5, 1, tzinfo=UTC), 2 * PRICE)
    await price(bench.database, 3, datetime(2026, 5, 1, 0, 0, 1, tzinfo=UTC), 9 * PRICE)
    await bench.accrual.catch_up()
    assert await bench.amounts() == [("2026-04-30", 1_000_000), ("2026-05-01", round(Fraction(2 * PRICE, 31)))]
    assert [record.details["priceVersion"] for record in await bench.records()] == [1, 2]
    await bench.sound()


async def test_what_is_deleted_costs_until_its_files_go(bench: Bench, clock: list[datetime]) -> None:
    """Datasets and models for 7 days more, checkpoints until they are deleted; an upload that is not there, nothing."""
    start = datetime(2026, 4, 1, tzinfo=UTC)
    clock[0] = start + timedelta(days=20)
    async with bench.database.write() as session:
        job, attempt = await make_running_job(session)
        dataset = await session.get_one(Dataset, job.dataset_id)
        dataset.file_size, dataset.uploaded_at, dataset.deleted_at = GIB, start, start + timedelta(days=1)
        await make_dataset(session, await session.get_one(Team, job.team_id), file_size=GIB, status="UPLOADING")
        point = {"epoch": 0, "loss": 1.0, "storage_key": "k", "sha256": "0", "usage": {}}
        session.add(
            Checkpoint(
                job_id=job.id,
                attempt_id=attempt.id,
                step=1,
                file_size=2 * GIB,
                created_at=start,
                deleted_at=start + timedelta(hours=12),
                **point,
            )
        )
        session.add(
            ModelArtifact(
                team_id=job.team_id,
                created_by=job.created_by,
                job_id=job.id,
                dataset_id=job.dataset_id,
                name="m",
                quality_metrics={},
                training_summary={},
                configuration={},
                artifacts={"a": {"size": GIB}, "b": {"size": 3 * GIB}},
                created_at=start,
                deleted_at=start + timedelta(days=2),
            )
        )
    await bench.accrual.catch_up()
    dollars = [(day[-2:], amount / 1e6) for day, amount in await bench.amounts()]
    assert dollars == [("01", 6.0), *((f"{day:02}", 5.0) for day in range(2, 9)), ("09", 4.0)]
    await bench.sound()


async def test_rounded_half_even_once_and_nothing_for_nothing(bench: Bench) -> None:
    start = datetime(2026, 4, 9, tzinfo=UTC)
    for size in (500, 2**23, 3 * 2**23):  # a half: 2**23 bytes for a day are 7812.5 micro-dollars
        await upload(bench.database, size, start)
    await bench.accrual.catch_up()
    assert sorted(amount for _, amount in await bench.amounts()) == [7812, 23438]


async def test_it_counts_against_the_budget_and_alerts(bench: Bench) -> None:
    async with bench.database.write() as session:
        team = await make_team(session, budget_microusd=2_500_000)
        await make_dataset(session, team, file_size=GIB, uploaded_at=NOON - timedelta(days=10))
        await make_job(session, team, held_microusd=1_000)
    await bench.accrual.catch_up()
    async with bench.database.read() as session:
        told = await session.scalars(select(Notification.details).where(Notification.type == "COST_ALERT"))
        assert sorted((details or {})["threshold"] for details in told) == [80, 100]
        assert (await session.scalars(select(TrainingJob.current_cost_microusd))).one() == 0
    await bench.sound()


async def test_a_superseded_scheduler_charges_nothing(bench: Bench) -> None:
    await upload(bench.database, GIB, NOON - timedelta(days=2))
    bench.lease.epoch -= 1
    with pytest.raises(LeaseLost):
        await bench.accrual.run()
    assert await bench.records() == []
