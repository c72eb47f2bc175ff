"""The end of an attempt, in one transaction: its account settled, its work moved on, its people told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import usd
from control_plane.services import alerts, artifacts, datasets, paused
from control_plane.services.lifecycle import append_event, note, stronger, transition
from control_plane.services.notifications import notify
from control_plane.states import (
    ACTIVE,
    LAPSED,
    MAX_FAULT_RETRIES,
    RETRY_PAUSES_S,
    Outcome,
    Status,
    StopReason,
    after_attempt,
)
from control_plane.tables import Attempt, Checkpoint, TrainingJob, Verdict, now
from control_plane.tables.notices import NotificationPriority, NotificationType
from scheduler import ledger, retention
from scheduler.executor import Ending
from scheduler.work import AnyWork, get_work


class Claimed(NamedTuple):
    attempt: Attempt
    work: AnyWork


async def claim(session: AsyncSession, attempt_id: str, *, cursor: int | None = None, to: int = 0) -> Claimed | None:
    """The attempt and its work, both rows locked, if the attempt has not ended and is the work's current one.

    ``cursor``: only if its events are collected up to there; moves the cursor to ``to``. None: somebody else was here.
    """
    guard = [Attempt.id == attempt_id, Attempt.outcome.is_(None)]
    values: dict[str, object] = {"updated_at": now()}
    if cursor is not None:
        guard.append(Attempt.event_cursor == cursor)
        values["event_cursor"] = to
    moved = await session.execute(
        update(Attempt).where(*guard).values(**values).execution_options(synchronize_session=False)
    )
    if moved.rowcount == 0:  # type: ignore[attr-defined]
        return None
    attempt = await session.get_one(Attempt, attempt_id, populate_existing=True)
    work = await get_work(session, attempt.work_kind, attempt.work_id, lock=True)
    if work.attempt != attempt.number or work.status not in ACTIVE:
        return None
    return Claimed(attempt, work)


async def finish(session: AsyncSession, claimed: Claimed, ending: Ending) -> None:
    """End a claimed attempt, whose events are stored."""
    attempt, work = claimed
    ending = _checked(work, ending)
    outcome = Outcome(ending.outcome)
    reason = _stop_reason(work, ending) if outcome in (Outcome.STOPPED, Outcome.FAULT) else None
    _close(attempt, ending, reason)
    if isinstance(work, TrainingJob):
        await ledger.settle(session, work, attempt, outcome=outcome, stop_reason=reason, times=ending.times)
        await tell_cost(session, work)
        attempt.held_ms = ledger.held_ms(ending.times)
    faults = await _faults_in_a_row(session, work)
    target = after_attempt(outcome, reason, faults)
    if target is Status.PAUSED and reason is StopReason.BUDGET and isinstance(work, TrainingJob):
        target = await _at_the_ceiling(session, work, attempt)
    work.retry_count += outcome is Outcome.FAULT
    match target:
        case Status.COMPLETED:
            await _complete(session, work, attempt)
        case Status.FAILED:
            await _fail(session, work, attempt, ending)
        case Status.PAUSED:
            await _pause(session, work, attempt, reason)
        case Status.CANCELLED:
            await transition(session, work, target, attempt=attempt.number, **_NO_ERROR)
        case _:
            await _queue_again(session, work, attempt, ending, faults)


async def _faults_in_a_row(session: AsyncSession, work: AnyWork) -> int:
    """Faults of the platform up to now. One in an attempt that got further than any before is the first of a row."""
    reached = func.coalesce(func.max(Checkpoint.step), 0)
    attempts = await session.execute(
        select(Attempt.outcome, reached.label("reached"))
        .outerjoin(Checkpoint, Checkpoint.attempt_id == Attempt.id)
        .where(Attempt.work_id == work.id)
        .group_by(Attempt.id, Attempt.number, Attempt.outcome)
        .order_by(Attempt.number)
    )
    furthest = row = 0
    for attempt in attempts:
        lost = attempt.outcome is Outcome.FAULT
        row = row + 1 if lost and attempt.reached <= furthest else int(lost)
        furthest = max(furthest, attempt.reached)
    return row


async def _at_the_ceiling(session: AsyncSession, job: TrainingJob, attempt: Attempt) -> Status:
    """Where a job goes whose allowance ran out: on, when the budget pays for more of it. Mostly no scheduler was there
    to grant it, so the platform bears the loading."""
    if not await paused.secure(session, job):
        return Status.PAUSED
    if attempt.outcome is Outcome.STOPPED:
        attempt.exit_reason = LAPSED
        await note(session, job, "WARNING", _LAPSED_TOLD.format(attempt.number))
    return Status.QUEUED


_LAPSED_TOLD = (
    "Attempt {} stopped at the GPU time that was granted to it, although the budget pays for more. The job goes on "
    "from its last checkpoint; loading it again is not billed."
)


async def _pause(session: AsyncSession, work: AnyWork, attempt: Attempt, reason: StopReason | None) -> None:
    waits_for = None
    if reason is StopReason.BUDGET and isinstance(work, TrainingJob):
        waits_for = await paused.waits_for(session, work)
        await note(session, work, "WARNING", f"Paused with its last checkpoint. {waits_for}.")
    fields = {"paused_by": reason, "queue_reason": waits_for, **_NO_ERROR}
    await transition(session, work, Status.PAUSED, attempt=attempt.number, **fields)


_NO_ERROR = {"error_code": None, "error_message": None, "error_stack": None}


def _checked(work: AnyWork, ending: Ending) -> Ending:
    """A training that says it is complete, but left no adapter, is the platform's fault."""
    if ending.outcome == Outcome.COMPLETED and isinstance(work, TrainingJob) and "adapter" not in (work.result or {}):
        return Ending(Outcome.FAULT, "NO_ADAPTER", "Training ended without an adapter", times=ending.times)
    return ending


