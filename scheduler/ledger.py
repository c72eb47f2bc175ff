"""The one writer of COMPUTE records and of attempt usage. Everything runs in the caller's transaction, under the job
row's lock.

GPU time is cumulative per (attempt, rank, kind) and only ever raised; a job is billed for all of it that is not
absorbed: round_half_even(Σ billed ms × price per hour / 3,600,000), posted as the difference to what was posted
before, so that repeats change nothing and rounding never accumulates. ``details.gpuMs`` is signed: a reversal's is
negative, and an ``absorbed`` record carries the platform's time with amount 0.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import BigInteger, ColumnElement, case, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import charge
from control_plane.services import budget
from control_plane.states import Outcome, StopReason
from control_plane.tables import Attempt, AttemptUsage, BudgetHold, Checkpoint, CostRecord, PriceVersion, Team, now
from control_plane.tables import TrainingJob as Job
from control_plane.tables.money import CostType
from scheduler.executor import RankTimes

Usage = dict[str, dict[str, int]]
"""rank → kind → cumulative GPU-milliseconds."""

POSTING_MS = 10_000
"""GPU time that may stand unposted while a job runs."""
TAIL = "tail"
MS_PER_HOUR = 3_600_000


class Posted(NamedTuple):
    """What a job's COMPUTE records say."""

    amount_microusd: int
    gpu_ms: int
    """Charged less reversed."""


async def record(session: AsyncSession, attempt: Attempt, usage: Usage) -> None:
    """Raise the attempt's usage to ``usage``; lower or equal figures change nothing."""
    rows = await _usage_rows(session, attempt.id)
    for rank, kinds in usage.items():
        for kind, gpu_ms in kinds.items():
            row = rows.get((int(rank), kind))
            if row is None:
                row = AttemptUsage(attempt_id=attempt.id, rank=int(rank), kind=kind, gpu_ms=0, absorbed_ms=0)
                session.add(row)
            row.gpu_ms = max(row.gpu_ms, gpu_ms)
            if attempt.recovery and kind == "loading":
                row.absorbed_ms = row.gpu_ms
    await session.flush()


async def post(session: AsyncSession, job: Job, attempt: Attempt, *, least_ms: int = POSTING_MS) -> bool:
    """Post what the job owes beyond what is posted, once it is at least ``least_ms`` of GPU time. True if it did."""
    posted = await posted_for(session, job.id)
    billed_ms = await _billed_ms(session, job.id)
    difference = billed_ms - posted.gpu_ms
    if difference == 0 or abs(difference) < least_ms:
        return False
    amount = charge(billed_ms, job.price_microusd_per_hour) - posted.amount_microusd
    await _write(session, job, attempt, "charge" if difference > 0 else "reversal", difference, amount)
    job.current_cost_microusd = posted.amount_microusd + amount
    await session.flush()
    return True


async def settle(
    session: AsyncSession,
    job: Job,
    attempt: Attempt,
    *,
    outcome: Outcome,
    stop_reason: StopReason | None,
    times: list[RankTimes],
) -> None:
    """Close the attempt's account: absorb what the platform lost and the tails, post or reverse the rest."""
    rows = await _usage_rows(session, attempt.id)
    if outcome is Outcome.FAULT or stop_reason is StopReason.PREEMPT:
        await _absorb_lost(session, attempt, rows)
    _absorb_tails(session, attempt, rows, times)
    await session.flush()
    await post(session, job, attempt, least_ms=0)
    absorbed_ms = sum(row.absorbed_ms for row in (await _usage_rows(session, attempt.id)).values())
    if absorbed_ms:
        await _write(session, job, attempt, "absorbed", absorbed_ms, 0)
    await session.flush()


def held_ms(times: list[RankTimes]) -> int | None:
    """GPU-milliseconds that the ranks held; None when the cluster cannot tell of all of them."""
    if not times or any(rank.end_ms == 0 for rank in times):
        return None
    return sum(rank.end_ms - rank.start_ms for rank in times)


async def posted_for(session: AsyncSession, job_id: str) -> Posted:
    billed = CostRecord.details["kind"].as_string().in_(("charge", "reversal"))
    row = (
        await session.execute(
            select(
                func.coalesce(func.sum(CostRecord.amount_microusd), 0),
                func.coalesce(func.sum(case((billed, recorded_ms()), else_=0)), 0),
            ).where(CostRecord.job_id == job_id, CostRecord.cost_type == CostType.COMPUTE)
        )
    ).one()
    return Posted(int(row[0]), int(row[1]))


