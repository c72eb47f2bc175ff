"""Everything that goes wrong, drawn from the seed: what, when, to whom, and at which of its next awaits."""

from __future__ import annotations

import asyncio
import math
import random
import sqlite3
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.simulator.clock import Process

if TYPE_CHECKING:
    from scheduler.simulator.database import Connection
    from scheduler.simulator.world import Host, World

CLUSTER = (
    "child_crashed", "out_of_memory", "child_hung", "child_deaf", "rank_died", "supervisor_died", "node_lost",
    "checkpoint_torn", "liveness_unknown", "cluster_unreachable", "head_restarted",
)  # fmt: skip
PROCESS = ("scheduler_killed", "scheduler_stopped", "api_killed", "clock_jumped")
DATABASE = (
    "statement_failed", "database_locked", "connection_dropped", "commit_refused", "commit_unheard", "database_away",
)  # fmt: skip
NETWORK = (
    "answer_lost",
    "answer_late",
    "call_repeated",
    "network_slow",
    "mlflow_down",
    "objects_failing",
    "receiver_failing",
    "database_cut_off",
    "cluster_cut_off",
)
KINDS = CLUSTER + PROCESS + DATABASE + NETWORK
WEIGHTS = {
    "out_of_memory": 0.8, "child_hung": 3.0, "scheduler_killed": 3.0, "scheduler_stopped": 3.0, "api_killed": 2.0,
    "commit_unheard": 3.0, "commit_refused": 2.0, "checkpoint_torn": 2.0, "database_cut_off": 2.0,
    "cluster_cut_off": 2.0,
}  # fmt: skip
RARE = ("api_killed", "commit_refused", "commit_unheard")
"""Their targets come by few points at which they could strike."""
ARMED_POINTS = 40
"""A fault of a process strikes at one of so many of its next awaits."""


class DatabaseFault(sqlite3.OperationalError):
    """What the database says when, and only when, a fault strikes it."""


class StoreFault(OSError):
    """What the object store says when, and only when, a fault strikes it."""


@dataclass(frozen=True)
class Fault:
    at_s: float
    """After the beginning."""
    kind: str
    choice: float
    """Who: 0 to 1."""
    after: int
    """Strikes at this of the target's next points."""
    for_s: float


def draw(rng: random.Random, until_s: float) -> list[Fault]:
    """None, some, or many."""
    count = rng.choice((0, 1, 2, 3, 4, 6, 8, 12))
    kinds = rng.choices(KINDS, [WEIGHTS.get(kind, 1.0) for kind in KINDS], k=count)
    return sorted(
        (
            Fault(
                rng.uniform(2.0, until_s), kind, rng.random(), rng.randint(1, ARMED_POINTS), rng.choice((1, 4, 12, 35))
            )
            for kind in kinds
        ),
        key=lambda fault: fault.at_s,
    )


@dataclass
class Armed:
    fault: Fault
    host: Host
    """Whichever process it runs by then."""
    left: int
    points: tuple[str, ...]


ALL = ("begin", "statement", "before commit", "after commit", "call")
OUTSIDE = ("begin", "call")
"""Outside of transactions: who is stopped inside of one stops everybody, who is stopped here is superseded."""
POINTS = {
    "scheduler_killed": ALL,
    "scheduler_stopped": ALL,
    "api_killed": ALL,
    "statement_failed": ("statement",),
    "database_locked": ("statement",),
    "connection_dropped": ("statement", "before commit"),
    "commit_refused": ("before commit",),
    "commit_unheard": ("after commit",),
}


