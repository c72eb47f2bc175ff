"""What people are told, once."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Boolean, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from control_plane.tables.base import Base, Json, Row, enum_column


class NotificationType(StrEnum):
    JOB_COMPLETE = "JOB_COMPLETE"
    JOB_FAILED = "JOB_FAILED"
    COST_ALERT = "COST_ALERT"
    SYSTEM = "SYSTEM"
    DATASET_READY = "DATASET_READY"


class NotificationPriority(StrEnum):
    LOW = "LOW"
    MEDIUM = "MEDIUM"
    HIGH = "HIGH"
    CRITICAL = "CRITICAL"


class Event(StrEnum):
    """What webhooks can be told; the README says what each means."""

    JOB_STARTED = "job.started"
    JOB_PAUSED = "job.paused"
    JOB_COMPLETED = "job.completed"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    DATASET_READY = "dataset.ready"
    DATASET_FAILED = "dataset.failed"
    COST_ALERT = "cost.alert"
    SYSTEM = "system"


PING = "ping"
"""Sent on request to the webhook under test, whatever it subscribes to."""


class Channel(StrEnum):
    WEBHOOK = "webhook"
    MAIL = "mail"


class Notification(Row, Base):
    __tablename__ = "notifications"
    __table_args__ = (Index(None, "user_id", "read", "created_at"),)

    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    team_id: Mapped[str | None] = mapped_column(ForeignKey("teams.id"))
    type: Mapped[NotificationType] = mapped_column(enum_column(NotificationType))
    title: Mapped[str] = mapped_column(String(200))
    message: Mapped[str] = mapped_column(Text)
    priority: Mapped[NotificationPriority] = mapped_column(
        enum_column(NotificationPriority), default=NotificationPriority.MEDIUM
    )
    read: Mapped[bool] = mapped_column(Boolean, default=False)
    action_url: Mapped[str | None] = mapped_column(String(300))
    details: Mapped[dict[str, Any] | None] = mapped_column(Json)
    """``metadata`` on the wire."""
    dedupe_key: Mapped[str] = mapped_column(String(200), unique=True)
    """``type:object:recipient``."""


class Outbox(Row, Base):
    """Deliveries outside the house, enqueued in the transaction that caused them: one for each event and receiver."""

    __tablename__ = "outbox"
    __table_args__ = (Index(None, "delivered_at", "not_before"), Index(None, "target", "created_at"))

    team_id: Mapped[str | None] = mapped_column(ForeignKey("teams.id"))
    channel: Mapped[Channel] = mapped_column(enum_column(Channel))
    target: Mapped[str] = mapped_column(Text)
    """Id of the webhook, or of the user who gets the mail."""
    payload: Mapped[dict[str, Any]] = mapped_column(Json)
    dedupe_key: Mapped[str] = mapped_column(String(250), unique=True)
    """``event:target``."""
    tries: Mapped[int] = mapped_column(Integer, default=0)
    not_before: Mapped[datetime | None]
    """When it is due (again); None once it is delivered or given up."""
    delivered_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]
    """When it was given up."""
    last_error: Mapped[str | None] = mapped_column(Text)
