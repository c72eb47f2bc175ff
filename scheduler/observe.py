"""What the database knows, as the policy sees it."""

from __future__ import annotations

import logging

from sqlalchemy import or_, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.services import paused
from control_plane.services.catalog import Catalog
from control_plane.states import Status, StopReason, WorkKind
from control_plane.tables import Attempt, TrainingJob
from scheduler.dispatch import demand_of, missing
from scheduler.policy import Held, Waiting
from scheduler.work import AnyWork, get_many, queued

log = logging.getLogger(__name__)


async def waiting_work(session: AsyncSession, catalog: Catalog) -> tuple[Waiting, ...]:
    return tuple([_waiting(kind, work, catalog) for kind in WorkKind for work in await queued(session, kind)])


def _waiting(kind: WorkKind, work: AnyWork, catalog: Catalog) -> Waiting:
    return Waiting(
        kind=kind,
        work_id=work.id,
        demand=demand_of(work, catalog),
        priority=work.priority,
        queued_at=work.queued_at,
        not_before=work.not_before,
        needs_tracking=isinstance(work, TrainingJob) and work.mlflow_run_id is None,
        reason=work.queue_reason,
        blocked=missing(work, catalog),
    )


async def held_attempts(session: AsyncSession, catalog: Catalog) -> tuple[Held, ...]:
    """Attempts that have not ended, or whose actors are not known to be gone."""
    attempts = list(
        await session.scalars(
            select(Attempt).where(or_(Attempt.outcome.is_(None), Attempt.released.is_(False))).order_by(Attempt.id)
        )
    )
    works: dict[str, AnyWork] = {}
    for kind in WorkKind:
        works |= await get_many(session, kind, [a.work_id for a in attempts if a.work_kind is kind])
    return tuple(_held(attempt, works.get(attempt.work_id), catalog) for attempt in attempts)


def _held(attempt: Attempt, work: AnyWork | None, catalog: Catalog) -> Held:
    """``work`` is None for an ended attempt of a verdict that has been asked for anew."""
    return Held(
        kind=attempt.work_kind,
        work_id=attempt.work_id,
        attempt_id=attempt.id,
        name=attempt.actor_name,
        demand=demand_of(work, catalog) if work else None,
        cluster_id=attempt.cluster_id,
        ended=attempt.outcome is not None,
        stop_requested=work.stop_requested if work else None,
        reconnecting=work.reconnecting if work else False,
    )


async def paused_by_budget(session: AsyncSession) -> list[str]:
    """Ids of jobs that the budget has paused and now lets go on, in the order in which they go on."""
    jobs = await session.scalars(
        select(TrainingJob)
        .where(TrainingJob.status == Status.PAUSED, TrainingJob.paused_by == StopReason.BUDGET)
        .order_by(TrainingJob.priority.desc(), TrainingJob.queued_at, TrainingJob.id)
    )
    return [job.id for job in jobs.all() if await _budget_allows(session, job)]


async def _budget_allows(session: AsyncSession, job: TrainingJob) -> bool:
    """What is wrong with one job keeps no other from going on."""
    try:
        return (await paused.means(session, job)).sufficient
    except DBAPIError:
        raise
    except Exception:
        log.exception("whether the budget lets %s go on cannot be told", job.id)
        return False
