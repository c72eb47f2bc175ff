"""What the simulator stands on: virtual time, processes that stop and die, a database that locks as SQLite does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from scheduler.simulator.clock import Process, Stuck
from scheduler.simulator.run import _in_virtual_time, inhabited_database
from scheduler.simulator.world import World

BUDGET = text("SELECT monthly_budget_microusd FROM teams WHERE id = 'team-1'")
SET_BUDGET = text("UPDATE teams SET monthly_budget_microusd = :amount WHERE id = 'team-1'")


@pytest.fixture
def world() -> World:
    return World(1, inhabited_database())


def live(world: World, story: Callable[[], Awaitable[Any]]) -> None:
    async def whole() -> None:
        await story()
        await world.end()

    _in_virtual_time(world, whole())


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
