"""Notifications and the dashboard's figures on the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from control_plane.schemas.base import Money, Out, Pagination
from control_plane.tables import Notification
from control_plane.tables.notices import NotificationPriority, NotificationType


class NotificationOut(Out):
    id: str
    user_id: str
    team_id: str | None
    type: NotificationType
    title: str
    message: str
    priority: NotificationPriority
    read: bool
    action_url: str | None
    metadata: dict[str, Any] | None
    created_at: datetime

    @classmethod
    def seen(cls, notification: Notification) -> NotificationOut:
        return cls.of(notification, metadata=notification.details)


class NotificationData(Out):
    notification: NotificationOut


class Notifications(Out):
    notifications: list[NotificationOut]
    unread: int
    pagination: Pagination


class ReadAll(Out):
    updated: int


class Stats(Out):
    total_datasets: int
    active_jobs: int
    completed_models: int
    total_cost: Money
