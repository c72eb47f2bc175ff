"""The one writer of COMPUTE records and of attempt usage. Everything runs in the caller's transaction, under the job
row's lock.

GPU time is cumulative per (attempt, rank, kind) and only ever raised. An attempt is billed for all of its time that is
not absorbed, posted as the difference to what was posted before; the job's amount is round_half_even(Σ posted ms ×
price per hour / 3,600,000) after every posting, so that repeats change nothing and rounding never accumulates.
``details.gpuMs`` is signed: a reversal's is negative, and an ``absorbed`` record carries the platform's time with
amount 0.

What an attempt may use is reserved before it is granted: the job's hold is raised out of the team's free budget, under
the lock of the team's row, so that no two jobs are granted the same money.
"""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import case, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import charge
from control_plane.services import budget
from control_plane.states import TERMINAL, Outcome, StopReason
from control_plane.tables import Attempt, AttemptUsage, BudgetHold, Checkpoint, CostRecord, PriceVersion, now
from control_plane.tables import TrainingJob as Job
from control_plane.tables.money import CostType, gpu_ms_of_record, kind_of_record
from scheduler.executor import RankTimes

Usage = dict[str, dict[str, int]]
"""rank → kind → cumulative GPU-milliseconds."""

POSTING_MS = 10_000
"""GPU time that may stand unposted while a job runs."""
RESERVE_MS = 60_000
"""GPU time of each rank that a running job keeps reserved ahead of its use, as far as the budget allows."""
TAIL = "tail"
MS_PER_HOUR = 3_600_000


class Posted(NamedTuple):
    """What a job's COMPUTE records say, and those of one attempt."""

    amount_microusd: int
    gpu_ms: int
    """Charged less reversed."""
    attempt_ms: int
    attempt_absorbed_ms: int


async def record(session: AsyncSession, attempt: Attempt, usage: Usage) -> None:
    """Raise the attempt's usage to ``usage``; lower or equal figures, and an attempt that has ended, change nothing."""
    if attempt.outcome is not None:
        return
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


async def usage_of(session: AsyncSession, attempt_id: str) -> Usage:
    """What is recorded of an attempt's use."""
    usage: Usage = {}
    for (rank, kind), row in (await _usage_rows(session, attempt_id)).items():
        usage.setdefault(str(rank), {})[kind] = row.gpu_ms
    return usage


async def post(session: AsyncSession, job: Job, attempt: Attempt, *, least_ms: int = POSTING_MS) -> bool:
    """Post what the attempt owes beyond what is posted, once it is at least ``least_ms``. True if it did."""
    posted = await _posted(session, job.id, attempt.id)
    difference = await _billed_ms(session, job.id, attempt.id) - posted.attempt_ms
    if difference == 0 or abs(difference) < least_ms:
        return False
    amount = charge(posted.gpu_ms + difference, job.price_microusd_per_hour) - posted.amount_microusd
    await _write(session, job, attempt, "charge" if difference > 0 else "reversal", difference, amount)
    job.current_cost_microusd = posted.amount_microusd + amount
    if job.status in TERMINAL:
        job.final_cost_microusd = job.current_cost_microusd
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
        _absorb_beyond(rows, await _last_stamp(session, attempt.id))
    _absorb_tails(session, attempt, rows, times)
    await _balance(session, job, attempt)


async def absorb_past(session: AsyncSession, job: Job, checkpoint: Checkpoint | None) -> bool:
    """The job's newer checkpoints were torn: what its attempts that have ended were billed past ``checkpoint`` (None:
    from the start) is the platform's. True if that was anything."""
    ended = select(Attempt).where(Attempt.work_id == job.id, Attempt.outcome.is_not(None)).order_by(Attempt.number)
    absorbed, reached = False, checkpoint is None
    for attempt in await session.scalars(ended):
        stamp: Usage = {}
        if checkpoint is not None and attempt.id == checkpoint.attempt_id:
            stamp, reached = checkpoint.usage, True
        if reached:
            _absorb_beyond(await _usage_rows(session, attempt.id), stamp)
            absorbed = await _balance(session, job, attempt) or absorbed
    return absorbed


def held_ms(times: list[RankTimes]) -> int | None:
    """GPU-milliseconds that the ranks held; None when the cluster cannot tell of all of them."""
    if not times or any(rank.end_ms == 0 for rank in times):
        return None
    return sum(rank.end_ms - rank.start_ms for rank in times)


async def reserve(session: AsyncSession, job: Job, *, ahead_ms: int) -> None:
    """Raise the job's hold, so far as the team's free budget goes, when it runs out within ``RESERVE_MS`` a rank (or
    ``ahead_ms``, if that is less). To be called in the transaction that stores usage, before ``allowance_ms``."""
    limit = await covered_ms(session, job)
    ahead_ms = min(ahead_ms, RESERVE_MS * job.gpu_count)
    billed_ms = await _billed_ms(session, job.id)
    if limit is None or limit - billed_ms >= ahead_ms:
        return
    await budget.lock_team(session, job.team_id)
    free = await budget.available(session, job.team_id) or 0
    hold = await session.scalar(
        select(BudgetHold).where(BudgetHold.job_id == job.id).execution_options(populate_existing=True)
    )
    if hold is not None and free > 0:
        wanted = charge(billed_ms + 2 * ahead_ms, job.price_microusd_per_hour)
        payable = max(hold.amount_microusd, job.current_cost_microusd) + free
        hold.amount_microusd = max(hold.amount_microusd, min(wanted, payable))
        await session.flush()