def recorded_ms() -> ColumnElement[int]:
    """``details.gpuMs`` of a cost record."""
    return cast(CostRecord.details["gpuMs"].as_string(), BigInteger)


async def allowance_ms(session: AsyncSession, job: Job, attempt: Attempt, ahead_ms: int) -> int:
    """GPU-milliseconds that the attempt may use in all: ``ahead_ms`` more than now, as far as the budget pays."""
    rows = (await _usage_rows(session, attempt.id)).values()
    used = sum(row.gpu_ms for row in rows)
    limit = await payable_ms(session, job)
    if limit is None:
        return used + ahead_ms
    unbilled = sum(row.absorbed_ms for row in rows)
    elsewhere = await _billed_ms(session, job.id) - (used - unbilled)
    return max(0, min(used + ahead_ms, limit - elsewhere + unbilled))


async def payable_ms(session: AsyncSession, job: Job) -> int | None:
    """Billed GPU-milliseconds that the job's hold and the team's free budget pay for; None: no budget is set."""
    team = await session.get_one(Team, job.team_id)
    if team.monthly_budget_microusd is None or job.price_microusd_per_hour == 0:
        return None
    free = await budget.available(session, job.team_id) or 0
    hold = await session.scalar(select(BudgetHold.amount_microusd).where(BudgetHold.job_id == job.id)) or 0
    return max(0, hold + free) * MS_PER_HOUR // job.price_microusd_per_hour


async def can_go_on(session: AsyncSession, job: Job) -> bool:
    """Whether the budget pays for more of the job than it has been billed for."""
    limit = await payable_ms(session, job)
    return limit is None or limit > await _billed_ms(session, job.id)


async def _usage_rows(session: AsyncSession, attempt_id: str) -> dict[tuple[int, str], AttemptUsage]:
    rows = await session.scalars(select(AttemptUsage).where(AttemptUsage.attempt_id == attempt_id))
    return {(row.rank, row.kind): row for row in rows}


async def _billed_ms(session: AsyncSession, job_id: str) -> int:
    total = await session.scalar(
        select(func.coalesce(func.sum(AttemptUsage.gpu_ms - AttemptUsage.absorbed_ms), 0))
        .join(Attempt, Attempt.id == AttemptUsage.attempt_id)
        .where(Attempt.work_id == job_id)
    )
    return int(total or 0)


async def _absorb_lost(session: AsyncSession, attempt: Attempt, rows: dict[tuple[int, str], AttemptUsage]) -> None:
    """Everything after the attempt's last stored checkpoint is the platform's; all of it if there is none."""
    saved = await session.scalar(
        select(Checkpoint.usage).where(Checkpoint.attempt_id == attempt.id).order_by(Checkpoint.step.desc()).limit(1)
    )
    for (rank, kind), row in rows.items():
        kept = (saved or {}).get(str(rank), {}).get(kind, 0)
        row.absorbed_ms = max(row.absorbed_ms, row.gpu_ms - min(kept, row.gpu_ms))


def _absorb_tails(
    session: AsyncSession, attempt: Attempt, rows: dict[tuple[int, str], AttemptUsage], times: list[RankTimes]
) -> None:
    """What a rank held, by Ray's table, beyond what it reported."""
    for rank in times:
        reported = sum(row.gpu_ms for (number, _), row in rows.items() if number == rank.rank)
        tail = rank.end_ms - rank.start_ms - reported
        if rank.end_ms and tail > 0:
            session.add(AttemptUsage(attempt_id=attempt.id, rank=rank.rank, kind=TAIL, gpu_ms=tail, absorbed_ms=tail))


async def _write(session: AsyncSession, job: Job, attempt: Attempt, kind: str, gpu_ms: int, amount: int) -> None:
    at = now()
    version = await session.scalar(select(PriceVersion.number).where(PriceVersion.id == job.price_version_id))
    session.add(
        CostRecord(
            team_id=job.team_id,
            created_by=job.created_by,
            job_id=job.id,
            attempt_id=attempt.id,
            cost_type=CostType.COMPUTE,
            amount_microusd=amount,
            details={
                "kind": kind,
                "gpuType": job.gpu_type,
                "gpuCount": job.gpu_count,
                "gpuMs": gpu_ms,
                "priceVersion": version,
            },
            billing_period=at.replace(hour=0, minute=0, second=0, microsecond=0),
            recorded_at=at,
        )
    )
