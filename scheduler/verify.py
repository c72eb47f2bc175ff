"""The ledger's invariants, checked from the rows alone."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import charge
from control_plane.states import TERMINAL
from control_plane.tables import (
    Attempt,
    AttemptUsage,
    BudgetHold,
    CostRecord,
    PriceVersion,
    TrainingJob,
)
from control_plane.tables.money import CostType, HoldState, gpu_ms_of_record, kind_of_record

TOLERANCE_MS = 250
"""By which reported and held time of one rank may differ."""


class Violation(NamedTuple):
    rule: str
    object_id: str
    """Of the job or the attempt."""
    message: str


async def verify(session: AsyncSession) -> list[Violation]:
    """Every violation of what architecture says of money; none in a ledger that balances."""
    found: list[Violation] = []
    for job in await session.scalars(select(TrainingJob).order_by(TrainingJob.id)):
        usage = await _usage(session, job.id)
        found += await _check_price(session, job)
        found += await _check_postings(session, job, usage)
        found += await _check_attempts(session, job)
        found += await _check_end(session, job)
    return found


class _Usage(NamedTuple):
    gpu_ms: int
    absorbed_ms: int


async def _usage(session: AsyncSession, job_id: str) -> _Usage:
    row = (
        await session.execute(
            select(
                func.coalesce(func.sum(AttemptUsage.gpu_ms), 0), func.coalesce(func.sum(AttemptUsage.absorbed_ms), 0)
            )
            .join(Attempt, Attempt.id == AttemptUsage.attempt_id)
            .where(Attempt.work_id == job_id)
        )
    ).one()
    return _Usage(int(row[0]), int(row[1]))


async def _check_price(session: AsyncSession, job: TrainingJob) -> list[Violation]:
    version = await session.get_one(PriceVersion, job.price_version_id)
    pinned = version.gpu_microusd_per_hour.get(job.gpu_type)
    if pinned == job.price_microusd_per_hour:
        return []
    return [
        Violation("price pinned at acceptance", job.id, f"{job.price_microusd_per_hour}, its version says {pinned}")
    ]


async def _check_postings(session: AsyncSession, job: TrainingJob, usage: _Usage) -> list[Violation]:
    found = []
    row = (
        await session.execute(
            select(
                func.coalesce(func.sum(CostRecord.amount_microusd), 0),
                func.coalesce(func.sum(gpu_ms_of_record()).filter(kind_of_record() != "absorbed"), 0),
            ).where(CostRecord.job_id == job.id)
        )
    ).one()
    posted_amount, posted_ms = int(row[0]), int(row[1])
    owed = charge(posted_ms, job.price_microusd_per_hour)
    if posted_amount != owed:
        found.append(Violation("rounded once", job.id, f"{posted_amount} posted for what costs {owed}"))
    billed_ms = usage.gpu_ms - usage.absorbed_ms
    if posted_ms > billed_ms or (job.status in TERMINAL and posted_ms != billed_ms):
        found.append(Violation("posted what was used", job.id, f"{posted_ms} ms posted, {billed_ms} ms to bill"))
    return found


async def _check_attempts(session: AsyncSession, job: TrainingJob) -> list[Violation]:
    found = []
    for attempt in await session.scalars(select(Attempt).where(Attempt.work_id == job.id)):
        rows = list(await session.scalars(select(AttemptUsage).where(AttemptUsage.attempt_id == attempt.id)))
        found += [
            Violation("absorbed is part of used", attempt.id, f"rank {row.rank} {row.kind}: {row.absorbed_ms} ms")
            for row in rows
            if not 0 <= row.absorbed_ms <= row.gpu_ms
        ]
        if attempt.outcome is None:
            if job.status in TERMINAL:
                found.append(Violation("ended with its attempts", attempt.id, f"open, but the job is {job.status}"))
            continue
        used, absorbed = sum(row.gpu_ms for row in rows), sum(row.absorbed_ms for row in rows)
        tolerance = TOLERANCE_MS * job.gpu_count
        if attempt.held_ms is not None and abs(used - attempt.held_ms) > tolerance:
            found.append(Violation("billed + absorbed = held", attempt.id, f"{used} of {attempt.held_ms} ms"))
        recorded = await session.scalar(
            select(func.coalesce(func.sum(gpu_ms_of_record()), 0)).where(
                CostRecord.attempt_id == attempt.id, CostRecord.details["kind"].as_string() == "absorbed"
            )
        )
        if int(recorded or 0) != absorbed:
            found.append(Violation("absorbed is recorded", attempt.id, f"{recorded} of {absorbed} ms"))
    return found


async def _check_end(session: AsyncSession, job: TrainingJob) -> list[Violation]:
    hold = await session.scalar(select(BudgetHold).where(BudgetHold.job_id == job.id))
    ended = job.status in TERMINAL
    found = []
    if hold is not None and (hold.state is HoldState.CLOSED) != ended:
        found.append(Violation("held until the end", job.id, f"hold {hold.state}, job {job.status}"))
    total = await session.scalar(
        select(func.coalesce(func.sum(CostRecord.amount_microusd), 0)).where(
            CostRecord.job_id == job.id, CostRecord.cost_type == CostType.COMPUTE
        )
    )
    if ended and job.final_cost_microusd != int(total or 0):
        found.append(Violation("final cost is the sum", job.id, f"{job.final_cost_microusd}, records say {total}"))
    return found