class Hazards:
    """Asked at every await that touches the world; ``armed`` faults strike there."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.rng("hazards")
        self.struck: Counter[str] = Counter()
        self.troubled_s = float("-inf")
        """When the last of them ends, or ended."""
        self.slow = False
        self.database_away = False
        self.cut_off: dict[str, set[str]] = {"database_cut_off": set(), "cluster_cut_off": set()}
        """Hosts that do not reach what all the others do."""
        self._went_on_s = -math.inf
        self._armed: list[Armed] = []
        self._fates: list[str] = []
        self._tears = 0

    # Asked by the world.

    async def begin(self, connection: Connection) -> None:
        await asyncio.sleep(self.rng.choice((0, 0, 0, 0.001, 0.02)))
        if not self._reaches_database(connection.process):
            raise DatabaseFault("unable to open database file")
        await self._point("begin", connection.process, connection)

    async def statement(self, connection: Connection) -> None:
        if self._armed:
            await self._point("statement", connection.process, connection)

    async def before_commit(self, connection: Connection) -> None:
        await asyncio.sleep(self.rng.choice((0, 0, 0, 0.001, 0.01)))
        if not self._reaches_database(connection.process):
            connection.cut()
        await self._point("before commit", connection.process, connection)

    async def after_commit(self, connection: Connection) -> None:
        await self._point("after commit", connection.process, connection)

    async def call(self, process: Process) -> None:
        process.check()
        await self._point("call", process, None)

    def reaches_cluster(self, process: Process) -> bool:
        return self.world.cluster.reachable and process.host not in self.cut_off["cluster_cut_off"]

    def _reaches_database(self, process: Process) -> bool:
        return not self.database_away and process.host not in self.cut_off["database_cut_off"]

    def stood_still(self, for_s: float) -> bool:
        """Whether a process was stopped at any time of the last ``for_s``: it may have held a lock."""
        stopped = any(host.process and host.process.stopped for host in self.world.hosts)
        return stopped or self._went_on_s > self.world.clock.now - for_s

    def latency_s(self) -> float:
        return self.rng.choice((0.0, 0.002, 0.01, 0.2)) * (20 if self.slow else 1)

    def fate(self, method: str) -> str | None:
        """What becomes of a call's answer."""
        if self._fates:
            kind = self._fates.pop(0)
            self._strike(kind, method)
            return kind
        return None

    def tears(self, key: str) -> bool:
        """Whether the checkpoint under ``key`` is found torn."""
        if self._tears:
            self._tears -= 1
            self._strike("checkpoint_torn", key)
            return True
        return False

    # Chosen by the seed.

    async def run(self, faults: list[Fault]) -> None:
        for fault in faults:
            await asyncio.sleep(max(0.0, fault.at_s - self.world.elapsed_s))
            self.world.background(self._let_happen(fault))

    def disarm(self) -> None:
        """From here on nothing goes wrong any more."""
        self._armed.clear()
        self._fates.clear()
        self._tears = 0

    async def _let_happen(self, fault: Fault) -> None:
        kind, world = fault.kind, self.world
        if kind in POINTS:
            after = 1 + fault.after // 8 if kind in RARE else fault.after
            points = OUTSIDE if kind == "scheduler_stopped" and fault.for_s > 4 else POINTS[kind]
            self._armed.append(Armed(fault, self._host(fault), after, points))
        elif kind in ("answer_lost", "answer_late", "call_repeated"):
            self._fates += [kind] * (1 + fault.after // 15)
        elif kind == "checkpoint_torn":
            self._tears += 1 + fault.after // 20
            await world.cluster.strike("rank_died", random.Random(fault.choice))
        elif kind == "clock_jumped":
            host = world.hosts[int(fault.choice * len(world.hosts))]
            jump_s = (fault.choice * 16 % 1 - 0.5) * 2 * (3600.0 if fault.after % 2 else 30.0)
            host.wall_offset_s += jump_s
            if host.process:
                host.process.wall_offset_s += jump_s
            self._strike(kind, f"{host.name} {jump_s:+.0f} s")
        elif kind == "liveness_unknown":
            for name in world.cluster.running():
                world.cluster.unknown[name] = world.clock.now + fault.for_s
                self._strike(kind, name, fault.for_s)
        elif kind == "head_restarted":
            away_s = 2.0 + fault.for_s / 3
            self._strike(kind, "", away_s)
            world.cluster.reachable = False
            world.cluster.new_cluster()
            await asyncio.sleep(away_s)
            world.cluster.reachable = True
        elif kind in CLUSTER and kind != "cluster_unreachable":
            self._trouble()
            if await world.cluster.strike(kind, random.Random(fault.choice)):
                self.struck[kind] += 1
        elif kind in self.cut_off:
            await self._cut_off(self._host(fault).name, kind, 2 * fault.for_s)
        else:
            self._strike(kind, f"for {fault.for_s} s", fault.for_s)
            self._switch(kind, True)
            await asyncio.sleep(fault.for_s)
            self._switch(kind, False)

    async def _cut_off(self, host: str, kind: str, for_s: float) -> None:
        self._strike(kind, f"{host} for {for_s} s", for_s)
        self.cut_off[kind].add(host)
        await asyncio.sleep(for_s)
        self.cut_off[kind].discard(host)
        self.world.note(kind, host=host, on=False)

    def _switch(self, kind: str, on: bool) -> None:
        world = self.world
        match kind:
            case "cluster_unreachable":
                world.cluster.reachable = not on
            case "database_away":
                self.database_away = on
            case "network_slow":
                self.slow = on
            case "mlflow_down":
                world.tracking.down = on
            case "receiver_failing":
                world.receiver_failing = on
            case "objects_failing":
                world.objects.failing = on
        self.world.note(kind, on=on)

    def _host(self, fault: Fault) -> Host:
        world = self.world
        hosts = [world.api] if fault.kind == "api_killed" else world.hosts
        if fault.kind in ("scheduler_killed", "scheduler_stopped", *self.cut_off):
            hosts = [*world.schedulers]
        return hosts[int(fault.choice * len(hosts))]

    async def _point(self, point: str, process: Process, connection: Connection | None) -> None:
        for armed in list(self._armed):
            if armed.host.process is not process or point not in armed.points:
                continue
            armed.left -= 1
            if armed.left <= 0 and armed in self._armed:
                self._armed.remove(armed)
                self._strike(armed.fault.kind, f"{process.name} {point}")
                await self._befall(armed.fault, process, connection)

    async def _befall(self, fault: Fault, process: Process, connection: Connection | None) -> None:
        match fault.kind:
            case "scheduler_killed" | "api_killed":
                process.kill()
                process.check()
            case "scheduler_stopped":
                process.stop()
                self._trouble(2 * fault.for_s)
                self.world.background(self._continue(process, 2 * fault.for_s))
                await asyncio.sleep(0)
            case "database_locked":
                raise DatabaseFault("database is locked")
            case "statement_failed":
                raise DatabaseFault("disk I/O error")
            case "connection_dropped" if connection:
                connection.cut()
                raise DatabaseFault("connection closed")
            case "commit_refused" if connection:
                await connection.rollback()
                raise DatabaseFault("database or disk is full")
            case "commit_unheard":
                raise DatabaseFault("connection closed")

    async def _continue(self, process: Process, after_s: float) -> None:
        await asyncio.sleep(after_s)
        process.go_on()
        self._went_on_s = self.world.clock.now
        self.world.note("goes on", process=process.name)

    def _strike(self, kind: str, what: str, for_s: float = 0.0) -> None:
        self.struck[kind] += 1
        self._trouble(for_s)
        self.world.note(kind, what=what)

    def _trouble(self, for_s: float = 0.0) -> None:
        self.troubled_s = max(self.troubled_s, self.world.clock.now + for_s)
