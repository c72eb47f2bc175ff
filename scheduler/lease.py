"""Which scheduler may write: one row with an epoch and a beat, and no wall clock compared across machines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import psutil
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.db import Database
from control_plane.services.sql import insert_or_nothing
from control_plane.tables import SchedulerLease
from scheduler.pause import pause

log = logging.getLogger(__name__)
BEATS_PER_TIMEOUT = 5
START_TOLERANCE_S = 2.0
WRITERS = 8
"""Transactions of this process at once; on SQLite one, as it would have them wait without any order."""


class LeaseLost(Exception):
    """Another scheduler holds the lease; this one must not write any more."""


class _Sight(NamedTuple):
    """What the row looked like, and when (own monotonic clock) it was first seen so."""

    epoch: int
    beat: int
    since: float


class Lease:
    """The right to write. ``epoch`` is 0 until acquired, and grows with every change of holder."""

    def __init__(self, database: Database, timeout_s: float, holder: str | None = None) -> None:
        self._database = database
        self._timeout_s = timeout_s
        self.holder = holder or this_process()
        self.epoch = 0
        sqlite = database.engine.dialect.name == "sqlite"
        self._line = asyncio.Semaphore(1 if sqlite else WRITERS)
        self._next = asyncio.Semaphore(1) if sqlite else contextlib.nullcontext()
        self._sight: _Sight | None = None

    async def acquire(self) -> int:
        """Wait until the lease is ours (and the database there); its epoch."""
        while not await self._could_acquire():
            await pause(self._timeout_s / BEATS_PER_TIMEOUT)
        log.info("lease acquired", extra={"epoch": self.epoch, "holder": self.holder})
        return self.epoch

    async def _could_acquire(self) -> bool:
        try:
            return await self.try_acquire()
        except Exception:
            log.exception("the lease could not be looked at")
            self._sight = None  # while the database was away, nobody could beat
            return False

    async def try_acquire(self) -> bool:
        """Take the lease if nobody holds it, its holder is gone, or its beat has stood still for the time-out."""
        async with self._database.write() as session:
            await insert_or_nothing(session, SchedulerLease, id=1)
            row = await session.get_one(SchedulerLease, 1, with_for_update=True)
            if not self._is_free(row):
                return False
            row.epoch += 1
            row.beat += 1
            row.holder = self.holder
            epoch = row.epoch
        self.epoch = epoch
        return True

    def _is_free(self, row: SchedulerLease) -> bool:
        if row.holder == "" or is_gone(row.holder):
            return True
        if self._sight is None or (row.epoch, row.beat) != self._sight[:2]:
            self._sight = _Sight(row.epoch, row.beat, time.monotonic())
        return time.monotonic() - self._sight.since >= self._timeout_s

    async def beat(self) -> None:
        """Say that we are there. Raises LeaseLost."""
        async with self._next, self._database.write() as session:
            changed = await session.execute(
                update(SchedulerLease)
                .where(SchedulerLease.id == 1, SchedulerLease.epoch == self.epoch)
                .values(beat=SchedulerLease.beat + 1)
            )
            if changed.rowcount == 0:  # type: ignore[attr-defined]
                raise LeaseLost

    async def keep_beating(self) -> None:
        """Beat until the lease is lost (raises LeaseLost); a database that is away for a while is waited for."""
        while True:
            await pause(self._timeout_s / BEATS_PER_TIMEOUT)
            try:
                await self.beat()
            except LeaseLost:
                raise
            except Exception:
                log.exception("the lease's beat could not be written")

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """A transaction that only the holder can commit. Raises LeaseLost before anything is read or written.

        The row is locked in the mode that the beat (which leaves its key alone) does not wait for, but ``try_acquire``
        does; on SQLite the transaction holds the whole database. Many who want to write stand in line; the beat comes
        next, whoever else waits.
        """
        async with self._line, self._next, self._database.write() as session:
            epoch = await session.scalar(
                select(SchedulerLease.epoch).where(SchedulerLease.id == 1).with_for_update(read=True, key_share=True)
            )
            if epoch != self.epoch:
                raise LeaseLost
            yield session

    async def check(self) -> None:
        """Raises LeaseLost when another scheduler holds it. To be asked before what no fence refuses afterwards."""
        async with self.write():
            pass

    async def release(self) -> None:
        """Give it back at an orderly end, so that the next scheduler need not wait."""
        async with self._database.write() as session:
            await session.execute(
                update(SchedulerLease)
                .where(SchedulerLease.id == 1, SchedulerLease.epoch == self.epoch)
                .values(holder="")
            )


def this_process() -> str:
    """``host/pid/start``; the host includes the pid namespace, within which alone a pid means something."""
    process = psutil.Process()
    return f"{_host()}/{process.pid}/{process.create_time():.2f}"


def is_gone(holder: str) -> bool:
    """Whether ``holder`` is a process of this host that is no longer there. False when that cannot be known."""
    host, _, rest = holder.partition("/")
    pid, _, start = rest.partition("/")
    if host != _host() or not pid.isdigit():
        return False
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(start)) > START_TOLERANCE_S or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _host() -> str:
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()[:64]}:{namespace}"
