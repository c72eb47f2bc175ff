"""The scheduler: observe (database, then one look at the cluster), decide (pure), act. Its memory is only a cache."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.db import Database
from control_plane.services import paused, prices
from control_plane.services.catalog import Catalog
from control_plane.services.lifecycle import append_event, stage_payload
from control_plane.services.sql import insert_or_nothing
from control_plane.settings import Settings
from control_plane.states import ACTIVE, Status, StopReason, WorkKind
from control_plane.tables import Attempt, ClusterState, TrainingJob, now
from scheduler import retention
from scheduler.accrual import Accrual
from scheduler.carrier import Carrier
from scheduler.collect import Collector
from scheduler.deliver import Deliverer
from scheduler.dispatch import Dispatcher
from scheduler.executor import AttemptGone, Executor, Look, StaleEpoch, Unreachable
from scheduler.lease import Lease, LeaseLost
from scheduler.mirror import Mirror
from scheduler.observe import held_attempts, paused_by_budget, waiting_work
from scheduler.pause import pause
from scheduler.policy import (
    Action,
    AskStop,
    DeclareFault,
    Dispatch,
    EndByForce,
    Follow,
    Release,
    SetQueueReason,
    SetReconnecting,
    Snapshot,
    Start,
    Withdraw,
    decide,
)
from scheduler.setbacks import Setbacks
from scheduler.tracking import Tracking, TrackingDown, TrackingRefused
from scheduler.work import attempt_name, get_work

log = logging.getLogger(__name__)
LOOK_S = 15.0
CLUSTER_PATIENCE_S = 10.0
"""A driver whose cluster is away for longer is of no use any more, even when the cluster comes back."""
FIRST_PATIENCE_S = 60.0
"""The same for one that has connected and has had no answer yet."""
TRACKING_PAUSE_S = 5.0
SETBACK_S = 600.0
"""The longest that work which cannot be dispatched stands aside before it is tried again."""
PUBLISH_S = 5.0
BUDGET_S = 5.0
"""How often to look whether the budget lets paused jobs go on."""


class ClusterLost(Exception):
    """The cluster that this process was connected to is gone; a fresh process may reach it."""


class _Asked(Exception):
    """An orderly end was asked for."""


class Scheduler:
    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        database: Database,
        executor: Executor,
        tracking: Tracking,
        storage: retention.ObjectStore,
        *,
        lease: Lease | None = None,
        carrier: Carrier | None = None,
        reached: Callable[[], None] = lambda: None,
    ) -> None:
        """Without a ``carrier`` the outbox is left alone. ``reached`` is called when the cluster is first seen."""
        self._settings = settings
        self._catalog = catalog
        self._database = database
        self._executor = executor
        self._storage = storage
        self._reached = reached
        self.lease = lease or Lease(database, settings.lease_timeout_s)
        self._wake = asyncio.Event()
        self._mirror = Mirror(database, self.lease, tracking)
        self._deliverer = Deliverer(database, self.lease, carrier) if carrier else None
        self._dispatcher = Dispatcher(settings, catalog, database, self.lease, executor, tracking)
        self._collector = Collector(
            database, self.lease, executor, storage, allowance_s=settings.allowance_s, ended=self._wake.set
        )
        self._group: asyncio.TaskGroup
        self._busy: set[str] = set()
        self._asked: set[tuple[str, StopReason]] = set()
        self._tracking_problem: tuple[str, float] | None = None
        self._setbacks = Setbacks()
        self._reached_at: float | None = None
        self._bound_at: float | None = None
        self._cluster: tuple[str, float] | None = None
        self._published: tuple[Look, float] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Wait for the lease, then work until ``stop``. Running attempts go on. Raises LeaseLost, ClusterLost."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._until(stop))
                group.create_task(self._work())
        except ExceptionGroup as ends:
            _, unexpected = ends.split((_Asked, LeaseLost, ClusterLost))
            if unexpected:
                raise unexpected from None
            for lost in (LeaseLost, ClusterLost):
                if ends.subgroup(lost):
                    raise lost from None
        finally:
            if self.lease.epoch:
                with suppress(Exception):
                    await self.lease.release()

    async def _until(self, stop: asyncio.Event) -> None:
        await stop.wait()
        raise _Asked

    async def _work(self) -> None:
        await self.lease.acquire()
        self._group.create_task(self.lease.keep_beating())
        while not await self._has_price():
            await pause(self._settings.tick_s)
        self._group.create_task(self._mirror.run())
        self._group.create_task(Accrual(self._database, self.lease).run())
        if self._deliverer is not None:
            self._group.create_task(self._deliverer.run())
        self._group.create_task(self._let_go_on())
        self._spawn("sweep", retention.sweep(self._database, self._storage))
        while True:
            try:
                await self.tick()
            except (LeaseLost, ClusterLost):
                raise
            except Exception:
                log.exception("the tick failed")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.tick_s):
                    await self._wake.wait()
            await pause(0)
            self._wake.clear()

    async def _has_price(self) -> bool:
        """Whether there is one now; False: the database did not take the first."""
        try:
            async with self.lease.write() as session:
                await prices.ensure_first(session, self._catalog)
            return True
        except LeaseLost:
            raise
        except Exception:
            log.exception("the first price could not be written")
            return False

    async def _let_go_on(self) -> None:
        """Jobs that the budget has paused go on when it allows: it was raised, a month began, a hold was released."""
        while True:
            await self._guarded("looking at paused jobs", self._look_at_paused())
            await pause(BUDGET_S)

    async def _look_at_paused(self) -> None:
        async with self._database.read() as session:
            waiting = await paused_by_budget(session)
        for job_id in waiting:
            await self._guarded(f"going on with {job_id}", self._go_on(job_id))

    async def _go_on(self, job_id: str) -> None:
        async with self.lease.write() as session:
            job = await get_work(session, WorkKind.JOB, job_id, lock=True)
            if isinstance(job, TrainingJob) and await paused.go_on(session, job):
                self._wake.set()

    async def tick(self) -> None:
        """Once around. The database is read before the look, so that whatever it says was started can be seen."""
        async with self._database.read() as session:
            waiting = await waiting_work(session, self._catalog)
            held = await held_attempts(session, self._catalog)
        look = await self._look()
        self._asked &= {(attempt.name, reason) for attempt in held for reason in StopReason}
        snapshot = Snapshot(
            waiting,
            held,
            look,
            self._tracking_trouble(),
            self._setbacks.current([work.work_id for work in waiting]),
            frozenset(self._asked),
            self._collector.silent_s(),
            self._collector.spent(),
            self._known_s(look),
            self._settings.node_timeout_s,
        )
        actions = decide(snapshot, now())
        await self._write_down(actions, look)
        for action in actions:
            self._act(action, look)

    async def _look(self) -> Look:
        try:
            async with asyncio.timeout(LOOK_S):
                look = await self._executor.look()
        except (TimeoutError, Unreachable):
            look = Look(reachable=False)
        if look.reachable:
            if self._reached_at is None:
                self._reached()
            self._reached_at = time.monotonic()
            return look
        self._collector.forget_silences()
        if self._is_lost(look):
            await self._write_down([], look)
            raise ClusterLost
        return look

    def _is_lost(self, look: Look) -> bool:
        """Whether this process will not reach its cluster any more."""
        now = time.monotonic()
        if self._reached_at is not None:
            return now - self._reached_at > CLUSTER_PATIENCE_S
        if not look.bound:
            self._bound_at = None
            return False
        self._bound_at = self._bound_at or now
        return now - self._bound_at > FIRST_PATIENCE_S

    def _known_s(self, look: Look) -> float:
        """For how long this process has seen the cluster under this id."""
        if look.reachable and (self._cluster is None or self._cluster[0] != look.cluster_id):
            self._cluster = (look.cluster_id, time.monotonic())
        return time.monotonic() - self._cluster[1] if self._cluster else 0.0

    def _tracking_trouble(self) -> str | None:
        if self._tracking_problem is None or time.monotonic() > self._tracking_problem[1]:
            return None
        return self._tracking_problem[0]

    async def _write_down(self, actions: list[Action], look: Look) -> None:
        """What only the database needs to know, in one transaction; none when nothing is new."""
        told = [action for action in actions if isinstance(action, SetQueueReason | SetReconnecting)]
        publish = self._publishable(look)
        if not told and not publish:
            return
        async with self.lease.write() as session:
            for action in told:
                await _tell(session, action)
            if publish:
                await _publish(session, look)
        if publish:
            self._published = (look, time.monotonic())

    def _publishable(self, look: Look) -> bool:
        if self._published is None:
            return True
        last, at = self._published
        changed = (last.reachable, last.cluster_id, last.free, last.total) != (
            look.reachable, look.cluster_id, look.free, look.total,
        )  # fmt: skip
        return changed or time.monotonic() - at > PUBLISH_S

    def _act(self, action: Action, look: Look) -> None:
        match action:
            case Dispatch(kind, work_id):
                self._spawn(work_id, self._dispatch(kind, work_id, look.cluster_id))
            case Start(work_id, attempt_id):
                self._spawn(work_id, self._start(attempt_id, look.cluster_id))
            case Withdraw(work_id, attempt_id):
                self._spawn(work_id, self._withdraw(attempt_id))
            case Follow(attempt_id, name, adopt):
                if adopt:
                    self._spawn(f"adopt {name}", self._dispatcher.note_started(attempt_id, look.cluster_id))
                self._collector.follow(attempt_id, name, self._group)
            case AskStop(name, reason):
                self._spawn(f"stop {name}", self._ask_stop(name, reason))
            case EndByForce(name):
                self._spawn(f"end {name}", self._end_by_force(name))
            case DeclareFault(attempt_id, name, code, message):
                self._spawn(f"end {name}", self._collector.declare_fault(attempt_id, name, code, message))
            case Release(name, attempt_id):
                self._spawn(f"release {name}", self._release(name, attempt_id))

    async def _dispatch(self, kind: WorkKind, work_id: str, cluster_id: str) -> None:
        told, longest_s = "It could not be started (the scheduler's log says why); it is tried again", SETBACK_S
        try:
            await self._dispatcher.dispatch(kind, work_id, cluster_id)
            return
        except (LeaseLost, StaleEpoch, Unreachable):
            raise
        except TrackingDown as error:
            told, longest_s = "The MLflow server does not answer", 2 * TRACKING_PAUSE_S
            self._tracking_problem = (told, time.monotonic() + TRACKING_PAUSE_S)
            log.warning("no MLflow run for %s: %s", work_id, error)
        except TrackingRefused as error:
            told = "The MLflow server refuses a run for it"
            log.warning("no MLflow run for %s: %s", work_id, error)
        except Exception:
            log.exception("%s could not be dispatched", work_id)
        self._setbacks.note(work_id, told, first_s=TRACKING_PAUSE_S, longest_s=longest_s)

    async def _start(self, attempt_id: str, cluster_id: str) -> None:
        async with self._database.read() as session:
            attempt = await session.get_one(Attempt, attempt_id)
        if attempt.outcome is None and attempt.cluster_id is None:
            await self._dispatcher.start(attempt_id, cluster_id)

    async def _withdraw(self, attempt_id: str) -> None:
        await self._dispatcher.withdraw(attempt_id)
        self._wake.set()

    async def _ask_stop(self, name: str, reason: StopReason) -> None:
        await self._executor.stop(name, reason, epoch=self.lease.epoch)
        self._asked.add((name, reason))

    async def _end_by_force(self, name: str) -> None:
        log.warning("%s answers nothing: it is ended", name)
        await self._collector.release(name)
        self._wake.set()

    async def _release(self, name: str, attempt_id: str | None) -> None:
        if attempt_id is None and await self._is_under_way(name):
            return
        await self._collector.release(name)
        async with self.lease.write() as session:
            await session.execute(
                update(Attempt).where(Attempt.actor_name == name, Attempt.outcome.is_not(None)).values(released=True)
            )
        self._wake.set()

    async def _is_under_way(self, name: str) -> bool:
        """Whether the database knows the name after all: it may have been committed after this tick had looked."""
        async with self._database.read() as session:
            known = select(Attempt.id).where(Attempt.actor_name == name, Attempt.outcome.is_(None))
            return await session.scalar(known) is not None

    def _spawn(self, key: str, action: Coroutine[Any, Any, None]) -> None:
        """Do it beside the ticks, unless the same is still under way."""
        if key in self._busy:
            action.close()
            return
        self._busy.add(key)
        task = self._group.create_task(self._guarded(key, action), name=key)
        task.add_done_callback(lambda _: action.close())  # a task that ends before it began has not awaited it

    async def _guarded(self, key: str, action: Coroutine[Any, Any, None]) -> None:
        try:
            await action
        except (LeaseLost, StaleEpoch) as error:
            raise LeaseLost from error
        except (AttemptGone, Unreachable) as error:
            log.warning("%s: %s", key, error)
        except Exception:
            log.exception("%s failed", key)
        finally:
            self._busy.discard(key)


async def _tell(session: AsyncSession, action: SetQueueReason | SetReconnecting) -> None:
    work = await get_work(session, action.kind, action.work_id, lock=True)
    if isinstance(action, SetReconnecting):
        if work.status in ACTIVE and attempt_name(work) == action.name:
            work.reconnecting = action.value
        return
    if work.status is not Status.QUEUED:
        return
    work.queue_reason = action.reason[:300]
    if isinstance(work, TrainingJob):
        await append_event(session, work.id, "stage", stage_payload(work))


async def _publish(session: AsyncSession, look: Look) -> None:
    await insert_or_nothing(session, ClusterState, id=1)
    await session.execute(
        update(ClusterState)
        .where(ClusterState.id == 1)
        .values(
            reachable=look.reachable,
            cluster_id=look.cluster_id,
            free=look.free,
            total=look.total,
            updated_at=now(),
        )
    )
