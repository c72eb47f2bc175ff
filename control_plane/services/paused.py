"""Paused jobs, and what lets them go on: a user's word, or for those that the budget paused the budget itself.

The rule: a paused job goes on when its team's budget pays for loading it again and for training up to its next
checkpoint, by what both have taken so far. So it never goes on without getting further.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import BudgetExceeded, Conflict
from control_plane.money import charge, usd
from control_plane.services import budget, lifecycle
from control_plane.states import Status, StopReason
from control_plane.tables import Attempt, AttemptUsage, BudgetHold, Checkpoint, CostRecord, TrainingJob
from control_plane.tables.money import CostType

LOADING, WORK = "loading", ("training", "evaluating", "saving")
"""Kinds of usage."""


class Means(NamedTuple):
    """What a job needs to get further, and what it may still cost; micro-dollars."""

    needed: int
    left: int | None
    """Rest of its hold and the team's free budget; None: unlimited, or it costs nothing."""

    @property
    def sufficient(self) -> bool:
        return self.left is None or (self.left > 0 and self.needed <= self.left)


async def means(session: AsyncSession, job: TrainingJob) -> Means:
    needed = charge(await _needed_ms(session, job), job.price_microusd_per_hour)
    free = await budget.available(session, job.team_id)
    if free is None or job.price_microusd_per_hour == 0:
        return Means(needed, None)
    hold = await _hold(session, job.id)
    rest = max(0, hold.amount_microusd - await _charged(session, job.id)) if hold else 0
    return Means(needed, rest + free)


async def secure(session: AsyncSession, job: TrainingJob) -> bool:
    """Hold what the job needs to go on, if the budget allows it, so that no other is promised the same money."""
    await budget.lock_team(session, job.team_id)
    found = await means(session, job)
    hold = await _hold(session, job.id)
    if found.sufficient and hold is not None:
        hold.amount_microusd = max(hold.amount_microusd, await _charged(session, job.id) + found.needed)
        await session.flush()
    return found.sufficient


async def go_on(session: AsyncSession, job: TrainingJob) -> bool:
    """Queue a job that the budget has paused, if it allows it to go on. ``job``: its row is locked."""
    if job.status is not Status.PAUSED or job.paused_by is not StopReason.BUDGET or not await secure(session, job):
        return False
    return await _queue(session, job)


async def resume(session: AsyncSession, job: TrainingJob) -> None:
    """As the user asks. ``job``: its row is locked. Raises Conflict unless it is paused, BudgetExceeded."""
    if job.status is not Status.PAUSED:
        raise Conflict(lifecycle.refusal("resume", job))
    if not await secure(session, job):
        raise BudgetExceeded(await waits_for(session, job))
    await _queue(session, job)


async def _queue(session: AsyncSession, job: TrainingJob) -> bool:
    if job.paused_by is StopReason.BUDGET:
        told = "The budget allows it again: the job goes on from its last checkpoint."
        await lifecycle.note(session, job, "INFO", told)
    return await lifecycle.transition(session, job, Status.QUEUED)


async def waits_for(session: AsyncSession, job: TrainingJob) -> str:
    """What a paused job waits for that the budget does not let go on."""
    needed, left = await means(session, job)
    then = "can be resumed" if job.paused_by is StopReason.PAUSE else "goes on by itself"
    return (
        f"The monthly budget leaves {usd(max(0, left or 0))} USD for this job; it {then} once it leaves "
        f"{usd(max(1, needed))} USD, enough to load it and reach its next checkpoint (PUT /api/budget raises it)"
    )


async def _needed_ms(session: AsyncSession, job: TrainingJob) -> int:
    """GPU-milliseconds to load the job again and to train up to its next checkpoint."""
    spent = (
        await session.execute(
            select(AttemptUsage.attempt_id, AttemptUsage.kind, func.sum(AttemptUsage.gpu_ms).label("gpu_ms"))
            .join(Attempt, Attempt.id == AttemptUsage.attempt_id)
            .where(Attempt.work_id == job.id)
            .group_by(AttemptUsage.attempt_id, AttemptUsage.kind)
        )
    ).all()
    loading = max((int(row.gpu_ms) for row in spent if row.kind == LOADING), default=0)
    work = sum(int(row.gpu_ms) for row in spent if row.kind in WORK)
    total, reached = job.total_steps or 1, job.current_step or 0
    trained = max(1, reached - await _first_step(session, job))
    interval = job.hyperparameters.get("checkpointSteps") or math.ceil(total / max(1, job.total_epochs))
    return loading + math.ceil(work / trained * max(1, min(interval, total - reached)))


async def _first_step(session: AsyncSession, job: TrainingJob) -> int:
    """Where its first attempt began: a retry goes on from a checkpoint of the job that it retries."""
    begun = (
        select(func.min(func.coalesce(Checkpoint.step, 0)))
        .select_from(Attempt)
        .outerjoin(Checkpoint, Checkpoint.id == Attempt.resumed_from)
        .where(Attempt.work_id == job.id, Attempt.started_at.is_not(None))
    )
    return int(await session.scalar(begun) or 0)


async def _hold(session: AsyncSession, job_id: str) -> BudgetHold | None:
    found: BudgetHold | None = await session.scalar(
        select(BudgetHold).where(BudgetHold.job_id == job_id).execution_options(populate_existing=True)
    )
    return found


async def _charged(session: AsyncSession, job_id: str) -> int:
    total = select(func.coalesce(func.sum(CostRecord.amount_microusd), 0))
    mine = (CostRecord.job_id == job_id, CostRecord.cost_type == CostType.COMPUTE)
    return int(await session.scalar(total.where(*mine)) or 0)
