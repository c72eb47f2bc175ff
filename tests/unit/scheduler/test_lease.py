"""One of several schedulers writes, on both databases."""

from __future__ import annotations

import asyncio
import sys
import time

import psutil
import pytest
from sqlalchemy import update

from control_plane.db import Database
from control_plane.tables import SchedulerLease, Team
from scheduler.lease import WRITERS, Lease, LeaseLost, is_gone, this_process

ELSEWHERE = "another-host:pid:[1]/7/1.00"


async def test_the_first_takes_it_and_the_second_waits(database: Database) -> None:
    first, second = Lease(database, 60, "one:x/1/1.0"), Lease(database, 60, "two:x/2/2.0")
    assert await first.try_acquire()
    assert not await second.try_acquire()
    await first.beat()
    assert (first.epoch, second.epoch) == (1, 0)


async def test_of_many_at_once_one_gets_it(database: Database) -> None:
    leases = [Lease(database, 60, f"host{i}:x/1/1.0") for i in range(6)]
    assert sum(await asyncio.gather(*(lease.try_acquire() for lease in leases))) == 1


async def test_a_beat_that_stands_still_is_superseded_and_the_old_holder_is_fenced(database: Database) -> None:
    old, new = Lease(database, 0.2, ELSEWHERE), Lease(database, 0.2, "two:x/2/2.0")
    assert await old.try_acquire()
    assert not await new.try_acquire()
    started = time.monotonic()
    assert await new.acquire() == 2
    assert time.monotonic() - started >= 0.15
    with pytest.raises(LeaseLost):
        await old.beat()
    with pytest.raises(LeaseLost):
        async with old.write() as session:
            session.add(Team(id="t", name="must not be written"))
    async with new.write() as session:
        assert await session.get(Team, "t") is None


async def test_a_database_that_is_away_is_waited_for_and_held_against_nobody(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, other = Lease(database, 0.3, ELSEWHERE), Lease(database, 0.3, "two:x/2/2.0")
    assert await holder.try_acquire()
    assert not await other.try_acquire()
    looks = 0

    async def away() -> bool:
        nonlocal looks
        looks += 1
        raise ConnectionRefusedError

    monkeypatch.setattr(other, "try_acquire", away)
    waiting = asyncio.create_task(other.acquire())
    while looks < 8:  # for longer than the time-out
        await asyncio.sleep(0.01)
    monkeypatch.undo()
    back = time.monotonic()
    assert await asyncio.wait_for(waiting, 10) == 2
    assert time.monotonic() - back >= 0.29, "superseded for a silence that was the database's"


async def test_a_holder_that_beats_is_not_superseded(database: Database) -> None:
    holder, other = Lease(database, 0.5, ELSEWHERE), Lease(database, 0.5, "two:x/2/2.0")
    assert await holder.try_acquire()
    async with asyncio.timeout(10):
        beating = asyncio.create_task(holder.keep_beating())
        deadline = time.monotonic() + 1.2
        while time.monotonic() < deadline:
            assert not await other.try_acquire()
            await asyncio.sleep(0.05)
    beating.cancel()


async def test_an_orderly_end_hands_over_at_once(database: Database) -> None:
    first, second = Lease(database, 60, ELSEWHERE), Lease(database, 60, "two:x/2/2.0")
    await first.try_acquire()
    await first.release()
    assert await second.try_acquire()
    await first.release()
    assert not await Lease(database, 60, "three:x/3/3.0").try_acquire()


async def test_a_killed_scheduler_of_this_host_is_superseded_at_once(database: Database) -> None:
    program = "from scheduler.lease import this_process as t; import time; print(t(), flush=True); time.sleep(60)"
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    holder = (await child.stdout.readline()).decode().strip()
    first, second = Lease(database, 60, holder), Lease(database, 60)
    assert await first.try_acquire()
    assert not await second.try_acquire()
    child.kill()
    await child.wait()
    assert await second.try_acquire()


def test_a_pid_that_another_process_has_now_is_gone() -> None:
    me = this_process()
    host, pid, start = me.split("/")
    assert not is_gone(me)
    assert is_gone(f"{host}/{pid}/{float(start) - 100:.2f}")
    assert not is_gone(f"elsewhere/{pid}/{start}")
    assert not is_gone("anything")
    free = next(number for number in range(2**22 - 1, 1, -1) if not psutil.pid_exists(number))
    assert is_gone(f"{host}/{free}/{start}")


async def test_a_write_under_way_delays_the_takeover(database: Database) -> None:
    """Whoever has the lease when he begins to write also has it when he commits."""
    old, new = Lease(database, 0.0, ELSEWHERE), Lease(database, 0.0, "two:x/2/2.0")
    await old.try_acquire()
    entered, leave = asyncio.Event(), asyncio.Event()

    async def write() -> None:
        async with old.write() as session:
            session.add(Team(id="t", name="old"))
            entered.set()
            await leave.wait()

    writing = asyncio.create_task(write())
    await entered.wait()
    taking = asyncio.create_task(new.acquire())
    await asyncio.sleep(0.3)
    assert not taking.done()
    leave.set()
    await writing
    assert await taking == 2
    async with new.write() as session:
        assert await session.get(Team, "t") is not None


async def test_beating_does_not_wait_for_writes_on_postgresql(postgres_database_url: str) -> None:
    database = Database(postgres_database_url)
    lease = Lease(database, 60)
    await lease.try_acquire()
    async with lease.write() as session:
        await session.execute(update(Team).values(name="x"))
        await asyncio.wait_for(lease.beat(), 2)
    async with database.read() as session:
        assert (await session.get_one(SchedulerLease, 1)).beat == 2
    await database.close()


async def test_the_beat_comes_next_whoever_else_waits(database: Database) -> None:
    lease = Lease(database, 60)
    await lease.acquire()
    writing = asyncio.Event()
    order: list[int | str] = []

    async def write(number: int) -> None:
        async with lease.write():
            writing.set()
            await asyncio.sleep(0.05)
        order.append(number)

    async def beat() -> None:
        await writing.wait()
        await lease.beat()
        order.append("beat")

    await asyncio.gather(*(write(number) for number in range(12)), beat())

    assert order.index("beat") <= 1 + WRITERS
    if database.engine.dialect.name == "sqlite":
        assert order[:3] == [0, "beat", 1]
