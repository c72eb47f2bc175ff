"""A team with webhooks at a real receiver, and deliverers that can be killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select

from control_plane.db import Database
from control_plane.services import outbox, webhooks
from control_plane.settings import Settings
from control_plane.tables import Notification, Outbox, Team, Webhook, uuid7
from control_plane.tables.notices import Event
from scheduler.carrier import Carrier, Mail, Post, Undelivered
from scheduler.deliver import Deliverer
from scheduler.lease import Lease
from scheduler.network import NetworkCarrier
from tests.receiver import Receiver

PATIENCE_S = 15.0
ELSEWHERE = "another-host:pid:[1]/7/1.00"


class Ahead:
    """The wall clock, ahead of the true one."""

    def __init__(self) -> None:
        self._ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self._ahead

    def pass_by(self, **how_long: float) -> None:
        self._ahead += timedelta(**how_long)


class Stuck:
    """A carrier whose letters arrive, while it never hears of it."""

    mails = True

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self.arrived = asyncio.Event()

    async def post(self, letter: Post) -> None:
        await self._carrier.post(letter)
        self.arrived.set()
        await asyncio.sleep(3600)

    async def mail(self, letter: Mail) -> None:
        raise AssertionError("no mail here")


class Late:
    """A carrier whose letters come to nothing, but only when they are let go."""

    mails = False

    def __init__(self) -> None:
        self.began, self.go = asyncio.Event(), asyncio.Event()

    async def post(self, letter: Post) -> None:
        self.began.set()
        await self.go.wait()
        raise Undelivered("late")

    async def mail(self, letter: Mail) -> None:
        raise AssertionError("no mail here")


class PostOffice:
    def __init__(self, database: Database, receiver: Receiver, team: Team) -> None:
        self.database = database
        self.receiver = receiver
        self.team = team
        self.carrier: Carrier = NetworkCarrier(Settings(webhook_networks="any"))
        self._lease: Lease | None = None

    async def webhook(self, path: str, **fields: Any) -> str:
        values = {"url": self.receiver.url(path), "secret": webhooks.derive(b"test", path), **fields}
        row = Webhook(id=uuid7(), team_id=self.team.id, created_by=self.team.personal_of, **values)
        async with self.database.write() as session:
            session.add(row)
        return str(row.id)

    async def tell(self, key: str, event: Event = Event.JOB_COMPLETED) -> None:
        async with self.database.write() as session:
            await outbox.tell_webhooks(session, self.team.id, event, {"key": key}, key=key)

    async def rows(self, target: str | None = None) -> list[Outbox]:
        query = select(Outbox).order_by(Outbox.id)
        async with self.database.read() as session:
            return list(await session.scalars(query if target is None else query.where(Outbox.target == target)))

    async def row(self, target: str, key: str = "") -> Outbox:
        """The only one whose dedupe key begins so."""
        (only,) = [row for row in await self.rows(target) if row.dedupe_key.startswith(key)]
        return only

    async def the_webhook(self, webhook_id: str) -> Webhook:
        async with self.database.read() as session:
            return await session.get_one(Webhook, webhook_id)

    async def notices(self) -> list[Notification]:
        async with self.database.read() as session:
            return list(await session.scalars(select(Notification).order_by(Notification.id)))

    async def deliverer(self, carrier: Carrier | None = None, lease: Lease | None = None) -> Deliverer:
        """On the lease that deliverers of one process share, or on one of its own."""
        if lease is None:
            self._lease = lease = self._lease or Lease(self.database, 60.0, ELSEWHERE)
        if not lease.epoch:
            await lease.acquire()
        return Deliverer(self.database, lease, carrier or self.carrier)

    @asynccontextmanager
    async def delivering(self, carrier: Carrier | None = None) -> AsyncIterator[None]:
        """A deliverer at work, which is killed at the end."""
        task = asyncio.create_task((await self.deliverer(carrier)).run())
        try:
            yield
            assert not task.done(), task
        finally:
            await kill(task)

    async def until_row(self, target: str, probe: Callable[[Outbox], Any], key: str = "") -> Outbox:
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not probe(row := await self.row(target, key)):
            assert asyncio.get_running_loop().time() < deadline, f"{row.tries} tries, {row.last_error}"
            await asyncio.sleep(0.02)
        return row

    async def until_calls(self, path: str, count: int) -> None:
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while len(self.receiver.at(path)) < count:
            assert asyncio.get_running_loop().time() < deadline, f"{path}: {len(self.receiver.at(path))} of {count}"
            await asyncio.sleep(0.02)

    async def until_quiet(self) -> None:
        """Until no row is due or under way."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while any(row.not_before is not None for row in await self.rows()):
            assert asyncio.get_running_loop().time() < deadline, [row.last_error for row in await self.rows()]
            await asyncio.sleep(0.02)


async def kill(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
