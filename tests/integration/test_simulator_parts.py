"""What the simulator stands on: virtual time, processes that stop and die, a database that locks as SQLite does."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

from control_plane.states import Outcome
from scheduler.executor import AttemptSpec, Demand, Unreachable
from scheduler.simulator.clock import Process, Stuck
from scheduler.simulator.cluster import Fact
from scheduler.simulator.faults import DatabaseFault, Fault, StoreFault
from scheduler.simulator.network import ClusterClient
from scheduler.simulator.run import in_virtual_time, inhabited_database
from scheduler.simulator.world import Host, World

BUDGET = text("SELECT monthly_budget_microusd FROM teams WHERE id = 'team-1'")
SET_BUDGET = text("UPDATE teams SET monthly_budget_microusd = :amount WHERE id = 'team-1'")


@pytest.fixture
def world() -> World:
    return World(1, inhabited_database())


def live(world: World, story: Callable[[], Awaitable[Any]]) -> None:
    async def whole() -> None:
        await story()
        await world.end()

    in_virtual_time(world, whole())


def budget_in(world: World) -> int | None:
    return world.store.raw.execute(str(BUDGET)).fetchone()[0]


async def write(world: World, amount: int, *, think_s: float = 0.0) -> float:
    """Hold the write lock for ``think_s``; when it was committed."""
    async with world.database.write() as session:
        await session.execute(SET_BUDGET, {"amount": amount})
        await asyncio.sleep(think_s)
    return world.elapsed_s


async def read(world: World, *, think_s: float = 0.0) -> tuple[int | None, float]:
    async with world.database.read() as session:
        amount = await session.scalar(BUDGET)
        await asyncio.sleep(think_s)
    return amount, world.elapsed_s


def test_a_day_takes_no_time(world: World) -> None:
    async def story() -> None:
        await asyncio.sleep(86_400)
        assert world.elapsed_s == pytest.approx(86_400)

    live(world, story)


def test_a_world_in_which_nothing_can_happen_any_more_says_so(world: World) -> None:
    with pytest.raises(Stuck):
        live(world, lambda: asyncio.get_running_loop().create_future())


def test_a_stopped_process_goes_on_where_it_was(world: World) -> None:
    async def story() -> None:
        process, ticks = Process(world, "A"), []

        async def tick() -> None:
            while len(ticks) < 4:
                await asyncio.sleep(1)
                ticks.append(round(world.elapsed_s))

        task = process.spawn(tick())
        await asyncio.sleep(2.5)
        process.stop()
        await asyncio.sleep(7.5)
        assert ticks == [1, 2]
        process.go_on()
        await task
        assert ticks == [1, 2, 10, 11]

    live(world, story)


def test_a_time_out_that_came_too_late_in_a_stopped_process_does_no_harm(world: World) -> None:
    async def story() -> None:
        process, come = Process(world, "A"), asyncio.Event()

        async def answer() -> str:
            async with asyncio.timeout(5):
                await come.wait()
            return "in time"

        task = process.spawn(answer())
        await asyncio.sleep(1)
        process.stop()
        await asyncio.sleep(3)
        come.set()
        await asyncio.sleep(6)
        process.go_on()
        assert await task == "in time"

    live(world, story)


def test_writers_exclude_each_other_and_readers(world: World) -> None:
    async def story() -> None:
        one, other, reader = (Process(world, name) for name in "ABC")
        first = one.spawn(write(world, 1, think_s=3))
        await asyncio.sleep(1)
        second, seen = other.spawn(write(world, 2, think_s=3)), reader.spawn(read(world))
        assert 3 <= await first < 4 < 6 <= await second < 7
        amount, at_s = await seen
        assert (amount, at_s >= 6) == (2, True)

    live(world, story)


def test_readers_do_not_wait_for_each_other(world: World) -> None:
    async def story() -> None:
        readers = [Process(world, name).spawn(read(world, think_s=3)) for name in "AB"]
        assert [round(at_s) for _, at_s in await asyncio.gather(*readers)] == [3, 3]

    live(world, story)


def test_a_killed_writer_leaves_nothing_and_keeps_nobody_waiting(world: World) -> None:
    async def story() -> None:
        before = budget_in(world)
        killed, other = Process(world, "A"), Process(world, "B")
        task = killed.spawn(write(world, 1, think_s=1000))
        await asyncio.sleep(1)
        following = other.spawn(read(world))
        killed.kill()
        assert (await following)[0] == before
        await asyncio.wait({task})
        assert task.cancelled()

    live(world, story)


def test_who_waits_too_long_hears_that_the_database_is_locked(world: World) -> None:
    async def story() -> None:
        stopped, other = Process(world, "A"), Process(world, "B")
        stopped.spawn(write(world, 1, think_s=1))
        await asyncio.sleep(0.5)
        stopped.stop()
        with pytest.raises(OperationalError, match="locked"):
            await other.spawn(write(world, 2))
        assert world.elapsed_s == pytest.approx(30.5, abs=0.1)
        stopped.kill()

    live(world, story)


def test_what_only_reads_cannot_write(world: World) -> None:
    async def meddle() -> None:
        async with world.database.read() as session:
            await session.execute(SET_BUDGET, {"amount": 1})

    async def story() -> None:
        with pytest.raises(OperationalError, match="only reads"):
            await Process(world, "A").spawn(meddle())

    live(world, story)


def fault(kind: str, *, choice: float = 0.0, after: int = 1, for_s: float = 10.0) -> Fault:
    return Fault(0.0, kind, choice, after, for_s)


def befall(world: World, *faults: Fault) -> asyncio.Task[Any]:
    return world.background(world.hazards.run(list(faults)))


def process_of(host: Host) -> Process:
    assert host.process is not None
    return host.process


async def started(world: World, *names: str) -> list[Process]:
    """The processes of hosts that have no scheduler, in place of the world's."""
    hosts = [Host(world, name, 0.0) for name in names]
    world.schedulers, world.hosts = hosts, hosts
    for host in hosts:
        world.background(host.run())
    await asyncio.sleep(0.1)
    return [process_of(host) for host in hosts]