async def allowance_ms(session: AsyncSession, job: Job, attempt: Attempt, ahead_ms: int) -> int:
    """GPU-milliseconds that the attempt may use in all: ``ahead_ms`` more than now, as far as the job's hold pays."""
    rows = (await _usage_rows(session, attempt.id)).values()
    used = sum(row.gpu_ms for row in rows)
    limit = await covered_ms(session, job)
    if limit is None:
        return used + ahead_ms
    unbilled = sum(row.absorbed_ms for row in rows)
    elsewhere = await _billed_ms(session, job.id) - (used - unbilled)
    return max(0, min(used + ahead_ms, limit - elsewhere + unbilled))


async def covered_ms(session: AsyncSession, job: Job) -> int | None:
    """Billed GPU-milliseconds that the job's hold pays for, less what the team's budget lacks; None: no budget."""
    free = await budget.available(session, job.team_id)
    if free is None or job.price_microusd_per_hour == 0:
        return None
    return _ms_for(await _hold_microusd(session, job.id) + min(free, 0), job)


def _ms_for(amount_microusd: int, job: Job) -> int:
    return max(0, amount_microusd) * MS_PER_HOUR // job.price_microusd_per_hour


async def _hold_microusd(session: AsyncSession, job_id: str) -> int:
    return await session.scalar(select(BudgetHold.amount_microusd).where(BudgetHold.job_id == job_id)) or 0


async def _posted(session: AsyncSession, job_id: str, attempt_id: str) -> Posted:
    billed = kind_of_record().in_(("charge", "reversal"))
    ours = CostRecord.attempt_id == attempt_id
    sums = [
        func.coalesce(func.sum(figure), 0)
        for figure in (
            CostRecord.amount_microusd,
            case((billed, gpu_ms_of_record()), else_=0),
            case((billed & ours, gpu_ms_of_record()), else_=0),
            case((~billed & ours, gpu_ms_of_record()), else_=0),
        )
    ]
    found = await session.execute(
        select(*sums).where(CostRecord.job_id == job_id, CostRecord.cost_type == CostType.COMPUTE)
    )
    return Posted(*map(int, found.one()))


async def _usage_rows(session: AsyncSession, attempt_id: str) -> dict[tuple[int, str], AttemptUsage]:
    rows = await session.scalars(select(AttemptUsage).where(AttemptUsage.attempt_id == attempt_id))
    return {(row.rank, row.kind): row for row in rows}


async def _billed_ms(session: AsyncSession, job_id: str, attempt_id: str | None = None) -> int:
    """Of the job, or of one attempt."""
    total = (
        select(func.coalesce(func.sum(AttemptUsage.gpu_ms - AttemptUsage.absorbed_ms), 0))
        .join(Attempt, Attempt.id == AttemptUsage.attempt_id)
        .where(Attempt.work_id == job_id)
    )
    if attempt_id is not None:
        total = total.where(Attempt.id == attempt_id)
    return int(await session.scalar(total) or 0)


async def _last_stamp(session: AsyncSession, attempt_id: str) -> Usage:
    """The attempt's usage when it wrote its last stored checkpoint; nothing if there is none."""
    stamp: Usage | None = await session.scalar(
        select(Checkpoint.usage).where(Checkpoint.attempt_id == attempt_id).order_by(Checkpoint.step.desc()).limit(1)
    )
    return stamp or {}


def _absorb_beyond(rows: dict[tuple[int, str], AttemptUsage], stamp: Usage) -> None:
    """What was used after ``stamp`` is the platform's. A rank that the stamp does not know has saved nothing."""
    for (rank, kind), row in rows.items():
        kept = stamp.get(str(rank), {}).get(kind, 0)
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


async def _balance(session: AsyncSession, job: Job, attempt: Attempt) -> bool:
    """Make the records of an attempt that has ended say what its usage says. True if they did not."""
    await session.flush()
    posted = await post(session, job, attempt, least_ms=0)
    absorbed_ms = sum(row.absorbed_ms for row in (await _usage_rows(session, attempt.id)).values())
    unrecorded = absorbed_ms - (await _posted(session, job.id, attempt.id)).attempt_absorbed_ms
    if unrecorded:
        await _write(session, job, attempt, "absorbed", unrecorded, 0)
        await session.flush()
    return posted or bool(unrecorded)


async def _write(session: AsyncSession, job: Job, attempt: Attempt, kind: str, gpu_ms: int, amount: int) -> None:
    """A job's records are ordered by ``recorded_at``, whatever the clocks of successive schedulers say."""
    at = now()
    last_at = await session.scalar(select(func.max(CostRecord.recorded_at)).where(CostRecord.job_id == job.id))
    if last_at is not None and last_at >= at:
        at = last_at + timedelta(microseconds=1)
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
            created_at=at,
            updated_at=at,
        )
    )
