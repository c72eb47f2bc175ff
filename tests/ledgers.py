"""What tests do to a ledger: report, save, settle, look."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

from sqlalchemy import select

from control_plane.db import Database
from control_plane.services.lifecycle import transition
from control_plane.states import TERMINAL, Outcome, Status, StopReason
from control_plane.tables import Attempt, AttemptUsage, Checkpoint, CostRecord, TrainingJob, now
from scheduler import ledger
from scheduler.executor import RankTimes
from scheduler.finish import tell_cost
from scheduler.verify import Violation, verify
from tests.rows import PRICE, make_attempt, make_running_job

HOUR_MS = 3_600_000
Ids = tuple[str, str]
"""Of a job and its attempt."""


def price_of(gpu_ms: int, microusd_per_hour: int = PRICE) -> int:
    return round(Fraction(gpu_ms * microusd_per_hour, HOUR_MS))  # Fraction rounds half to even


async def running(database: Database, **fields: Any) -> Ids:
    async with database.write() as session:
        job, attempt = await make_running_job(session, **fields)
    return job.id, attempt.id


async def report(database: Database, ids: Ids, usage: ledger.Usage, *, least_ms: int = 10_000) -> bool:
    async with database.write() as session:
        job, attempt = await session.get_one(TrainingJob, ids[0]), await session.get_one(Attempt, ids[1])
        await ledger.record(session, attempt, usage)
        posted = await ledger.post(session, job, attempt, least_ms=least_ms)
        if posted:
            await tell_cost(session, job)
        return posted


async def settle(
    database: Database,
    ids: Ids,
    outcome: Outcome,
    *,
    held_ms: int | None = None,
    stop_reason: StopReason | None = None,
) -> None:
    """``held_ms``: what the ranks held; None: what they have reported."""
    async with database.write() as session:
        job, attempt = await session.get_one(TrainingJob, ids[0]), await session.get_one(Attempt, ids[1])
        rows = await session.scalars(select(AttemptUsage).where(AttemptUsage.attempt_id == attempt.id))
        held: Counter[int] = Counter({rank: 0 for rank in range(job.gpu_count)})
        for row in rows:
            held[row.rank] += row.gpu_ms
        if held_ms is not None:
            held = Counter({0: held_ms})
        times = [RankTimes(rank, 1_000, 1_000 + ms, "node") for rank, ms in held.items()]
        await ledger.settle(session, job, attempt, outcome=outcome, stop_reason=stop_reason, times=times)
        attempt.outcome, attempt.held_ms = outcome, ledger.held_ms(times)
        attempt.exit_reason = stop_reason if outcome is Outcome.STOPPED else None
        await tell_cost(session, job)


async def checkpoint(database: Database, ids: Ids, step: int, usage: ledger.Usage) -> str:
    async with database.write() as session:
        made = Checkpoint(
            job_id=ids[0],
            attempt_id=ids[1],
            step=step,
            epoch=0,
            loss=1.0,
            storage_key=f"k{step}",
            file_size=1,
            sha256="0",
            usage=usage,
        )
        session.add(made)
        await session.flush()
        return made.id


async def tear(database: Database, job_id: str, used_id: str | None, attempt_id: str) -> bool:
    """An attempt of the job, or of one that retries it, finds torn what is newer than the checkpoint ``used_id``."""
    async with database.write() as session:
        job, attempt = await session.get_one(TrainingJob, job_id), await session.get_one(Attempt, attempt_id)
        used = await session.get_one(Checkpoint, used_id) if used_id else None
        attempt.started_at, attempt.resumed_from = now(), used_id
        for point in await session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id)):
            if used is None or point.step > used.step:
                point.deleted_at = now()
        absorbed = await ledger.absorb_past(session, job, used)
        if job.status not in TERMINAL:
            await tell_cost(session, job)
        return absorbed


async def next_attempt(database: Database, ids: Ids, **fields: Any) -> Ids:
    async with database.write() as session:
        job = await session.get_one(TrainingJob, ids[0])
        job.attempt += 1
        return ids[0], (await make_attempt(session, job, **fields)).id


async def records(database: Database, job_id: str) -> list[tuple[str, int, int]]:
    """(kind, gpuMs, amount) in order."""
    async with database.read() as session:
        order = (CostRecord.recorded_at, CostRecord.id)
        found = await session.scalars(select(CostRecord).where(CostRecord.job_id == job_id).order_by(*order))
        return [(r.details["kind"], r.details["gpuMs"], r.amount_microusd) for r in found]


async def finish_job(database: Database, job_id: str, status: Status = Status.CANCELLED) -> TrainingJob:
    async with database.write() as session:
        job = await session.get_one(TrainingJob, job_id)
        await transition(session, job, status)
    return job


async def violations(database: Database) -> list[Violation]:
    async with database.read() as session:
        return await verify(session)
