"""What a job told of itself: metrics, logs, checkpoints, attempts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.schemas.base import Pagination
from control_plane.schemas.jobs import AttemptOut, CheckpointOut, LogOut, MetricsOut
from control_plane.services.lineage import inherited
from control_plane.services.listing import Paging, paginate
from control_plane.states import WorkKind
from control_plane.tables import Attempt, Checkpoint, JobLog, MetricsPoint

HISTORY_POINTS = 500


class Point(NamedTuple):
    step: int
    loss: float
    evaluated: bool


async def metrics(session: AsyncSession, job_id: str, max_points: int = HISTORY_POINTS) -> list[MetricsOut]:
    """A job's curve in at most ``max_points`` (≥ 2) points: the ends, the extremes of the loss, the evaluations.

    A job that goes on from others (``retryOf``) has their steps before its own.
    """
    table = MetricsPoint
    wanted = table.job_id == job_id
    for stretch in await inherited(session, job_id):
        wanted |= (table.job_id == stretch.job_id) & (table.step <= stretch.up_to_step)
    light = await session.execute(
        select(table.step, table.training_loss, table.validation_loss.is_not(None)).where(wanted).order_by(table.step)
    )
    points = [Point(*row) for row in light]
    query = select(table).where(wanted).order_by(table.step)
    if len(points) > max_points:
        query = query.where(table.step.in_(downsample(points, max_points)))
    return [MetricsOut.of(row) for row in await session.scalars(query)]


def downsample(points: Sequence[Point], most: int) -> list[int]:
    """Steps to show: first and last, then evaluations as far as half the room goes, then each stretch's extremes."""
    if len(points) <= most:
        return [p.step for p in points]
    kept = {points[0].step, points[-1].step}
    evaluated = [p.step for p in points if p.evaluated]
    room = max(0, (most - 2) // 2)
    if room:
        kept.update(evaluated[:: -(-len(evaluated) // room)] if len(evaluated) > room else evaluated)
    buckets = (most - len(kept)) // 2
    if buckets:
        size = len(points) / buckets
        for i in range(buckets):
            stretch = points[int(i * size) : int((i + 1) * size)]
            if stretch:
                kept.add(min(stretch, key=lambda p: p.loss).step)
                kept.add(max(stretch, key=lambda p: p.loss).step)
    return sorted(kept)


async def logs(
    session: AsyncSession, job_id: str, paging: Paging, level: str | None
) -> tuple[list[LogOut], Pagination]:
    query = select(JobLog).where(JobLog.job_id == job_id)
    if level is not None:
        query = query.where(JobLog.level == level)
    rows, pagination = await paginate(session, query, paging, {"timestamp": JobLog.timestamp}, JobLog.id)
    return [LogOut.of(row, metadata=row.details) for row in rows], pagination


async def checkpoints(session: AsyncSession, job_id: str) -> list[CheckpointOut]:
    query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step, Checkpoint.id)
    return [CheckpointOut.of(row) for row in await session.scalars(query)]


async def attempts(session: AsyncSession, job_id: str) -> list[AttemptOut]:
    query = select(Attempt).where(Attempt.work_id == job_id, Attempt.work_kind == WorkKind.JOB).order_by(Attempt.number)
    return [AttemptOut.of(row) for row in await session.scalars(query)]
