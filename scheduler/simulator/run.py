"""One seed, from its first to its last virtual second."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import uuid6

import scheduler.accrual
import scheduler.collect
import scheduler.deliver
import scheduler.finish
import scheduler.lease
import scheduler.loop
import scheduler.mirror
from control_plane.tables import base
from scheduler.simulator import faults
from scheduler.simulator.clock import MIDNIGHT, PROCESS, Clock, Process, Stuck, VirtualLoop
from scheduler.simulator.database import empty_database
from scheduler.simulator.inhabitants import TEAMS, move_in, vary
from scheduler.simulator.oracle import Violated
from scheduler.simulator.users import Customer
from scheduler.simulator.world import Errors, World
from scheduler.verify import verify

FAULTS_S = 80.0
"""From then on nothing goes wrong any more."""
PATIENCE_S = 900.0
"""How long everything may take to come to rest after that."""
LOOK_S = 4.0
PACE = (
    (scheduler.collect, "POLL_S", 4.0),
    (scheduler.mirror, "PAUSE_S", 8.0),
    (scheduler.mirror, "LONGEST_PAUSE_S", 10.0),
    (scheduler.loop, "BUDGET_S", 10.0),
    (scheduler.accrual, "CATCH_UP", timedelta(days=1)),
    (scheduler.deliver, "PAUSE_S", 6.0),
    (scheduler.deliver, "RETRY_PAUSES_S", (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)),
    (scheduler.finish, "RETRY_PAUSES_S", (1.0, 3.0, 6.0)),
)
"""Coarser than in real life: fewer steps tell as much."""


@dataclass
class Result:
    seed: int
    violation: str | None = None
    trace: list[str] = field(default_factory=list)
    virtual_s: float = 0.0
    commits: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    passages: Counter[str] = field(default_factory=Counter)


def simulate(seed: int, *, whole_trace: bool = False) -> Result:
    """Live through a seed. The trace is given when a rule is violated, or when it is asked for.

    What only the garbage collector would close stays open to the end, so that no world depends on when it comes by.
    """
    world = World(seed, inhabited_database())
    result = Result(seed)
    gc.disable()
    try:
        in_virtual_time(world, _watched(world))
    except Violated as violated:
        result.violation = str(violated)
    except Stuck:
        result.violation = "stuck: nothing is ready and no timer is set"
    result.virtual_s = world.elapsed_s
    result.commits = world.store.commits
    result.faults = world.hazards.struck
    result.jobs = world.oracle.census()
    result.passages = world.oracle.passages
    if whole_trace or result.violation:
        result.trace = [str(happening) for happening in world.happenings]
    world.store.raw.close()
    gc.enable()
    return result


async def _live(world: World) -> None:
    rng = world.rng("life")
    quiet = rng.random() < 0.05
    until_s = rng.uniform(30.0, FAULTS_S)
    customers = [Customer(world, number) for number in range(1, 1 + rng.randint(1, TEAMS))]
    try:
        vary(world)
        world.start()
        lives = [
            world.background(customer.live(rng.randint(1, 2), rng.choice((0, 1, 2, 4)), until_s))
            for customer in customers
        ]
        chaos = world.background(world.hazards.run([] if quiet else faults.draw(world.rng("faults"), until_s)))
        await asyncio.wait({*lives, chaos})
        world.hazards.disarm()
        calm_s = world.elapsed_s
        while world.hazards.database_away or not world.oracle.at_rest():
            if world.elapsed_s > calm_s + PATIENCE_S:
                world.oracle.restless()
            await asyncio.sleep(LOOK_S)
        world.oracle.final()
        await Process(world, "auditor").spawn(_audit(world))
    finally:
        world.oracle.alarm.set()


async def _audit(world: World) -> None:
    """The platform's own check of its ledger, which every world must pass as well."""
    async with world.database.read() as session:
        found = await verify(session)
    if found:
        raise Violated(f"the ledger verifies: {found[0]}")


async def _watched(world: World) -> None:
    """To the end, or to the first violation."""
    life, alarm = world.background(_live(world)), world.background(world.oracle.alarm.wait())
    try:
        await asyncio.wait({life, alarm}, return_when=asyncio.FIRST_COMPLETED)
        world.oracle.check()
        await life
    finally:
        await world.end()


def in_virtual_time(world: World, life: Any) -> None:
    loop = VirtualLoop(world.clock)
    loop.set_exception_handler(lambda _, context: world.note("loop", **{"message": str(context.get("message"))}))
    with _patched(world):
        try:
            loop.run_until_complete(life)
        finally:
            loop.close()


@contextmanager
def _patched(world: World) -> Iterator[None]:
    """The world's time and ids, in place of the system's."""

    def now() -> datetime:
        process = PROCESS.get()
        return process.now() if process else datetime.fromtimestamp(world.clock.date_s(), UTC)

    seams: list[tuple[Any, str, Any]] = [
        (time, "monotonic", world.clock.monotonic),
        (base, "clock", now),
        (uuid6, "uuid7", lambda: world.next_id(PROCESS.get())),
        (scheduler.lease, "is_gone", world.is_gone),
        *PACE,
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in seams]
    log, pool = logging.getLogger("scheduler"), logging.getLogger("sqlalchemy.pool")
    handler, level, propagates = Errors(world), log.level, log.propagate
    try:
        for module, name, value in seams:
            setattr(module, name, value)
        log.addHandler(handler)
        log.setLevel(logging.ERROR)
        log.propagate = False
        pool.disabled = True  # connections of killed processes are never checked in
        yield
    finally:
        pool.disabled = False
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagates
        for module, name, value in before:
            setattr(module, name, value)


@cache
def inhabited_database() -> bytes:
    """What every world begins with."""
    world = World(0, empty_database())
    world.clock = Clock(MIDNIGHT - timedelta(days=1))
    content: list[bytes] = []

    async def fill() -> None:
        await Process(world, "setup").spawn(move_in(world))
        content.append(world.store.raw.serialize())
        await world.end()

    in_virtual_time(world, fill())
    return content[0]
