"""Carries out of the house what the outbox holds: at least once outside, noted once inside.

A row is claimed in one transaction, carried between transactions, and noted in another. Whoever dies in between leaves
a claim that runs out, and the letter goes again under the same id. Letters to one receiver go one after the other, so
a receiver that hangs delays none but itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import suppress
from datetime import datetime, timedelta
from typing import NamedTuple
from urllib.parse import urlsplit

from sqlalchemy import ColumnElement, case, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.db import Database
from control_plane.services.notifications import notify_owners
from control_plane.services.sql import ROW
from control_plane.services.webhooks import disable, secrets_of
from control_plane.tables import Outbox, User, Webhook, now
from control_plane.tables.notices import PING, Channel, NotificationPriority, NotificationType
from scheduler.carrier import Carrier, Mail, Post, Undelivered
from scheduler.lease import Lease, LeaseLost
from scheduler.pause import pause

log = logging.getLogger(__name__)
PAUSE_S = 1.0
PAUSE_AFTER_ERROR_S = 10.0
AT_ONCE = 8
FAILING_AT_ONCE = 4
"""Of these, how many to receivers that have failed lately."""
LIMIT_S = {Channel.WEBHOOK: 15.0, Channel.MAIL: 30.0}
CLAIM = timedelta(seconds=60)
"""Longer than any try: whoever claimed a row and does not note an end within it is dead."""
RETRY_PAUSES_S = (5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
"""As Standard Webhooks suggests."""
JITTER = 0.2
DISABLE_AT, DISABLE_AFTER = 2, timedelta(days=5)
"""A webhook is disabled when so many events were given up and none was taken since the first of them, so long ago."""
UNDELIVERED = "undelivered"
"""Leads the key of the notice of an event that was given up."""
KEEP = timedelta(days=32)
"""Longer than a month: a month's cost alert, told again, must still find its row."""
PURGE_S = 3600.0


class Claim(NamedTuple):
    row_id: str
    tries: int
    """With this one."""
    channel: Channel
    target: str
    only_once: bool
    letter: Post | Mail

    @property
    def lane(self) -> str:
        return self.target if self.channel is Channel.WEBHOOK else Channel.MAIL


class _Due(NamedTuple):
    id: str
    lane: str
    failing: bool
    """Whether its receiver has failed lately."""


class Deliverer:
    def __init__(self, database: Database, lease: Lease, carrier: Carrier) -> None:
        self._database = database
        self._lease = lease
        self._carrier = carrier
        self._under_way: dict[str, bool] = {}
        """Lane → whether its receiver is failing."""
        self._ended = asyncio.Event()
        self._purged_at: float | None = None

    async def run(self) -> None:
        """Forever; raises LeaseLost."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._look(group)
        except BaseExceptionGroup as ends:
            if ends.subgroup(LeaseLost):
                raise LeaseLost from None
            raise

    async def _look(self, group: asyncio.TaskGroup) -> None:
        pause_s = PAUSE_S
        try:
            await self._purge()
            for claim in await self._claim(await self._due()):
                group.create_task(self._carry(claim))
        except LeaseLost:
            raise
        except Exception:
            pause_s = PAUSE_AFTER_ERROR_S
            log.exception("the outbox could not be read")
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._ended.wait()
        await pause(0)
        self._ended.clear()

    async def _due(self) -> list[_Due]:
        """The oldest due row of each lane that is free, sound receivers first, as many as there is room for."""
        lane = case((Outbox.channel == Channel.MAIL, Channel.MAIL.value), else_=Outbox.target)
        due = (Outbox.delivered_at.is_(None), _is_due())
        oldest = select(func.min(Outbox.id)).where(*due).group_by(lane)
        query = (
            select(Outbox.id, lane, Webhook.failing_since.is_not(None))
            .outerjoin(Webhook, Webhook.id == Outbox.target)
            .where(Outbox.id.in_(oldest))
            .order_by(Webhook.failing_since.is_not(None), Outbox.id)
        )
        async with self._database.read() as session:
            found = [_Due(*row) for row in await session.execute(query)]
        free = [row for row in found if row.lane not in self._under_way]
        sound = [row for row in free if not row.failing]
        failing = [row for row in free if row.failing][: max(0, FAILING_AT_ONCE - sum(self._under_way.values()))]
        return [*sound, *failing][: AT_ONCE - len(self._under_way)]

    async def _claim(self, due: list[_Due]) -> list[Claim]:
        if not due:
            return []
        async with self._lease.write() as session:
            claims = [await _claim(session, row.id, mails=self._carrier.mails) for row in due]
        made = [claim for claim in claims if claim is not None]
        failing = {row.lane: row.failing for row in due}
        self._under_way |= {claim.lane: failing[claim.lane] for claim in made}
        return made

    async def _carry(self, claim: Claim) -> None:
        failure: Undelivered | None = None
        limit_s = LIMIT_S[claim.channel]
        try:
            async with asyncio.timeout(limit_s):
                if isinstance(claim.letter, Post):
                    await self._carrier.post(claim.letter)
                else:
                    await self._carrier.mail(claim.letter)
        except Undelivered as error:
            failure = error
        except TimeoutError:
            failure = Undelivered(f"It did not answer within {limit_s:g} s")
        except Exception as error:
            log.exception("a letter could not be carried", extra={"outbox": claim.row_id})
            failure = Undelivered(f"It could not be sent: {type(error).__name__}")
        try:
            async with self._lease.write() as session:
                await _note(session, claim, failure)
        except LeaseLost:
            raise
        except Exception:
            log.exception("a delivery could not be noted and will be repeated", extra={"outbox": claim.row_id})
        finally:
            del self._under_way[claim.lane]
            self._ended.set()

    async def _purge(self) -> None:
        """What is over for long, once an hour."""
        if self._purged_at is not None and time.monotonic() - self._purged_at < PURGE_S:
            return
        before = now() - KEEP
        async with self._lease.write() as session:
            await session.execute(
                delete(Outbox)
                .where(or_(Outbox.delivered_at < before, Outbox.failed_at < before))
                .execution_options(synchronize_session=False)
            )
        self._purged_at = time.monotonic()


def _is_due() -> ColumnElement[bool]:
    """What was never tried is due whatever the clock says: another machine's, which wrote it, may be ahead."""
    return or_(Outbox.not_before <= now(), (Outbox.tries == 0) & Outbox.not_before.is_not(None))


