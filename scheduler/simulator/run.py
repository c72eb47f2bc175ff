"""One seed, from its first to its last virtual second."""

from __future__ import annotations

import asyncio
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
import scheduler.finish
import scheduler.lease
import scheduler.mirror
from control_plane.tables import Dataset, Membership, Team, User, Verdict, base
from control_plane.tables.accounts import TeamRole
from control_plane.tables.work import DatasetStatus
from scheduler.simulator import faults
from scheduler.simulator.clock import PROCESS, Clock, Process, Stuck, VirtualLoop
from scheduler.simulator.database import empty_database
from scheduler.simulator.oracle import Violated
from scheduler.simulator.users import MODEL, Customer
from scheduler.simulator.world import MIDNIGHT, TEAMS, Errors, World, catalog

FAULTS_S = 80.0
"""From then on nothing goes wrong any more."""
PATIENCE_S = 420.0
"""How long everything may take to come to rest after that."""
LOOK_S = 4.0
STATISTICS = {"conversations": 100, "tokens": 20_000, "learnedTokens": 9_000, "validationConversations": 10}
PACE = (
    (scheduler.collect, "POLL_S", 3.0),
    (scheduler.mirror, "PAUSE_S", 5.0),
    (scheduler.mirror, "LONGEST_PAUSE_S", 10.0),
    (scheduler.accrual, "CATCH_UP", timedelta(days=2)),
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


def simulate(seed: int, *, whole_trace: bool = False) -> Result:
    """Live through a seed. The trace is given when a rule is violated, or when it is asked for."""
    world = World(seed, inhabited_database())
    result = Result(seed)
    try:
        _in_virtual_time(world, _watched(world))
    except Violated as violated:
        result.violation = str(violated)
    except Stuck:
        result.violation = "stuck: nothing is ready and no timer is set"
    result.virtual_s = world.elapsed_s
    result.commits = world.store.commits
    result.faults = world.hazards.struck
    result.jobs = world.oracle.census()
    if whole_trace or result.violation:
        result.trace = [str(happening) for happening in world.happenings]
    world.store.raw.close()
    return result


async def _live(world: World) -> None:
    rng = world.rng("life")
    quiet = rng.random() < 0.05
    until_s = rng.uniform(30.0, FAULTS_S)
    customers = [Customer(world, number) for number in range(1, 1 + rng.randint(1, TEAMS))]
    try:
        await _budgets(world, customers)
        world.start()
        lives = [
            world.background(customer.live(rng.randint(1, 2), rng.choice((0, 1, 2, 4)), until_s))
            for customer in customers
        ]
        chaos = world.background(world.hazards.run([] if quiet else faults.draw(world.rng("faults"), until_s)))
        await asyncio.wait({*lives, chaos})
        world.hazards.disarm()
        calm_s = world.elapsed_s
        while not world.oracle.at_rest():
            if world.elapsed_s > calm_s + PATIENCE_S:
                world.oracle.restless()
            await asyncio.sleep(LOOK_S)
        world.oracle.final()
    finally:
        world.oracle.alarm.set()


async def _watched(world: World) -> None:
    """To the end, or to the first violation."""
    life, alarm = world.background(_live(world)), world.background(world.oracle.alarm.wait())
    try:
        await asyncio.wait({life, alarm}, return_when=asyncio.FIRST_COMPLETED)
        world.oracle.check()
        await life
    finally:
        await world.end()


async def _budgets(world: World, customers: list[Customer]) -> None:
    """Some teams begin with a budget."""
    rng = world.rng("budgets")
    for customer in customers:
        amount = rng.choice((None, None, 3_000, 20_000, 1_000_000))
        world.store.raw.execute("UPDATE teams SET monthly_budget_microusd = ? WHERE id = ?", (amount, customer.team_id))


def _in_virtual_time(world: World, life: Any) -> None:
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
    log = logging.getLogger("scheduler")
    handler, level, propagates = Errors(world), log.level, log.propagate
    try:
        for module, name, value in seams:
            setattr(module, name, value)
        log.addHandler(handler)
        log.setLevel(logging.ERROR)
        log.propagate = False
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagates
        for module, name, value in before:
            setattr(module, name, value)


@cache
def inhabited_database() -> bytes:
    """A database with teams, their owners and a dataset each that is ready to be trained on."""
    world = World(0, empty_database())
    world.clock = Clock(MIDNIGHT - timedelta(days=1))
    content: list[bytes] = []

    async def fill() -> None:
        process = Process(world, "setup")
        await process.spawn(_fill(world))
        content.append(world.store.raw.serialize())
        await world.end()

    _in_virtual_time(world, fill())
    return content[0]


async def _fill(world: World) -> None:
    from control_plane.services import prices

    async with world.database.write() as session:
        await prices.ensure_first(session, catalog())
        for number in range(1, TEAMS + 1):
            person = User(id=f"user-{number}", email=f"{number}@example.com", password_hash="x", name="Ada")
            team = Team(id=f"team-{number}", name="Ada's team")
            session.add_all([person, team])
            await session.flush()
            session.add(Membership(team_id=team.id, user_id=person.id, role=TeamRole.OWNER))
            team.personal_of = person.id
            model = world.catalog.base_models[MODEL]
            dataset = Dataset(
                id=f"dataset-{number}",
                team_id=team.id,
                created_by=person.id,
                name="conversations",
                status=DatasetStatus.READY,
                base_model=MODEL,
                storage_key=f"datasets/{number}",
                file_name="conversations.jsonl",
                file_size=2**30,
                uploaded_at=MIDNIGHT - timedelta(days=1),
                training_ready=True,
            )
            session.add(dataset)
            await session.flush()
            session.add(
                Verdict(
                    team_id=team.id,
                    dataset_id=dataset.id,
                    base_model=MODEL,
                    revision=model.revision,
                    max_seq_length=512,
                    status="COMPLETED",
                    passed=True,
                    statistics=STATISTICS,
                )
            )
