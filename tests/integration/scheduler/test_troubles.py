"""What goes wrong with one attempt, or with the database, costs no other attempt and no healthy one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from asyncpg.exceptions import CannotConnectNowError
from sqlalchemy.exc import OperationalError

from control_plane.services import prices
from control_plane.states import Outcome
from scheduler.executor import AttemptSpec, Look, Unreachable
from scheduler.lease import LeaseLost
from scheduler.verify import verify
from tests.integration.scheduler.conftest import House


@pytest.fixture(autouse=True)
def _hurry_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.collect.LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr("scheduler.collect.ENDS_KNOWN_S", 0.1)


def one_at_a_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting an attempt fails the test while another of its work lives."""
    start = house.executor.start

    async def guarded(spec: AttemptSpec) -> None:
        alive = [name for name, a in house.executor.attempts.items() if a.alive and name != spec.name]
        assert not [name for name in alive if name.partition("/")[0] == spec.work_id]
        await start(spec)

    monkeypatch.setattr(house.executor, "start", guarded)


async def test_a_database_that_is_starting_up_ends_no_attempt(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = await house.new_job()
    write, refused = house.database.write, 0

    @asynccontextmanager
    async def starting_up() -> AsyncIterator[Any]:
        nonlocal refused
        if 0 < refused < 40:
            refused += 1
            raise CannotConnectNowError("the database system is starting up")
        async with write() as session:
            yield session

    monkeypatch.setattr(house.database, "write", starting_up)
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 3)
        await house.until_heard(name)
        refused = 1
        house.train(name, 4, 6)
        await house.until_heard(name)
        assert refused == 40
        house.complete(name)
        assert (await house.until_job(job_id, "COMPLETED")).attempt == 1


async def test_a_database_that_fails_a_scheduler_at_its_start_is_asked_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure, failures = prices.ensure_first, 0

    async def failing(*arguments: Any) -> None:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise OperationalError("SELECT", {}, Exception("disk I/O error"))
        await ensure(*arguments)

    monkeypatch.setattr(prices, "ensure_first", failing)
    job_id = await house.new_job()
    async with house.scheduling():
        await house.until_running(job_id)
    assert failures == 3


async def test_an_attempt_that_cannot_be_ended_hinders_no_other(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, verdict_id = await house.new_job(), await house.new_verdict()
    times, asked = house.executor.times, 0

    async def away(name: str) -> Any:
        nonlocal asked
        if name.startswith(verdict_id) and asked < 5:
            asked += 1
            raise Unreachable("Ray did not answer")
        return await times(name)

    async with house.scheduling():
        name = await house.until_running(verdict_id)
        house.executor.emit(name, {"type": "verdict", "report": {"nonsense": True}})
        house.executor.end(name, Outcome.COMPLETED)
        monkeypatch.setattr(house.executor, "times", away)
        house.complete(await house.until_running(job_id))
        await house.until_job(job_id, "COMPLETED")
        await house.until_running(verdict_id, 2)
    assert asked == 5
    assert (await house.attempts(verdict_id))[0].exit_reason == "EVENTS_REFUSED"


async def test_what_is_given_up_is_ended_before_the_next_begins(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains on until it is really gone, and all of that is in the books."""
    house.executor.total = {"slot_cpu": 4.0}
    one_at_a_time(house, monkeypatch)
    job_id = await house.new_job()
    store, release = "scheduler.collect._store", house.executor.release

    async def refuse(session: Any, claimed: Any, *_: Any) -> list[str]:
        raise ValueError("refused")

    async def slow(name: str, *, epoch: int) -> None:
        if house.executor.attempts[name].alive:
            house.executor.clock.advance(30)
        await release(name, epoch=epoch)

    monkeypatch.setattr(house.executor, "release", slow)
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 3)
        await house.until_heard(name)
        with monkeypatch.context() as broken:
            broken.setattr(store, refuse)
            house.train(name, 4, 6)

            async def ended() -> bool:
                return (await house.attempts(job_id))[0].outcome is not None

            await house.until("the end of the first", ended)
        house.complete(await house.until_running(job_id, 2))
        await house.until_job(job_id, "COMPLETED")
    first = (await house.attempts(job_id))[0]
    (held,) = house.executor.attempts[name].times
    assert (first.exit_reason, first.held_ms) == ("EVENTS_REFUSED", held.end_ms - held.start_ms)
    assert first.held_ms is not None
    assert first.held_ms >= 36_000
    async with house.database.read() as session:
        assert await verify(session) == []


async def test_the_next_attempt_waits_until_nothing_is_left_of_the_last(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.executor.total = {"slot_cpu": 4.0}
    one_at_a_time(house, monkeypatch)
    job_id = await house.new_job()
    release, stuck = house.executor.release, True

    async def not_yet(name: str, *, epoch: int) -> None:
        if stuck:
            raise Unreachable(f"{name} could not be ended yet")
        await release(name, epoch=epoch)

    monkeypatch.setattr(house.executor, "release", not_yet)
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.executor.end(name, Outcome.FAULT, code="CHILD_EXITED")

        async def told() -> bool:
            return (await house.job(job_id)).queue_reason == "Waits until nothing is left of its last attempt"

        await house.until("the reason", told)
        stuck = False
        house.complete(await house.until_running(job_id, 2))
        await house.until_job(job_id, "COMPLETED")


async def test_what_has_ended_does_not_reconnect(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, heard directly, while a slow look finds that the cluster cannot be reached."""
    job_id = await house.new_job()
    looking, answer = asyncio.Event(), asyncio.Event()

    async def in_vain() -> Look:
        looking.set()
        await answer.wait()
        return Look(reachable=False)

    async with house.scheduling() as scheduler:
        name = await house.until_running(job_id)
        house.train(name, 1, 3)
        await house.until_heard(name)
        with monkeypatch.context() as away:
            away.setattr(house.executor, "look", in_vain)
            await looking.wait()
            house.complete(name)
            await house.until_job(job_id, "COMPLETED")
            told = asyncio.Event()
            write_down = scheduler._write_down

            async def noted(*arguments: Any) -> None:
                await write_down(*arguments)
                told.set()

            away.setattr(scheduler, "_write_down", noted)
            answer.set()
            await told.wait()
    assert not (await house.job(job_id)).reconnecting


async def test_a_superseded_scheduler_ends_nobody(house: House) -> None:
    job_id = await house.new_job()
    stale = house.scheduler("a host that is not here/1/1")
    await stale.lease.try_acquire()
    await stale.lease.release()
    async with house.scheduling():
        name = await house.until_running(job_id)
        with pytest.raises(LeaseLost):
            await stale._end_by_force(name)
        assert house.executor.attempts[name].alive