async def _claim(session: AsyncSession, row_id: str, *, mails: bool) -> Claim | None:
    """Count the try and keep the row from others for a while; None: it is taken, or not to be sent any more."""
    row = await session.scalar(
        update(Outbox)
        .where(Outbox.id == row_id, _is_due())
        .values(tries=Outbox.tries + 1, not_before=now() + CLAIM)
        .returning(Outbox)
        .execution_options(synchronize_session=False)
    )
    if row is None:
        return None
    try:
        letter = await (_post(session, row) if row.channel is Channel.WEBHOOK else _mail(session, row, mails=mails))
    except Undelivered as never:
        row.not_before, row.failed_at, row.last_error = None, now(), never.reason
        return None
    only_once = row.payload.get("type") == PING
    return Claim(row.id, row.tries, row.channel, row.target, only_once, letter)


async def _post(session: AsyncSession, row: Outbox) -> Post:
    webhook = await session.get(Webhook, row.target)
    if webhook is None or not webhook.enabled:
        raise Undelivered("The webhook was disabled", final=True)
    body = json.dumps({key: row.payload[key] for key in ("type", "timestamp", "data")}, ensure_ascii=False).encode()
    return Post(row.id, webhook.url, secrets_of(webhook), body)


async def _mail(session: AsyncSession, row: Outbox, *, mails: bool) -> Mail:
    user = await session.get(User, row.target)
    if user is None or user.deactivated_at is not None:
        raise Undelivered("The account is deactivated", final=True)
    if not mails:
        raise Undelivered("Mail is not configured any more", final=True)
    letter = row.payload
    return Mail(row.id, user.email, letter["subject"], letter["text"], letter["actionUrl"])


async def _note(session: AsyncSession, claim: Claim, failure: Undelivered | None) -> None:
    """The webhook is locked before its row, in the order of ``services.webhooks``."""
    webhook = None
    if claim.channel is Channel.WEBHOOK:
        webhook = await session.get(Webhook, claim.target, with_for_update=ROW)
    guard = [Outbox.id == claim.row_id, Outbox.tries == claim.tries, Outbox.delivered_at.is_(None)]
    if failure is not None:
        guard.append(Outbox.not_before.is_not(None))
    changed = await session.execute(
        update(Outbox).where(*guard).values(**_after(claim, failure)).execution_options(synchronize_session=False)
    )
    if changed.rowcount and webhook is not None and webhook.enabled:  # type: ignore[attr-defined]
        await _note_health(session, webhook, claim, failure)


