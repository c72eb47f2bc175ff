"""Both kinds of work by their kind."""

from __future__ import annotations

from typing import cast

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.services.sql import ROW
from control_plane.states import Status, WorkKind
from control_plane.tables import Attempt, TrainingJob, Verdict

AnyWork = TrainingJob | Verdict
TABLES: dict[WorkKind, type[TrainingJob] | type[Verdict]] = {WorkKind.JOB: TrainingJob, WorkKind.VERDICT: Verdict}


async def get_work(session: AsyncSession, kind: WorkKind, work_id: str, *, lock: bool = False) -> AnyWork:
    """The row as it is now; ``lock`` keeps it until the transaction ends. Raises NoResultFound."""
    row = await session.get_one(TABLES[kind], work_id, with_for_update=ROW if lock else None, populate_existing=True)
    return cast(AnyWork, row)


async def get_many(session: AsyncSession, kind: WorkKind, ids: list[str]) -> dict[str, AnyWork]:
    """Rows by id."""
    table = TABLES[kind]
    found = await session.scalars(select(table).where(table.id.in_(ids)))
    return {work.id: work for work in cast("list[AnyWork]", list(found))}


async def queued(session: AsyncSession, kind: WorkKind) -> list[AnyWork]:
    table = TABLES[kind]
    return cast("list[AnyWork]", list(await session.scalars(select(table).where(table.status == Status.QUEUED))))


def attempt_name(work: AnyWork) -> str:
    """Of the work's current attempt, and of its supervisor in the cluster."""
    return f"{work.id}/{work.attempt}"


async def attempt_of(session: AsyncSession, work: AnyWork) -> Attempt | None:
    """The work's current attempt, ended or not."""
    found: Attempt | None = await session.scalar(
        select(Attempt).where(Attempt.work_id == work.id, Attempt.number == work.attempt)
    )
    return found
