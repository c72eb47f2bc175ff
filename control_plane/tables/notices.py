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
    """Deliveries outside the house (webhooks, mail), enqueued in the transaction that caused them."""

    __tablename__ = "outbox"
    __table_args__ = (Index(None, "delivered_at", "not_before"),)

    team_id: Mapped[str | None] = mapped_column(ForeignKey("teams.id"))
    channel: Mapped[str] = mapped_column(String(16))
    target: Mapped[str] = mapped_column(Text)
    payload: Mapped[dict[str, Any]] = mapped_column(Json)
    dedupe_key: Mapped[str] = mapped_column(String(250), unique=True)
    tries: Mapped[int] = mapped_column(Integer, default=0)
    not_before: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]
    last_error: Mapped[str | None] = mapped_column(Text)