def _after(claim: Claim, failure: Undelivered | None) -> dict[str, object]:
    at = now()
    if failure is None:
        return {"delivered_at": at, "not_before": None, "failed_at": None, "last_error": None}
    again = (
        {"failed_at": at, "not_before": None} if _is_last(claim, failure) else {"not_before": at + pause_after(claim)}
    )
    return {**again, "last_error": failure.reason[:500]}


def _is_last(claim: Claim, failure: Undelivered) -> bool:
    return failure.final or claim.only_once or claim.tries > len(RETRY_PAUSES_S)


def pause_after(claim: Claim) -> timedelta:
    """Before the next try. The jitter comes from the row's id: spread over the rows, the same for everyone."""
    spread = int(claim.row_id.replace("-", "")[-8:], 16) / 2**32
    return timedelta(seconds=RETRY_PAUSES_S[claim.tries - 1] * (1 + JITTER * spread))


async def _note_health(session: AsyncSession, webhook: Webhook, claim: Claim, failure: Undelivered | None) -> None:
    """A receiver that has said so, or has let several events come to nothing for days, is sent nothing more; what a
    ping came to says nothing of that."""
    if claim.only_once and not (failure and failure.gone):
        return
    if failure is None:
        webhook.failing_since = None
        return
    webhook.failing_since = webhook.failing_since or now()
    if failure.gone:
        await _disable(session, webhook, "It answered 410 Gone")
    elif _is_last(claim, failure):
        count, since = await _given_up(session, webhook)
        if count >= DISABLE_AT and now() - since >= DISABLE_AFTER:
            told = f"{count} events since {since:%Y-%m-%d %H:%M} UTC were given up, and none was taken"
            await _disable(session, webhook, f"{told}; the last time: {failure.reason}"[:500])
        else:
            await _tell_of_loss(session, webhook, claim, failure)


async def _given_up(session: AsyncSession, webhook: Webhook) -> tuple[int, datetime]:
    """How many events were given up since the receiver last took one, and when the first of them happened."""
    lost = (
        Outbox.target == webhook.id,
        Outbox.failed_at >= webhook.failing_since,
        Outbox.payload["type"].as_string() != PING,
    )
    found = await session.execute(select(func.count(), func.min(Outbox.created_at)).where(*lost))
    count, since = found.one()
    return count, since or now()


async def _disable(session: AsyncSession, webhook: Webhook, reason: str) -> None:
    await disable(session, webhook, reason)
    await _tell_owners(
        session,
        webhook,
        key=f"webhook:{webhook.id}:{webhook.disabled_at:%Y%m%dT%H%M%S}",
        title=f"Webhook disabled: {_host(webhook)}",
        message=f"{reason}. What waited for it is not sent. Once the receiver works again, enable the webhook in the "
        "settings.",
    )


async def _tell_of_loss(session: AsyncSession, webhook: Webhook, claim: Claim, failure: Undelivered) -> None:
    """Once a day. A webhook that wants this event gets it too: so a receiver that is dead fails again, and is found
    out, although nothing else happens. The loss of that is not told of."""
    row = await session.get_one(Outbox, claim.row_id)
    if row.dedupe_key.startswith(f"{NotificationType.SYSTEM}:{UNDELIVERED}:"):
        return
    event, at = row.payload["type"], f"{row.created_at:%Y-%m-%d %H:%M}"
    await _tell_owners(
        session,
        webhook,
        key=f"{UNDELIVERED}:{webhook.id}:{now():%Y-%m-%d}",
        title=f"Not delivered: {event} to {_host(webhook)}",
        message=f"The event {event} of {at} UTC was given up after {claim.tries} tries; the last: {failure.reason}. "
        f"GET /api/webhooks/{webhook.id}/deliveries lists it, and whatever else was given up that day.",
    )


async def _tell_owners(session: AsyncSession, webhook: Webhook, *, key: str, title: str, message: str) -> None:
    await notify_owners(
        session,
        webhook.team_id,
        event_key=f"{NotificationType.SYSTEM}:{key}",
        type=NotificationType.SYSTEM,
        title=title,
        message=message,
        priority=NotificationPriority.HIGH,
        action_url="/settings",
        details={"webhookId": webhook.id},
    )


def _host(webhook: Webhook) -> str | None:
    return urlsplit(webhook.url).hostname
