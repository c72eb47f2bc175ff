"""What tests of the scheduler look at, and what they ask of it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from control_plane.services.lifecycle import request_stop
from control_plane.states import StopReason
from control_plane.tables import TrainingJob
from scheduler.verify import verify
from tests.integration.scheduler.conftest import House

PLAN = {"type": "plan", "total_steps": 20, "total_epochs": 1, "train_conversations": 80, "validation_conversations": 8}


async def rows(house: House, table: Any, *where: Any) -> list[Any]:
    async with house.database.read() as session:
        return list(await session.scalars(select(table).where(*where).order_by(table.id)))


async def in_order(house: House) -> None:
    """The ledger balances."""
    async with house.database.read() as session:
        assert await verify(session) == []


async def stop(house: House, job_id: str, reason: StopReason) -> bool:
    async with house.database.write() as session:
        return await request_stop(session, await session.get_one(TrainingJob, job_id), reason)
