"""Deliverers that are killed, superseded or cut off from the database."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from control_plane.tables.notices import Channel
from scheduler.deliver import LIMIT_S
from scheduler.lease import Lease, LeaseLost
from tests.integration.scheduler.post_office import ELSEWHERE, Ahead, Late, PostOffice, Stuck, kill
from tests.receiver import HANG


async def test_killed_between_sending_and_noting_it_goes_again_under_the_same_id(
    office: PostOffice, clock: Ahead
) -> None:
    webhook_id = await office.webhook("/a")
    await office.tell("one")
    stuck = Stuck(office.carrier)
    async with office.delivering(stuck):
        await stuck.arrived.wait()
    async with office.delivering():
        await asyncio.sleep(0.2)
        assert len(office.receiver.calls) == 1, "the claim still stands"
        clock.pass_by(seconds=61)
        row = await office.until_row(webhook_id, lambda row: row.delivered_at)
    assert {call.headers["webhook-id"] for call in office.receiver.calls} == {row.id}
    assert (len(office.receiver.calls), row.tries) == (2, 2)


async def test_a_note_that_cannot_be_written_is_no_loss(
    office: PostOffice, clock: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = await office.webhook("/a")
    await office.tell("one")
    failed = asyncio.Event()

    async def fail(*_: Any) -> None:
        failed.set()
        raise OSError("the database is away")

    async with office.delivering():
        with monkeypatch.context() as patch:
            patch.setattr("scheduler.deliver._note", fail)
            await failed.wait()
        clock.pass_by(seconds=61)
        row = await office.until_row(webhook_id, lambda row: row.delivered_at)
    assert {call.headers["webhook-id"] for call in office.receiver.calls} == {row.id}
    assert len(office.receiver.calls) == 2


async def test_who_lost_the_lease_neither_claims_nor_notes(office: PostOffice, clock: Ahead) -> None:
    webhook_id = await office.webhook("/a")
    stuck = Stuck(office.carrier)
    old = await office.deliverer(stuck, Lease(office.database, 0.2, ELSEWHERE))
    working = asyncio.create_task(old.run())
    await office.tell("one")
    await stuck.arrived.wait()
    new = await office.deliverer(lease=Lease(office.database, 0.2, "two:x/2/2.0"))

    await office.webhook("/b")
    await office.tell("two")
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(working, 5)
    assert [row.tries for row in await office.rows()] == [1, 0, 0]

    delivering = asyncio.create_task(new.run())
    clock.pass_by(seconds=61)
    await office.until_quiet()
    await kill(delivering)
    assert [row.tries for row in await office.rows()] == [2, 1, 1]
    assert len(office.receiver.calls) == 4
    assert len({call.headers["webhook-id"] for call in office.receiver.at("/a")}) == 2
    assert (await office.rows(webhook_id))[0].delivered_at is not None


async def test_a_late_note_of_the_old_scheduler_is_refused(office: PostOffice, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had sent before it lost the lease, and hears of it only when it notes the end."""
    monkeypatch.setitem(LIMIT_S, Channel.WEBHOOK, 1.0)
    webhook_id = await office.webhook("/a")
    office.receiver.script["/a"] = [HANG]
    old = await office.deliverer(lease=Lease(office.database, 0.2, ELSEWHERE))
    await office.tell("one")
    working = asyncio.create_task(old.run())
    await office.until_calls("/a", 1)
    await Lease(office.database, 0.2, "two:x/2/2.0").acquire()
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(working, 20)
    row = await office.row(webhook_id)
    assert (row.tries, row.delivered_at, row.last_error) == (1, None, None)


async def test_a_row_is_claimed_by_one_of_several_deliverers(office: PostOffice) -> None:
    """Even of those that share a lease, as no two should."""
    for number in range(6):
        await office.webhook(f"/{number}")
    for number in range(4):
        await office.tell(str(number))
    deliverers = [await office.deliverer() for _ in range(3)]
    tasks = [asyncio.create_task(deliverer.run()) for deliverer in deliverers]
    await office.until_quiet()
    for task in tasks:
        await kill(task)
    assert len(office.receiver.calls) == 24
    assert {row.tries for row in await office.rows()} == {1}


async def test_the_note_of_a_claim_that_ran_out_is_discarded(office: PostOffice, clock: Ahead) -> None:
    webhook_id = await office.webhook("/a")
    await office.tell("one")
    first, second = Late(), Late()
    tasks = [asyncio.create_task((await office.deliverer(first)).run())]
    await first.began.wait()
    clock.pass_by(seconds=61)
    tasks.append(asyncio.create_task((await office.deliverer(second)).run()))
    await second.began.wait()
    first.go.set()
    await asyncio.sleep(0.3)
    row = await office.row(webhook_id)
    assert (row.tries, row.last_error) == (2, None)
    second.go.set()
    await office.until_row(webhook_id, lambda row: row.last_error == "late")
    for task in tasks:
        await kill(task)