def _stop_reason(work: AnyWork, ending: Ending) -> StopReason | None:
    return stronger(StopReason(ending.stop_reason) if ending.stop_reason else None, work.stop_requested)


def _close(attempt: Attempt, ending: Ending, reason: StopReason | None) -> None:
    attempt.outcome = Outcome(ending.outcome)
    stopped = attempt.outcome is Outcome.STOPPED and reason
    attempt.exit_reason = (reason.value if stopped and reason else ending.code)[:64] or None
    attempt.exit_message = ending.message or None
    if ending.times:
        attempt.allocation_started_at = _moment(min(rank.start_ms for rank in ending.times))
        attempt.allocation_ended_at = _moment(max(rank.end_ms for rank in ending.times) or now().timestamp() * 1000)


def _moment(ms: float) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


async def tell_cost(session: AsyncSession, job: TrainingJob) -> None:
    """After each posting: the stream's ``cost`` event, and the budget's alerts."""
    payload = {
        "currentCost": usd(job.current_cost_microusd),
        "estimatedTotalCost": usd(job.estimated_total_cost_microusd),
    }
    await append_event(session, job.id, "cost", payload)
    await alerts.cost_alerts(session, job.team_id)


async def _complete(session: AsyncSession, work: AnyWork, attempt: Attempt) -> None:
    if isinstance(work, Verdict):
        await transition(session, work, Status.COMPLETED, attempt=attempt.number, progress=100.0, **_NO_ERROR)
        return
    model = await artifacts.create(session, work)
    if await transition(session, work, Status.COMPLETED, attempt=attempt.number, artifact_id=model.id, **_NO_ERROR):
        await notify(
            session,
            user_id=work.created_by,
            team_id=work.team_id,
            type=NotificationType.JOB_COMPLETE,
            title=f"Training complete: {work.name}",
            message=f"{work.name} is trained. It cost {usd(work.final_cost_microusd or 0)} USD.",
            priority=NotificationPriority.HIGH,
            action_url=f"/models/{model.id}",
            details={"jobId": work.id, "artifactId": model.id},
            dedupe_key=f"{NotificationType.JOB_COMPLETE}:{work.id}:{work.created_by}",
        )


async def _fail(session: AsyncSession, work: AnyWork, attempt: Attempt, ending: Ending) -> None:
    """The child's own last words (with its advice) stand in the work's row already, if it had any."""
    told = work.error_code == ending.code and work.error_message
    error = {
        "error_code": (ending.code or "PLATFORM_FAULT")[:64],
        "error_message": work.error_message if told else ending.message or "The attempt failed",
        "error_stack": (work.error_stack if told else None) or ending.stack or None,
    }
    if not await transition(session, work, Status.FAILED, attempt=attempt.number, **error):
        return
    if isinstance(work, Verdict):
        await datasets.apply_verdict(session, work, None)
        return
    await notify(
        session,
        user_id=work.created_by,
        team_id=work.team_id,
        type=NotificationType.JOB_FAILED,
        title=f"Training failed: {work.name}",
        message=work.error_message or "",
        priority=NotificationPriority.HIGH,
        action_url=f"/training/jobs/{work.id}",
        details={"jobId": work.id, "errorCode": work.error_code},
        dedupe_key=f"{NotificationType.JOB_FAILED}:{work.id}:{work.created_by}",
    )


async def _queue_again(session: AsyncSession, work: AnyWork, attempt: Attempt, ending: Ending, faults: int) -> None:
    not_before = None
    if ending.outcome == Outcome.FAULT:
        pause_s = RETRY_PAUSES_S[min(faults, len(RETRY_PAUSES_S)) - 1]
        not_before = now() + timedelta(seconds=pause_s)
        if isinstance(work, TrainingJob):
            await note(session, work, "WARNING", await _what_happened(session, work, attempt, ending, faults, pause_s))
    await transition(session, work, Status.QUEUED, attempt=attempt.number, not_before=not_before, **_NO_ERROR)


async def _what_happened(
    session: AsyncSession, job: TrainingJob, attempt: Attempt, ending: Ending, faults: int, pause_s: float
) -> str:
    saved = await retention.whole(session, job.id)
    whence = f"goes on from step {saved[0].step}" if saved else "starts over"
    cause = f"{ending.code}: {ending.message}" if ending.code else ending.message
    return (
        f"Attempt {attempt.number} was lost to a fault of the platform ({cause}). The job {whence} in {pause_s:g} s "
        f"(retry {faults} of {MAX_FAULT_RETRIES}); what was lost is not billed."
    )
