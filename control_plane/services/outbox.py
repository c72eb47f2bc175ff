"""What leaves the house: one row for each event and receiver, written in the transaction that causes the event.

The scheduler delivers the rows (``scheduler.deliver``). A repeated event finds its rows by their dedupe key.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import usd
from control_plane.services.sql import insert_or_nothing
from control_plane.states import Status
from control_plane.tables import Notification, Outbox, TrainingJob, User, Webhook, now
from control_plane.tables.notices import Channel, Event, NotificationType
from control_plane.tables.work import DatasetStatus

JOB_EVENTS = {
    Status.RUNNING: Event.JOB_STARTED,
    Status.PAUSED: Event.JOB_PAUSED,
    Status.COMPLETED: Event.JOB_COMPLETED,
    Status.FAILED: Event.JOB_FAILED,
    Status.CANCELLED: Event.JOB_CANCELLED,
}
NOTICE_EVENTS = {NotificationType.COST_ALERT: Event.COST_ALERT, NotificationType.SYSTEM: Event.SYSTEM}
"""Jobs tell of themselves when they move; a dataset's notice is one of two events."""


async def job_moved(session: AsyncSession, job: TrainingJob) -> None:
    """To be called once in each transition; a job can start and pause more than once."""
    event = JOB_EVENTS.get(job.status)
    if event is None:
        return
    occasion = {Event.JOB_STARTED: job.attempt, Event.JOB_PAUSED: job.event_seq}.get(event, "end")
    data = {
        "jobId": job.id,
        "name": job.name,
        "status": job.status,
        "attempt": job.attempt,
        "datasetId": job.dataset_id,
        "baseModel": job.base_model,
        "artifactId": job.artifact_id,
        "pausedBy": job.paused_by,
        "errorCode": job.error_code,
        "errorMessage": job.error_message,
        "finalCost": None if job.final_cost_microusd is None else usd(job.final_cost_microusd),
    }
    await tell_webhooks(session, job.team_id, event, data, key=f"{event}:{job.id}:{occasion}")


async def noticed(session: AsyncSession, notice: Notification) -> None:
    """To be called for each new notification: mail to its recipient, and its event to the team's webhooks.

    Recipients of the same event share their webhooks' rows: what leads the recipient in the dedupe key names the event.
    """
    key = notice.dedupe_key.removesuffix(f":{notice.user_id}")
    event = _event_of(notice)
    if event is not None and notice.team_id is not None:
        data = {
            **(notice.details or {}),
            "title": notice.title,
            "message": notice.message,
            "priority": notice.priority,
            "actionUrl": notice.action_url,
        }
        await tell_webhooks(session, notice.team_id, event, data, key=key)
    if session.info.get("mail") and await _is_active(session, notice.user_id):
        letter = {"subject": notice.title, "text": notice.message, "actionUrl": notice.action_url}
        await put(session, Channel.MAIL, notice.user_id, letter, key=key, team_id=notice.team_id)


async def tell_webhooks(session: AsyncSession, team_id: str, event: Event, data: dict[str, Any], *, key: str) -> None:
    """Enqueue ``event`` for each of the team's webhooks that wants it."""
    webhooks = await session.scalars(select(Webhook).where(Webhook.team_id == team_id, Webhook.enabled.is_(True)))
    for webhook in webhooks.all():
        if not webhook.events or event in webhook.events:
            await put(session, Channel.WEBHOOK, webhook.id, envelope(event, team_id, data), key=key, team_id=team_id)


def envelope(event: str, team_id: str, data: dict[str, Any]) -> dict[str, Any]:
    """A webhook's body, as Standard Webhooks recommends it."""
    return {"type": event, "timestamp": now().isoformat(), "data": {"teamId": team_id, **data}}


async def put(
    session: AsyncSession, channel: Channel, target: str, payload: dict[str, Any], *, key: str, team_id: str | None
) -> bool:
    """Enqueue for one receiver, due at once; False: that event is there already."""
    return await insert_or_nothing(
        session,
        Outbox,
        team_id=team_id,
        channel=channel,
        target=target,
        payload=payload,
        dedupe_key=f"{key}:{target}",
        not_before=now(),
    )


def _event_of(notice: Notification) -> Event | None:
    if notice.type is NotificationType.DATASET_READY:
        ready = (notice.details or {}).get("status") == DatasetStatus.READY
        return Event.DATASET_READY if ready else Event.DATASET_FAILED
    return NOTICE_EVENTS.get(notice.type)


async def _is_active(session: AsyncSession, user_id: str) -> bool:
    return await session.scalar(select(User.id).where(User.id == user_id, User.deactivated_at.is_(None))) is not None
