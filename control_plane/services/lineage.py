"""Jobs that go on from others: what a retried job inherits from those before it."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.tables import Attempt, Checkpoint, TrainingJob


class Inherited(NamedTuple):
    """A stretch of another job's training that a job goes on from."""

    job_id: str
    up_to_step: int


async def ancestors(session: AsyncSession, job: TrainingJob) -> list[str]:
    """Ids of the jobs that this one retries, the nearest first."""
    found: list[str] = []
    parent = job.retry_of
    while parent is not None:
        found.append(parent)
        parent = await session.scalar(select(TrainingJob.retry_of).where(TrainingJob.id == parent))
    return found


async def inherited(session: AsyncSession, job_id: str) -> list[Inherited]:
    """Whose steps stand before the job's own, the nearest first: those that its checkpoint to begin with counts."""
    found: list[Inherited] = []
    while True:
        begun = await session.execute(
            select(Checkpoint.job_id, Checkpoint.step)
            .select_from(Attempt)
            .outerjoin(Checkpoint, Checkpoint.id == Attempt.resumed_from)
            .where(Attempt.work_id == job_id, Checkpoint.job_id.is_distinct_from(job_id))
            .order_by(Attempt.number.desc())
            .limit(1)
        )
        whence = begun.first()
        if whence is None or whence.job_id is None:
            return found
        job_id = whence.job_id
        found.append(Inherited(job_id, min([whence.step, *(stretch.up_to_step for stretch in found)])))
