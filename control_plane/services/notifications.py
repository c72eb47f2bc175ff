"""What people are told: once each, by the unique dedupe key."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import NotFound
from control_plane.schemas.base import Pagination
from control_plane.services import outbox
from control_plane.services.listing import Paging, paginate
from control_plane.services.sql import insert_or_nothing
from control_plane.tables import Membership, Notification
from control_plane.tables.accounts import TeamRole
from control_plane.tables.notices import NotificationPriority, NotificationType


async def notify(
    session: AsyncSession,
    *,
    user_id: str,
    team_id: str | None,
    type: NotificationType,
    title: str,
    message: str,
    priority: NotificationPriority = NotificationPriority.MEDIUM,
    action_url: str | None = None,
    details: dict[str, Any] | None = None,
    dedupe_key: str,
) -> bool:
    """Insert, or do nothing when ``dedupe_key`` (``type:object:recipient``) is there already. True if inserted; then
    it is told outside the house too."""
    values: dict[str, Any] = {
        "user_id": user_id,
        "team_id": team_id,
        "type": type,
        "title": title[:200],
        "message": message,
        "priority": priority,
        "action_url": action_url,
        "details": details,
        "dedupe_key": dedupe_key,
    }
    inserted = await insert_or_nothing(session, Notification, **values)
    if inserted:
        await outbox.noticed(session, Notification(**values))
    return inserted


async def notify_owners(session: AsyncSession, team_id: str, *, event_key: str, **notice: Any) -> None:
    """The same notification to each of the team's owners; ``event_key`` is the dedupe key without the recipient."""
    owners = await session.scalars(
        select(Membership.user_id).where(Membership.team_id == team_id, Membership.role == TeamRole.OWNER)
    )
    for user_id in owners.all():
        await notify(session, user_id=user_id, team_id=team_id, dedupe_key=f"{event_key}:{user_id}", **notice)


async def listed(
    session: AsyncSession, user_id: str, paging: Paging, read: bool | None
) -> tuple[list[Notification], Pagination]:
    query = select(Notification).where(Notification.user_id == user_id)
    if read is not None:
        query = query.where(Notification.read.is_(read))
    return await paginate(session, query, paging, {"createdAt": Notification.created_at}, Notification.id)


async def unread(session: AsyncSession, user_id: str) -> int:
    query = select(func.count()).where(Notification.user_id == user_id, Notification.read.is_(False))
    return await session.scalar(query) or 0


async def mark_read(session: AsyncSession, user_id: str, notification_id: str) -> Notification:
    found = await session.scalar(
        select(Notification).where(Notification.id == notification_id, Notification.user_id == user_id)
    )
    if found is None:
        raise NotFound("Notification not found")
    found.read = True
    await session.flush()
    return found


async def mark_all_read(session: AsyncSession, user_id: str) -> int:
    """How many were unread."""
    result = await session.execute(
        update(Notification).where(Notification.user_id == user_id, Notification.read.is_(False)).values(read=True)
    )
    return int(result.rowcount)  # type: ignore[attr-defined]
