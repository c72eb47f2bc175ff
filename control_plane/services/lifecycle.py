"""How work moves: guarded transitions, and the events that tell of them, in one transaction.

Nothing here commits. A transition that changes no row means that somebody else moved the work first: the caller
discards what it was about to do.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import Conflict
from control_plane.services import budget, outbox
from control_plane.services.sql import ROW
from control_plane.states import ACTIVE, AFTER_STOP, TERMINAL, Stage, Status, StopReason, may, sources
from control_plane.tables import CostRecord, JobEvent, JobLog, TrainingJob, Verdict, now
from control_plane.tables.money import CostType

AnyWork = TrainingJob | Verdict

STAGE_ON_ENTRY = {
    Status.QUEUED: Stage.QUEUED,
    Status.INITIALIZING: Stage.INITIALIZING,
    Status.COMPLETED: Stage.COMPLETED,
}
"""While it runs, the child's phases move the stage; a job that pauses, fails or is cancelled keeps its last one."""

_STRENGTH = (StopReason.PREEMPT, StopReason.BUDGET, StopReason.PAUSE, StopReason.CANCEL)


async def transition(
    session: AsyncSession, work: AnyWork, target: Status, *, attempt: int | None = None, **fields: Any
) -> bool:
    """Move ``work`` to ``target`` if it may go there, and (when given) if ``attempt`` is still its current one.

    Sets ``fields`` with it, refreshes ``work``, and for a job writes its ``stage`` event, at the end ``complete`` or
    ``error``; a job that ends has its hold closed and its final cost summed. False: nothing was changed.
    """
    await session.flush()
    table = type(work)
    guard = [table.id == work.id, table.status.in_(sources(target))]
    if attempt is not None:
        guard.append(table.attempt == attempt)
    values = {**_on_entry(work, target), **fields}
    changed = await session.execute(
        update(table).where(*guard).values(**values).execution_options(synchronize_session=False)
    )
    if changed.rowcount == 0:  # type: ignore[attr-defined]
        return False
    if isinstance(work, TrainingJob):
        if target in TERMINAL:
            await _close_books(session, work.id)
        await session.refresh(work)
        await append_event(session, work.id, "stage", stage_payload(work))
        await _tell_end(session, work)
        await outbox.job_moved(session, work)
    else:
        await session.refresh(work)
    return True


class NewEvent(NamedTuple):
    type: str
    payload: dict[str, Any]
    number: str | None = None


async def append_event(
    session: AsyncSession,
    job_id: str,
    type: str,
    payload: dict[str, Any],
    *,
    attempt_id: str | None = None,
    number: int | str | None = None,
) -> int:
    """Add an event to the job's stream and return its seq; the job's row stays locked until the commit.

    ``number`` says where within the attempt it came from; the same (attempt, number) is refused by the database.
    """
    origin = None if number is None else str(number)
    return await append_events(session, job_id, [NewEvent(type, payload, origin)], attempt_id=attempt_id)


async def append_events(
    session: AsyncSession, job_id: str, events: list[NewEvent], *, attempt_id: str | None = None
) -> int:
    """Like ``append_event``, for several at once; returns the last seq."""
    last = await session.scalar(
        update(TrainingJob)
        .where(TrainingJob.id == job_id)
        .values(event_seq=TrainingJob.event_seq + len(events))
        .returning(TrainingJob.event_seq)
        .execution_options(synchronize_session=False)
    )
    if last is None:
        raise LookupError(f"no job {job_id}")
    session.add_all(
        JobEvent(
            job_id=job_id,
            seq=last - len(events) + place,
            type=event.type,
            payload=event.payload,
            attempt_id=attempt_id if event.number is not None else None,
            number=event.number,
        )
        for place, event in enumerate(events, 1)
    )
    await session.flush()
    return last


async def request_stop(session: AsyncSession, work: AnyWork, reason: StopReason) -> bool:
    """End or pause ``work``: at once if nothing runs (True), else by asking the scheduler (False).

    A stronger reason replaces a weaker one that was asked before; repeating is harmless. A user's pause of a job that
    the budget has paused keeps it from going on by itself.
    Raises ``Conflict`` when the work has ended, or is already where the request would bring it.
    """
    await session.refresh(work, with_for_update=ROW)
    if work.status in ACTIVE:
        await ask_to_stop(session, work, reason)
        return False
    if work.status is Status.PAUSED and reason is StopReason.PAUSE and work.paused_by is not StopReason.PAUSE:
        work.paused_by, work.queue_reason = StopReason.PAUSE, None
        await _tell_stage(session, work)
        return True
    target = AFTER_STOP[reason]
    paused_by = reason if target is Status.PAUSED else None
    if not may(work.status, target) or not await transition(session, work, target, paused_by=paused_by):
        raise Conflict(refusal(reason.lower(), work))
    return True


async def ask_to_stop(session: AsyncSession, work: AnyWork, reason: StopReason) -> None:
    """Note that active work is to stop, or is stopping; a reason that is no stronger than the noted one is ignored."""
    if stronger(reason, work.stop_requested) is work.stop_requested:
        return
    work.stop_requested = reason
    if isinstance(work, TrainingJob):
        await note(session, work, "INFO", STOPPING[reason])
    await _tell_stage(session, work)


