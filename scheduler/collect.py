"""Hears running attempts: one task each, so that one that does not answer delays no other.

Each batch of events is one transaction that moves the attempt's cursor by compare-and-set: the same batch twice, or a
commit whose success its caller never saw, changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.db import Database, is_unavailable
from control_plane.services import lifecycle
from control_plane.states import Outcome, StopReason
from control_plane.tables import Attempt, TrainingJob
from scheduler import ledger, retention
from scheduler.executor import OVERRUN_MS, AttemptGone, Batch, Ending, Executor, RankTimes, StaleEpoch, Unreachable
from scheduler.finish import Claimed, claim, finish, tell_cost
from scheduler.heard import Heard, Stored, parse
from scheduler.lease import Lease, LeaseLost
from scheduler.pause import pause
from scheduler.project import JobProjection, VerdictProjection
from scheduler.work import get_work

log = logging.getLogger(__name__)
POLL_S = 1.0
ANSWER_S = 15.0
"""A supervisor that takes longer to answer is asked again."""
SILENT_POLLS = 3
"""Fewer polls in vain are not yet a silence."""
FULL_BATCH = 500
AT_ONCE = 8
"""Attempts whose rows are read or written at once: thousands stand in line, instead of running out of connections."""
MAX_FAILURES = 6
"""Tries to store a batch that the database, although there, does not take; then the attempt is given up."""
LONGEST_PAUSE_S = 15.0
ENDS_KNOWN_S = 5.0
"""How long to wait for Ray to record the ends of ranks that are gone."""


class Place(NamedTuple):
    """How far an attempt has been heard."""

    cursor: int
    allowance_ms: int | None
    usage: ledger.Usage
    ended: bool = False


class _Silence(NamedTuple):
    """Polls of an attempt in vain."""

    left_ms: float
    """What the attempt could use, all ranks together, after it was last heard."""
    ranks: int
    last: float
    """When the last of them failed, by the monotonic clock."""
    polls: int = 1
    seconds: float = 0.0
    """From the first to the last, without what this process slept through itself (stopped, or starved)."""

    @classmethod
    def after(cls, place: Place) -> _Silence:
        used_ms = sum(sum(kinds.values()) for kinds in place.usage.values())
        left_ms = math.inf if place.allowance_ms is None else place.allowance_ms - used_ms
        return cls(left_ms, max(1, len(place.usage)), time.monotonic())

    def longer(self) -> _Silence:
        now = time.monotonic()
        seconds = self.seconds + min(now - self.last, POLL_S + ANSWER_S)
        return self._replace(last=now, polls=self.polls + 1, seconds=seconds)

    @property
    def spent(self) -> bool:
        return self.seconds * 1000 * self.ranks > self.left_ms + OVERRUN_MS


class Collector:
    """``ended`` is called when an attempt's end has been committed."""

    def __init__(
        self,
        database: Database,
        lease: Lease,
        executor: Executor,
        storage: retention.ObjectStore,
        *,
        allowance_s: int,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._lease = lease
        self._executor = executor
        self._storage = storage
        self._ahead_ms = allowance_s * 1000
        self._ended = ended
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._silences: dict[str, _Silence] = {}
        self._given_up: set[str] = set()
        self._line = asyncio.Semaphore(AT_ONCE)

    def follow(self, attempt_id: str, name: str, group: asyncio.TaskGroup) -> None:
        """Collect from an attempt until it has ended, in a task of ``group``; harmless when that is going on."""
        if attempt_id not in self._tasks:
            task = group.create_task(self._follow(attempt_id, name), name=f"follow {name}")
            self._tasks[attempt_id] = task
            task.add_done_callback(lambda _: self._forget(attempt_id, name))

    def _forget(self, attempt_id: str, name: str) -> None:
        self._tasks.pop(attempt_id, None)
        self._given_up.discard(attempt_id)
        self._silences.pop(name, None)

    def silent_s(self) -> dict[str, float]:
        """How long attempts have answered nothing, by name: from the first poll in vain to the last."""
        return {name: silence.seconds for name, silence in self._silences.items() if silence.polls >= SILENT_POLLS}

    def spent(self) -> frozenset[str]:
        """Silent attempts that must have used up their allowance meanwhile, by name."""
        return frozenset(name for name, silence in self._silences.items() if silence.spent)

    def forget_silences(self) -> None:
        """The cluster cannot be reached: that nobody answers says nothing."""
        self._silences.clear()

    async def declare_fault(self, attempt_id: str, name: str, code: str, message: str) -> None:
        """End an attempt whose supervisor is confirmed dead. Raises LeaseLost, Unreachable."""
        if attempt_id in self._given_up:
            return  # it is being ended, for a better known reason
        following = self._tasks.get(attempt_id)
        if following is not None:
            following.cancel()
        await self._end_as_fault(attempt_id, name, code, message)

    async def release(self, name: str) -> None:
        """End what is left of an attempt. Raises LeaseLost, StaleEpoch, Unreachable (something of it may be left)."""
        await self._lease.check()
        await self._executor.release(name, epoch=self._lease.epoch)

    async def _end_as_fault(self, attempt_id: str, name: str, code: str, message: str) -> None:
        """What is left of it ends first: so its times are whole, and the next attempt meets nothing of it."""
        await self.release(name)
        times = await self._times(name, [])
        ending = Ending("FAULT", code, message, times=times)
        async with self._lease.write() as session:
            claimed = await claim(session, attempt_id)
            if claimed is not None:
                claimed.attempt.released = True
                await finish(session, claimed, ending)
        log.warning("attempt %s is lost: %s", name, message)
        self._ended()

    async def _follow(self, attempt_id: str, name: str) -> None:
        place: Place | None = None
        failures = 0
        while failures < MAX_FAILURES:
            try:
                place = place or await self.place_of(attempt_id)
                if place.ended:
                    return
                batch = await self._hear(name, place)
                if batch is None:
                    await pause(POLL_S)
                    continue
                place = await self.apply(attempt_id, name, place, batch)
                failures = 0
                await pause(0 if place is None or len(batch.events) >= FULL_BATCH else POLL_S)
            except (StaleEpoch, LeaseLost) as error:
                raise LeaseLost from error
            except Unreachable as error:
                log.warning("the end of %s is not known yet: %s", name, error)
                await pause(POLL_S)
            except Exception as error:
                log.exception("events of %s could not be stored", name)
                place = None
                if not is_unavailable(error):
                    failures += 1
                await pause(min(POLL_S * 2**failures, LONGEST_PAUSE_S))
        await self._give_up(attempt_id, name)

    async def _hear(self, name: str, place: Place) -> Batch | None:
        """What an attempt tells; None: no answer. Whether it is dead is for the look to tell. Raises StaleEpoch."""
        epoch, allowance_ms = self._lease.epoch, place.allowance_ms
        try:
            async with asyncio.timeout(ANSWER_S):
                batch = await self._executor.poll(name, place.cursor, epoch=epoch, allowance_ms=allowance_ms)
        except StaleEpoch:
            raise
        except Exception as error:
            if not isinstance(error, AttemptGone | Unreachable | TimeoutError):
                log.exception("%s could not be asked", name)
            before = self._silences.get(name)
            self._silences[name] = before.longer() if before else _Silence.after(place)
            return None
        self._silences.pop(name, None)
        return batch

    async def _give_up(self, attempt_id: str, name: str) -> None:
        """End an attempt whose events the database does not take, however often that must be tried."""
        self._given_up.add(attempt_id)
        while True:
            try:
                told = "What the attempt told could not be stored"
                return await self._end_as_fault(attempt_id, name, "EVENTS_REFUSED", told)
            except (StaleEpoch, LeaseLost) as error:
                raise LeaseLost from error
            except Exception:
                log.exception("%s could not be ended", name)
            await pause(LONGEST_PAUSE_S)

    async def place_of(self, attempt_id: str) -> Place:
        async with self._line, self._database.read() as session:
            attempt = await session.get_one(Attempt, attempt_id)
            work = await get_work(session, attempt.work_kind, attempt.work_id)
            allowance_ms = None
            if isinstance(work, TrainingJob):
                allowance_ms = await ledger.allowance_ms(session, work, attempt, self._ahead_ms * work.gpu_count)
            usage = await ledger.usage_of(session, attempt_id)
        return Place(attempt.event_cursor, allowance_ms, usage, attempt.outcome is not None)

    async def apply(self, attempt_id: str, name: str, place: Place, batch: Batch) -> Place | None:
        """Store a batch that was polled at ``place``; the next place. None: read it from the database again."""
        batch = _held_back(batch)
        if not batch.events and not batch.ending and batch.usage == place.usage:
            return place
        ending = batch.ending
        if ending is not None:
            ending.times = await self._times(name, ending.times)
        cursor = batch.events[-1].number if batch.events else place.cursor
        heard = parse(batch.events)
        async with self._line, self._lease.write() as session:
            claimed = await claim(session, attempt_id, cursor=place.cursor, to=cursor)
            if claimed is None:
                return None
            obsolete = await _store(session, claimed, heard, batch.usage)
            if batch.state == "stopping" and claimed.work.stop_requested is None:
                await lifecycle.ask_to_stop(session, claimed.work, StopReason.BUDGET)  # all that it does by itself
            allowance_ms = await self._allowance_ms(session, claimed) if ending is None else None
            if ending is not None:
                await finish(session, claimed, ending)
        if ending is not None:
            log.info("attempt %s ended: %s %s", name, ending.outcome, ending.code)
            self._ended()
        await retention.delete(self._storage, obsolete)
        return Place(cursor, allowance_ms, batch.usage, ending is not None)

    async def _allowance_ms(self, session: AsyncSession, claimed: Claimed) -> int | None:
        attempt, work = claimed
        if not isinstance(work, TrainingJob):
            return None
        ahead_ms = self._ahead_ms * work.gpu_count
        await ledger.reserve(session, work, ahead_ms=ahead_ms)
        return await ledger.allowance_ms(session, work, attempt, ahead_ms)

    async def _times(self, name: str, known: list[RankTimes]) -> list[RankTimes]:
        """The ranks' times once Ray has recorded their ends; if it does not, what it knows when asked after a while: an
        answer that was long on its way is an old one."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + ENDS_KNOWN_S
        times = known
        while not times or any(rank.end_ms == 0 for rank in times):
            asked = clock()
            times = await self._executor.times(name) or times
            if all(rank.end_ms for rank in times) or asked > deadline:
                break
            await pause(0.1)
        return times


def _held_back(batch: Batch) -> Batch:
    """A verdict's report counts only together with its good end: until then the batch ends before it."""
    reports = (place for place, up in enumerate(batch.events) if up.event.get("type") == "verdict")
    first = next(reports, None)
    if first is None or (batch.ending is not None and batch.ending.outcome == Outcome.COMPLETED):
        return batch
    return Batch(batch.events[:first], batch.usage, batch.ending, batch.state)


async def _store(session: AsyncSession, claimed: Claimed, heard: list[Heard], usage: ledger.Usage) -> list[str]:
    """Events and usage of a claimed attempt; the storage prefixes of checkpoints that may go."""
    attempt, work = claimed
    if not isinstance(work, TrainingJob):
        await VerdictProjection(session, work, attempt).apply(heard)
        return []
    projection = JobProjection(session, work, attempt)
    await projection.apply(heard)
    await ledger.record(session, attempt, usage)
    if await ledger.post(session, work, attempt):
        await tell_cost(session, work)
    if any(isinstance(item.event, Stored) for item in heard):
        return projection.torn + await retention.mark_obsolete(session, work.id)
    return projection.torn
