"""What people are told: once each, by the unique dedupe key."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.services.sql import insert_or_nothing
from control_plane.tables import Notification
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
    """Insert, or do nothing when ``dedupe_key`` (``type:object:recipient``) is there already. True if inserted."""
    return await insert_or_nothing(
        session,
        Notification,
        user_id=user_id,
        team_id=team_id,
        type=type,
        title=title[:200],
        message=message,
        priority=priority,
        action_url=action_url,
        details=details,
        dedupe_key=dedupe_key,
    )
