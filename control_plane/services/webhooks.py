"""A team's webhooks: where its events are sent to, and the secrets that sign them (https://www.standardwebhooks.com)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from datetime import timedelta

import httpx
from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import Conflict, ValidationFailed
from control_plane.schemas.base import Pagination
from control_plane.schemas.webhooks import ChangeWebhook, CreateWebhook
from control_plane.services import outbox
from control_plane.services.accounts import audit
from control_plane.services.addresses import is_public, written
from control_plane.services.listing import Paging, paginate
from control_plane.services.scope import Principal, get_owned, owned
from control_plane.services.sql import lock_name
from control_plane.tables import Outbox, Webhook, now, uuid7
from control_plane.tables.notices import PING, Channel, Event

PREFIX = "whsec_"
MOST_PER_TEAM = 20
OVERLAP = timedelta(hours=24)
"""Life of the previous secret after a rotation."""
ANY_NETWORK = "any"
_HOST = re.compile(rb"[\w.:-]+", re.ASCII)


def derive(secret: bytes, nonce: str) -> str:
    """The signing secret that belongs to a nonce: a repeated request is answered alike without keeping the answer."""
    random = hmac.new(secret, f"webhook:{nonce}".encode(), hashlib.sha256).digest()
    return PREFIX + base64.b64encode(random).decode()


def sign(secrets: Iterable[str], message_id: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``: one signature for each secret."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return " ".join(
        "v1," + base64.b64encode(hmac.digest(base64.b64decode(secret.removeprefix(PREFIX)), signed, "sha256")).decode()
        for secret in secrets
    )


def secrets_of(webhook: Webhook) -> tuple[str, ...]:
    """Those that sign now, the current one first."""
    if webhook.previous_secret and webhook.previous_secret_until and webhook.previous_secret_until > now():
        return webhook.secret, webhook.previous_secret
    return (webhook.secret,)


def checked_url(url: str, networks: str) -> str:
    """The URL in its normal form. Raises ValidationFailed.

    A host that is an address is judged here; a name is judged at each delivery, by the addresses it then has.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ValidationFailed.field("url", "Must be a URL") from error
    if parsed.scheme not in ("http", "https") or not _HOST.fullmatch(parsed.raw_host):
        raise ValidationFailed.field("url", "Must begin with https:// or http:// and a host")
    if parsed.userinfo:
        raise ValidationFailed.field("url", "Must not contain credentials: messages are signed instead")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise ValidationFailed.field("url", "Must have a port from 1 to 65535")
    address = written(parsed.host)
    inside = not is_public(address) if address else parsed.host.rstrip(".").rpartition(".")[2] == "localhost"
    if inside and networks != ANY_NETWORK:
        raise ValidationFailed.field("url", "Must be a public address")
    return str(parsed)


async def listed(session: AsyncSession, who: Principal) -> list[Webhook]:
    return list(await session.scalars(owned(Webhook, who.team_id).order_by(Webhook.id.desc())))


async def create(session: AsyncSession, who: Principal, body: CreateWebhook, secret: str, networks: str) -> Webhook:
    """Raises ValidationFailed; Conflict when the team has as many as it may."""
    url = checked_url(body.url, networks)
    await lock_name(session, f"webhooks:{who.team_id}")
    count = select(func.count()).select_from(owned(Webhook, who.team_id).subquery())
    if (await session.scalar(count) or 0) >= MOST_PER_TEAM:
        raise Conflict(f"A team may have {MOST_PER_TEAM} webhooks: delete one first")
    webhook = Webhook(
        team_id=who.team_id,
        created_by=who.user_id,
        url=url,
        secret=secret,
        events=_sorted(body.events),
        enabled=body.enabled,
    )
    session.add(webhook)
    await session.flush()
    _audit(session, "create", webhook.id, who)
    return webhook


async def change(session: AsyncSession, who: Principal, webhook_id: str, body: ChangeWebhook, networks: str) -> Webhook:
    """Raises NotFound, ValidationFailed. Enabling it, or sending it elsewhere, is a new beginning."""
    webhook = await get_owned(session, Webhook, who.team_id, webhook_id, lock=True)
    if isinstance(body.url, str):
        webhook.url = checked_url(body.url, networks)
        webhook.failing_since = None
    if isinstance(body.events, tuple):
        webhook.events = _sorted(body.events)
    if body.enabled is True and not webhook.enabled:
        webhook.enabled = True
        webhook.failing_since = webhook.disabled_at = webhook.disabled_reason = None
    elif body.enabled is False and webhook.enabled:
        await disable(session, webhook, "Disabled by an owner")
    _audit(session, "change", webhook.id, who)
    await session.flush()
    return webhook


async def disable(session: AsyncSession, webhook: Webhook, reason: str) -> None:
    """Nothing more is enqueued for it, and what waits is given up. Its row is locked by the caller."""
    webhook.enabled = False
    webhook.disabled_at = now()
    webhook.disabled_reason = reason
    await session.flush()
    waiting = (Outbox.target == webhook.id, Outbox.not_before.is_not(None))
    await session.execute(
        update(Outbox)
        .where(*waiting)
        .values(
            not_before=None, failed_at=now(), last_error=func.coalesce(Outbox.last_error, "The webhook was disabled")
        )
        .execution_options(synchronize_session=False)
    )


async def remove(session: AsyncSession, who: Principal, webhook_id: str) -> None:
    """With its deliveries. Raises NotFound."""
    webhook = await get_owned(session, Webhook, who.team_id, webhook_id, lock=True)
    await session.execute(delete(Outbox).where(Outbox.target == webhook.id))
    await session.delete(webhook)
    _audit(session, "delete", webhook.id, who)
    await session.flush()


async def rotate(session: AsyncSession, who: Principal, webhook_id: str, secret: str) -> Webhook:
    """A new secret; the one before signs too for a while. Raises NotFound."""
    webhook = await get_owned(session, Webhook, who.team_id, webhook_id, lock=True)
    webhook.previous_secret, webhook.secret = webhook.secret, secret
    webhook.previous_secret_until = now() + OVERLAP
    _audit(session, "rotate secret", webhook.id, who)
    await session.flush()
    return webhook


async def ping(session: AsyncSession, who: Principal, webhook_id: str) -> Outbox:
    """Enqueue a message of the type ``ping``, which is tried once. Raises NotFound; Conflict when it is disabled."""
    webhook = await get_owned(session, Webhook, who.team_id, webhook_id)
    if not webhook.enabled:
        raise Conflict("The webhook is disabled: enable it first")
    key = f"{PING}:{uuid7()}"
    body = outbox.envelope(PING, who.team_id, {"webhookId": webhook.id})
    await outbox.put(session, Channel.WEBHOOK, webhook.id, body, key=key, team_id=who.team_id)
    return (await session.scalars(select(Outbox).where(Outbox.dedupe_key == f"{key}:{webhook.id}"))).one()


async def deliveries(
    session: AsyncSession, who: Principal, webhook_id: str, paging: Paging
) -> tuple[list[Outbox], Pagination]:
    """Raises NotFound."""
    webhook = await get_owned(session, Webhook, who.team_id, webhook_id)
    query = select(Outbox).where(Outbox.target == webhook.id, Outbox.channel == Channel.WEBHOOK)
    return await paginate(session, query, paging, {"createdAt": Outbox.created_at}, Outbox.id)


def _sorted(events: tuple[Event, ...]) -> list[str]:
    return sorted(set(events))


def _audit(session: AsyncSession, action: str, webhook_id: str, who: Principal) -> None:
    audit(session, action, "webhook", webhook_id, user_id=who.user_id, team_id=who.team_id)
