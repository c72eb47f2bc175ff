"""Follows ``job_events`` for every stream of a process: one query a tick for all of them, fanned out.

A watcher has its own cursor. A query reads, for each watched job, what lies after the lowest cursor of its watchers
that have room; so replay and following are the same thing, and a slow reader delays nobody but itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from sqlalchemy import and_, or_, select

from control_plane.db import Database
from control_plane.tables import JobEvent

log = logging.getLogger(__name__)
ROOM = 512
"""Events that wait for a reader."""
PER_QUERY = 1000
JOBS_PER_QUERY = 200


class Watcher:
    """One stream's place in one job's events."""

    def __init__(self, job_id: str, cursor: int, news: asyncio.Event) -> None:
        self.job_id = job_id
        self.cursor = cursor
        """The last seq that was put into ``events``."""
        self.events: asyncio.Queue[JobEvent] = asyncio.Queue(ROOM)
        self._news = news
        self._filled = False

    def offer(self, event: JobEvent) -> None:
        if event.seq == self.cursor + 1 and not self.events.full():
            self.events.put_nowait(event)
            self.cursor = event.seq
            self._filled = self.events.full()

    async def next(self, timeout_s: float) -> JobEvent | None:
        """The next event, or None when none came in time. When all room was taken and is free again, more is asked."""
        if self._filled and self.events.empty():
            self._filled = False
            self._news.set()
        with suppress(TimeoutError):
            return await asyncio.wait_for(self.events.get(), timeout_s)
        return None


class Follower:
    """Runs while somebody watches."""

    def __init__(self, database: Database, tick_s: float = 0.5) -> None:
        self._database = database
        self._tick_s = tick_s
        self._watchers: set[Watcher] = set()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def watch(self, job_id: str, after: int) -> AsyncIterator[Watcher]:
        """Events with a seq above ``after``, in order, without a gap."""
        watcher = Watcher(job_id, after, self._news)
        self._watchers.add(watcher)
        self._news.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow(), name="follow job events")
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    async def close(self) -> None:
        self._watchers.clear()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        while self._watchers:
            self._news.clear()
            try:
                more = await self._tick()
            except Exception:
                log.exception("job events cannot be read")
                more = False
            if not more:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), self._tick_s)

    async def _tick(self) -> bool:
        """Hand out what is new. True if there may be more at once."""
        lowest: dict[str, int] = {}
        for watcher in self._watchers:
            if not watcher.events.full():
                lowest[watcher.job_id] = min(watcher.cursor, lowest.get(watcher.job_id, watcher.cursor))
        jobs = list(lowest.items())
        more = False
        for start in range(0, len(jobs), JOBS_PER_QUERY):
            events = await self._read(jobs[start : start + JOBS_PER_QUERY])
            more = more or len(events) == PER_QUERY
            for event in events:
                for watcher in self._watchers:
                    if watcher.job_id == event.job_id:
                        watcher.offer(event)
        return more

    async def _read(self, jobs: list[tuple[str, int]]) -> list[JobEvent]:
        after = or_(*(and_(JobEvent.job_id == job, JobEvent.seq > seq) for job, seq in jobs))
        query = select(JobEvent).where(after).order_by(JobEvent.seq, JobEvent.job_id).limit(PER_QUERY)
        async with self._database.read() as session:
            return list(await session.scalars(query))
