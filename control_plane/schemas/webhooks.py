"""Webhooks and their deliveries on the wire."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from msgspec import UNSET, UnsetType

from control_plane.schemas.base import In, Out, Pagination, said
from control_plane.tables import Outbox
from control_plane.tables.notices import Event

Url = Annotated[str, said("Must be a URL of 1 to 2000 characters", min_length=1, max_length=2000)]


class CreateWebhook(In):
    url: Url
    events: tuple[Event, ...] = ()
    """None: all of them."""
    enabled: bool = True


class ChangeWebhook(In):
    url: Url | UnsetType = UNSET
    events: tuple[Event, ...] | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class WebhookOut(Out):
    """A webhook without its secret."""

    id: str
    url: str
    events: list[Any]
    enabled: bool
    failing_since: datetime | None
    disabled_at: datetime | None
    disabled_reason: str | None
    created_by: str
    created_at: datetime


class WebhookData(Out):
    webhook: WebhookOut


class Webhooks(Out):
    webhooks: list[WebhookOut]


class NewWebhook(Out):
    webhook: WebhookOut
    secret: str
    """Signs every message: shown this once."""


class NewSecret(Out):
    secret: str
    """Shown this once."""
    previous_until: datetime
    """Until then messages bear the signature of the previous secret too."""


class DeliveryStatus(StrEnum):
    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    FAILED = "FAILED"


class DeliveryOut(Out):
    id: str
    """The message's ``webhook-id``."""
    type: str
    status: DeliveryStatus
    tries: int
    created_at: datetime
    next_try_at: datetime | None
    delivered_at: datetime | None
    failed_at: datetime | None
    last_error: str | None

    @classmethod
    def seen(cls, row: Outbox) -> DeliveryOut:
        status = DeliveryStatus.DELIVERED if row.delivered_at else DeliveryStatus.PENDING
        if row.failed_at:
            status = DeliveryStatus.FAILED
        return cls.of(row, type=row.payload["type"], status=status, next_try_at=row.not_before)


class DeliveryData(Out):
    delivery: DeliveryOut


class Deliveries(Out):
    deliveries: list[DeliveryOut]
    pagination: Pagination