def wrapped(orig: Exception) -> OperationalError:
    return OperationalError("UPDATE", {}, orig)


@pytest.mark.parametrize(
    ("error", "excused"),
    [
        (wrapped(DatabaseFault("database is locked")), True),
        (StoreFault("the object store does not answer"), True),
        (ExceptionGroup("two", [wrapped(DatabaseFault("disk I/O error")), StoreFault()]), True),
        (ExceptionGroup("two", [wrapped(DatabaseFault("disk I/O error")), KeyError("x")]), False),
        (wrapped(sqlite3.OperationalError("no such column")), False),
        (IntegrityError("INSERT", {}, sqlite3.IntegrityError("UNIQUE constraint failed")), False),
        (ConnectionError("reset"), False),
        (Unreachable("no answer"), False),
    ],
)
def test_only_what_a_fault_raised_is_excused(world: World, error: BaseException, excused: bool) -> None:
    world.oracle.logged(error)
    assert (world.oracle.violation is None) is excused


def test_no_fault_excuses_a_process_that_dies_of_an_error(world: World) -> None:
    class Frail(Host):
        async def _main(self, process: Process) -> Any:
            raise wrapped(DatabaseFault("unable to open database file"))

    async def story() -> None:
        world.background(Frail(world, "A", 0.0).run())
        await asyncio.sleep(1)
        assert (world.oracle.violation or "").startswith("no process dies of an error: A1")

    live(world, story)


def test_a_wait_for_a_lock_is_excused_by_a_process_that_stood_still_alone(world: World) -> None:
    async def wait(process: Process) -> Exception:
        with pytest.raises(OperationalError, match="locked") as caught:
            await process.spawn(write(world, 2))
        assert isinstance(caught.value.orig, Exception)
        return caught.value.orig

    async def story() -> None:
        holder, waiting = await started(world, "A", "B")
        holder.spawn(write(world, 1, think_s=100))
        await asyncio.sleep(0.5)
        assert not isinstance(await wait(waiting), DatabaseFault)
        holder.stop()
        assert isinstance(await wait(waiting), DatabaseFault)
        holder.go_on()

    live(world, story)


def test_one_host_alone_is_cut_off_from_the_database_for_a_while(world: World) -> None:
    async def story() -> None:
        one, other = await started(world, "A", "B")
        befall(world, fault("database_cut_off", choice=0.0, for_s=10))
        await asyncio.sleep(0.1)
        with pytest.raises(OperationalError) as caught:
            await one.spawn(write(world, 1))
        assert isinstance(caught.value.orig, DatabaseFault)
        await other.spawn(write(world, 2))
        assert budget_in(world) == 2
        await asyncio.sleep(20)
        await one.spawn(write(world, 3))
        assert budget_in(world) == 3

    live(world, story)


def test_what_was_begun_before_the_cut_is_not_committed(world: World) -> None:
    async def story() -> None:
        (one,) = await started(world, "A")
        before = budget_in(world)
        writing = one.spawn(write(world, 1, think_s=5))
        await asyncio.sleep(1)
        befall(world, fault("database_cut_off", for_s=10))
        with pytest.raises(OperationalError, match="connection closed"):
            await writing
        assert budget_in(world) == before

    live(world, story)


def test_one_host_alone_is_cut_off_from_the_cluster_for_a_while(world: World) -> None:
    async def story() -> None:
        here, there = [ClusterClient(process) for process in await started(world, "A", "B")]
        befall(world, fault("cluster_cut_off", choice=0.0, for_s=10))
        await asyncio.sleep(0.1)
        assert ((await here.look()).reachable, (await there.look()).reachable) == (False, True)
        await asyncio.sleep(20)
        assert (await here.look()).reachable

    live(world, story)


def test_an_armed_fault_waits_for_the_next_process_of_its_host(world: World) -> None:
    async def story() -> None:
        (first,) = await started(world, "A")
        befall(world, fault("scheduler_killed", after=2))
        await asyncio.sleep(0.1)
        first.kill()
        await asyncio.sleep(60)
        following = process_of(world.schedulers[0])
        assert following is not first
        await asyncio.wait({following.spawn(write(world, 1))})
        assert (world.hazards.struck["scheduler_killed"], following.alive) == (1, False)

    live(world, story)


def test_the_end_of_a_lost_cluster_hides_only_what_nobody_had_asked_beyond(world: World) -> None:
    async def story() -> None:
        cluster = world.cluster
        demand = Demand({"slot_cpu": 1.0})
        await cluster.start(AttemptSpec("job/1", "job", 1, {}, demand, (), artifact_prefix="mlflow/job"))
        fact: Fact = cluster.facts["job/1"]
        await asyncio.sleep(5)
        cluster.emit("job/1", {"type": "log", "level": "INFO", "message": "first"})
        told = len(cluster.attempts["job/1"].events)
        await asyncio.sleep(1.5)
        heard = []
        for cursor in (0, told, 1):
            await cluster.poll("job/1", cursor, epoch=1, allowance_ms=None)
            heard.append(fact.heard_ms)
        cluster.end("job/1", Outcome.FAULT)
        assert heard == [0, 5000, 5000]
        assert fact.held_ms(0) == 6500

    live(world, story)
