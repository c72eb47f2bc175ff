"""One simulated installation: two schedulers, an API, a cluster, MLflow, an object store, a database, customers."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import msgspec

from control_plane.services.catalog import Catalog
from control_plane.settings import Settings
from scheduler.lease import Lease, LeaseLost
from scheduler.loop import ClusterLost, Scheduler
from scheduler.simulator.clock import MIDNIGHT, PROCESS, Clock, Process
from scheduler.simulator.cluster import Cluster
from scheduler.simulator.database import SimulatedDatabase, Store
from scheduler.simulator.faults import Hazards
from scheduler.simulator.network import ClusterClient, Messenger, ObjectClient, Objects, TrackingClient
from scheduler.simulator.oracle import Oracle, Violated
from scheduler.simulator.tracking import FakeTracking

PERSISTENT_S = 5.0


@dataclass(frozen=True)
class Happening:
    at_s: float
    what: str
    details: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        details = " ".join(f"{key}={value}" for key, value in self.details.items())
        return f"{self.at_s:9.3f}  {self.what:<20} {details}"


class World:
    def __init__(self, seed: int, content: bytes) -> None:
        self.seed = seed
        rng = self.rng("world")
        begin = MIDNIGHT + timedelta(hours=rng.randint(2, 20))
        if rng.random() < 0.1:
            begin = MIDNIGHT - timedelta(seconds=rng.randint(20, 100))
        self.clock = Clock(begin)
        self.begin_s = self.clock.now
        self.happenings: list[Happening] = []
        self._background: dict[asyncio.Task[Any], None] = {}
        self._prices = 1
        self._ids = 0
        self.embedded = rng.random() < 0.5
        """Whoever starts the cluster's head anew ends what is left of the old one; else its nodes may outlive it."""
        self.settings = settings(allowance_s=rng.choice((25, 60, 1800)), node_timeout_s=0.0 if self.embedded else 45.0)
        self.catalog = catalog(tflops=rng.choice((0.5, 2.0, 1000.0, 1000.0)))
        self.slots = rng.randint(1, 4)
        self.one_machine = rng.random() < 0.5
        """Both schedulers run on one machine, so that each can see whether the other's process is there."""
        self.hazards = Hazards(self)
        self.store = Store(self, content)
        self.database = SimulatedDatabase()
        self.objects = Objects()
        self.tracking = FakeTracking()
        self.oracle = Oracle(self)
        self.cluster = Cluster(self, {"slot_cpu": float(self.slots), "slot_io": 1.0})
        self.receiver_failing = False
        skew_s = rng.choice((0.0, 0.0, 3.0, -700.0))
        self.api = Host(self, "api", 0.0)
        self.schedulers = [SchedulerHost(self, "A", 0.0)]
        if rng.random() < 0.8:
            self.schedulers.append(SchedulerHost(self, "B", skew_s))
        self.hosts: list[Host] = [*self.schedulers, self.api]

    def rng(self, what: str) -> random.Random:
        """A stream of its own for every part, so that none depends on how often another asks."""
        return random.Random(f"{self.seed} {what}")

    @property
    def elapsed_s(self) -> float:
        return self.clock.now - self.begin_s

    def note(self, what: str, /, **details: Any) -> None:
        self.happenings.append(Happening(round(self.elapsed_s, 3), what, details))

    def background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task of the world's own, outside of every process."""
        context = copy_context()
        context.run(PROCESS.set, None)
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._background[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._background.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Violated):
            self.oracle.logged(error)

    def next_price(self) -> int:
        self._prices += 1
        return self._prices

    def next_id(self, process: Process | None) -> str:
        """Like uuid7: sortable by the process's wall clock."""
        self._ids += 1
        offset_s = process.wall_offset_s if process else 0.0
        ms = f"{int((self.clock.date_s() + offset_s) * 1000):012x}"
        return f"{ms[:8]}-{ms[8:]}-7000-8000-{self._ids:012x}"

    def committed(self, process: Process, changed: bool) -> None:
        if changed:
            self.note("commit", process=process.name)
            self.oracle.committed(process)

    def is_gone(self, holder: str) -> bool:
        """In place of ``scheduler.lease.is_gone``."""
        return self.one_machine and not any(
            host.process and host.process.alive and host.process.name == holder for host in self.schedulers
        )

    def start(self) -> None:
        for host in self.hosts:
            self.background(host.run())

    async def end(self) -> None:
        for host in self.hosts:
            if host.process:
                host.process.kill()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


class Host:
    """What keeps a process running: started again whenever it ends. The API waits for requests."""

    def __init__(self, world: World, name: str, wall_offset_s: float) -> None:
        self.world = world
        self.name = name
        self.wall_offset_s = wall_offset_s
        self.process: Process | None = None
        self._rng = world.rng(f"host {name}")
        self._starts = 0

    async def run(self) -> None:
        while True:
            self._starts += 1
            self.process = Process(self.world, f"{self.name}{self._starts}", self.wall_offset_s, self.name)
            task = self.process.spawn(self._main(self.process))
            self.world.note("starts", process=self.process.name)
            while not task.done():
                await asyncio.wait({task}, timeout=PERSISTENT_S)
                if not self.process.alive:
                    task.cancel()
            why = "killed" if task.cancelled() else repr(task.exception() or task.result())
            self.world.note("ends", process=self.process.name, why=why)
            error = None if task.cancelled() else task.exception()
            if error is not None and self.process.alive:
                self.world.oracle.died(self.process, error)
            self.process.kill()
            await asyncio.sleep(self._rng.choice((0.2, 1.0, 3.0, 15.0)))

    async def _main(self, process: Process) -> Any:
        await asyncio.get_running_loop().create_future()


class SchedulerHost(Host):
    scheduler: Scheduler | None = None

    async def _main(self, process: Process) -> Any:
        world = self.world
        lease = Lease(world.database, world.settings.lease_timeout_s, process.name)
        self.scheduler = Scheduler(
            world.settings,
            world.catalog,
            world.database,
            ClusterClient(process),
            TrackingClient(process),
            ObjectClient(process),
            lease=lease,
            carrier=Messenger(process),
        )
        world.oracle.leases[process.name] = lease
        try:
            return await self.scheduler.run(asyncio.Event())
        except (LeaseLost, ClusterLost) as error:
            return type(error).__name__


class Errors(logging.Handler):
    """What the platform logs as an error must have been caused by a fault; anything else is a bug."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = (record.exc_info and record.exc_info[1]) or RuntimeError(record.getMessage())
        self._world.note("error", message=record.getMessage(), error=repr(error)[:300])
        self._world.oracle.logged(error)


@cache
def settings(allowance_s: int = 1800, node_timeout_s: float = 0.0) -> Settings:
    return Settings(tick_s=4.0, lease_timeout_s=15.0, allowance_s=allowance_s, node_timeout_s=node_timeout_s)


@cache
def catalog(tflops: float = 1000.0) -> Catalog:
    loaded = Catalog.load(settings())
    cpu = msgspec.structs.replace(loaded.gpu_types["cpu"], counts=(1, 2, 3), tflops=tflops)
    return msgspec.structs.replace(loaded, gpu_types={"cpu": cpu})