async def _tell_stage(session: AsyncSession, work: AnyWork) -> None:
    await session.flush()
    if isinstance(work, TrainingJob):
        await append_event(session, work.id, "stage", stage_payload(work))


STOPPING = {
    StopReason.CANCEL: "Stopping: the job is being cancelled. Its last checkpoint stays.",
    StopReason.PAUSE: "Stopping: the job is being paused, with a checkpoint from which it will go on.",
    StopReason.BUDGET: "Stopping: the GPU time that was granted is used up. The job saves a checkpoint.",
    StopReason.PREEMPT: "Stopping: the GPUs are needed elsewhere. The job saves a checkpoint and queues again.",
}


def refusal(action: str, work: AnyWork) -> str:
    """Why ``action`` (cancel, pause, resume, retry) is not for work in this status, and what is instead."""
    here = f"POST /api/jobs/{work.id}"
    instead = {
        Status.QUEUED: f"it starts by itself; {here}/pause or {here}/cancel keeps it from that",
        Status.INITIALIZING: f"wait until it has ended, or stop it: {here}/pause or {here}/cancel",
        Status.RUNNING: f"wait until it has ended, or stop it: {here}/pause or {here}/cancel",
        Status.PAUSED: f"{here}/resume lets it go on, {here}/cancel ends it",
        Status.COMPLETED: "its model is there; POST /api/jobs starts another job, from it with parentModelId",
        Status.FAILED: f"{here}/retry makes a new job that goes on from its last checkpoint",
        Status.CANCELLED: f"{here}/retry makes a new job that goes on from its last checkpoint",
    }[work.status]
    if work.status in ACTIVE and work.stop_requested:
        instead = "it is stopping already; wait until it has stopped"
    return f"Cannot {action} a job that is {work.status}: {instead}"


def stronger(one: StopReason | None, other: StopReason | None) -> StopReason | None:
    """Of two stop requests the one that wins: a cancel over a pause, a user's over the platform's."""
    return max(one, other, key=lambda reason: -1 if reason is None else _STRENGTH.index(reason))


async def note(
    session: AsyncSession, job: TrainingJob, level: str, message: str, metadata: dict[str, Any] | None = None
) -> None:
    """A log entry of the platform's own."""
    entry = log_entry(job.id, now(), level, message, metadata)
    session.add(entry)
    await append_event(session, job.id, "log", log_payload(entry))


def log_entry(job_id: str, at: datetime, level: str, message: str, metadata: dict[str, Any] | None = None) -> JobLog:
    return JobLog(job_id=job_id, timestamp=at, level=level, message=message, details=metadata)


def log_payload(entry: JobLog) -> dict[str, Any]:
    """The stream's ``log`` event."""
    payload = {"timestamp": iso(entry.timestamp), "level": entry.level, "message": entry.message}
    return {**payload, "metadata": entry.details} if entry.details else payload


def iso(at: datetime) -> str:
    """UTC with milliseconds and Z."""
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def stage_payload(job: TrainingJob) -> dict[str, Any]:
    """The stream's ``stage`` event."""
    return {
        "stage": job.current_stage,
        "status": job.status,
        "queueReason": job.queue_reason,
    }


def _on_entry(work: AnyWork, target: Status) -> dict[str, Any]:
    values: dict[str, Any] = {"status": target}
    if target is not Status.RUNNING:
        values |= {"queue_reason": None, "reconnecting": False}
    if target is Status.QUEUED:
        values |= {"paused_by": None, "stop_requested": None}
    if target is Status.PAUSED or target in TERMINAL:
        values |= {"stop_requested": None, "not_before": None}
    if target in TERMINAL:
        values |= {"paused_by": None, "completed_at": now()}
    if isinstance(work, TrainingJob):
        if target in STAGE_ON_ENTRY:
            values["current_stage"] = STAGE_ON_ENTRY[target]
        if target is not Status.RUNNING:
            values["estimated_completion_at"] = None
        if target is Status.COMPLETED:
            values["progress"] = 100.0
    return values


async def _close_books(session: AsyncSession, job_id: str) -> None:
    await budget.close_hold(session, job_id)
    charged = select(func.coalesce(func.sum(CostRecord.amount_microusd), 0)).where(
        CostRecord.job_id == job_id, CostRecord.cost_type == CostType.COMPUTE
    )
    total = int(await session.scalar(charged) or 0)
    await session.execute(
        update(TrainingJob)
        .where(TrainingJob.id == job_id)
        .values(final_cost_microusd=total, current_cost_microusd=total)
        .execution_options(synchronize_session=False)
    )


async def _tell_end(session: AsyncSession, job: TrainingJob) -> None:
    if job.status in (Status.COMPLETED, Status.CANCELLED):
        payload: dict[str, Any] = {"status": job.status}
        if job.artifact_id:
            payload["artifactId"] = job.artifact_id
        await append_event(session, job.id, "complete", payload)
    elif job.status is Status.FAILED:
        await append_event(session, job.id, "error", {"code": job.error_code, "message": job.error_message})
