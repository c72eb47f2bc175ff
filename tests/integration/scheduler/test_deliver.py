"""The outbox on its way to real receivers: once inside, at least once outside, whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
import socket
from datetime import timedelta

import pytest
from sqlalchemy import select
from standardwebhooks.webhooks import Webhook as Verifier

from control_plane.db import Database
from control_plane.money import usd
from control_plane.services import outbox, webhooks
from control_plane.settings import Settings
from control_plane.tables import Outbox, Webhook, now
from control_plane.tables.notices import PING, Channel, Event
from scheduler.deliver import LIMIT_S, RETRY_PAUSES_S
from scheduler.network import NetworkCarrier
from tests.integration.scheduler.conftest import House
from tests.integration.scheduler.post_office import Ahead, PostOffice
from tests.receiver import CUT, DRIP, HANG, Receiver


async def test_a_receiver_can_verify_what_it_gets(office: PostOffice) -> None:
    webhook_id = await office.webhook("/a")
    await office.tell("one")
    async with office.delivering():
        row = await office.until_row(webhook_id, lambda row: row.delivered_at)

    (call,) = office.receiver.calls
    body = Verifier(webhooks.derive(b"test", "/a")).verify(call.body, call.headers)
    assert body["type"] == "job.completed"
    assert body["data"] == {"teamId": office.team.id, "key": "one"}
    assert call.headers["webhook-id"] == row.id
    assert call.headers["content-type"] == "application/json"
    assert call.headers["host"] == f"127.0.0.1:{office.receiver.port}"
    assert (row.tries, row.not_before, row.failed_at, row.last_error) == (1, None, None, None)


async def test_an_event_is_told_once_however_often_it_is_repeated(office: PostOffice) -> None:
    everything = await office.webhook("/all")
    jobs = await office.webhook("/jobs", events=["job.completed", "job.failed"])
    await office.webhook("/alerts", events=["cost.alert"])
    await office.webhook("/off", enabled=False)
    await asyncio.gather(*(office.tell("one") for _ in range(4)))
    await office.tell("one")
    await office.tell("two")
    assert len(await office.rows()) == 4
    async with office.delivering():
        await office.until_quiet()
        await office.tell("one")
        await office.tell("three", Event.JOB_STARTED)
        await office.until_calls("/all", 3)

    heard = [(call.path, json.loads(call.body)["data"]["key"]) for call in office.receiver.calls]
    assert sorted(heard) == [("/all", "one"), ("/all", "three"), ("/all", "two"), ("/jobs", "one"), ("/jobs", "two")]
    assert [key for path, key in heard if path == "/all"] == ["one", "two", "three"]
    assert {row.target for row in await office.rows()} == {everything, jobs}


async def test_tries_go_on_with_growing_pauses_and_then_end(office: PostOffice, clock: Ahead) -> None:
    webhook_id = await office.webhook("/a", events=["job.completed"])
    statuses = [500 + place for place in range(len(RETRY_PAUSES_S) + 1)]
    office.receiver.script["/a"] = [*statuses]
    await office.tell("one")
    async with office.delivering():
        for place, (status, pause_s) in enumerate(zip(statuses, RETRY_PAUSES_S, strict=False), 1):
            row = await office.until_row(webhook_id, lambda row, status=status: str(status) in (row.last_error or ""))
            assert row.not_before is not None
            assert pause_s - 10 <= (row.not_before - now()).total_seconds() <= pause_s * 1.2
            assert (row.tries, row.failed_at) == (place, None)
            clock.pass_by(seconds=pause_s * 1.2)
        row = await office.until_row(webhook_id, lambda row: row.failed_at)
        clock.pass_by(days=3)
        await asyncio.sleep(0.2)

    assert (row.tries, row.not_before) == (10, None)
    assert [call.answer for call in office.receiver.calls] == statuses
    assert {call.headers["webhook-id"] for call in office.receiver.calls} == {row.id}
    assert len({call.headers["webhook-timestamp"] for call in office.receiver.calls}) == 10
    assert len({call.body for call in office.receiver.calls}) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (HANG, "It did not answer within 0.5 s"),
        (CUT, "The connection broke"),
        (404, "It answered HTTP 404"),
        ("/elsewhere", "It answered HTTP 307 (redirects are not followed)"),
        (100, "The connection broke"),
    ],
)
async def test_how_a_receiver_can_fail(
    office: PostOffice, monkeypatch: pytest.MonkeyPatch, answer: int | str, said: str
) -> None:
    monkeypatch.setitem(LIMIT_S, Channel.WEBHOOK, 0.5)
    webhook_id = await office.webhook("/a")
    office.receiver.script["/a"] = [answer]
    await office.tell("one")
    async with office.delivering():
        row = await office.until_row(webhook_id, lambda row: row.last_error)
    assert row.last_error is not None
    assert row.last_error.startswith(said)
    assert [call.path for call in office.receiver.calls] == ["/a"]


async def test_nobody_listens(office: PostOffice) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dead = await office.webhook("/a", url=f"http://127.0.0.1:{port}/")
    unknown = await office.webhook("/b", url="http://no-such-host.invalid/")
    await office.tell("one")
    async with office.delivering():
        said = [(await office.until_row(target, lambda row: row.last_error)).last_error for target in (dead, unknown)]
    assert said[0] is not None
    assert said[0].startswith("No connection")
    assert said[1] == "Its name is not known"


async def test_the_body_of_an_answer_is_not_read(office: PostOffice) -> None:
    webhook_id = await office.webhook("/a")
    office.receiver.script["/a"] = [DRIP]
    await office.tell("one")
    async with office.delivering():
        await office.until_row(webhook_id, lambda row: row.delivered_at)


async def test_a_receiver_that_hangs_delays_none_but_itself(office: PostOffice) -> None:
    """Each has a backlog of its own, and both are as sound as the other when it begins."""
    hanging = await office.webhook("/hangs")
    sound = await office.webhook("/sound")
    office.receiver.script["/hangs"] = [HANG] * 20
    for number in range(20):
        await office.tell(str(number))
    async with office.delivering():
        await office.until_calls("/sound", 20)
        assert len(office.receiver.at("/hangs")) == 1
    assert [json.loads(c.body)["data"]["key"] for c in office.receiver.at("/sound")] == [str(n) for n in range(20)]
    assert all(row.delivered_at is None for row in await office.rows(hanging))
    assert sum(row.delivered_at is not None for row in await office.rows(sound)) >= 19


async def test_no_more_than_eight_are_sent_to_at_once(office: PostOffice) -> None:
    for number in range(12):
        await office.webhook(f"/hangs/{number}")
        office.receiver.script[f"/hangs/{number}"] = [HANG]
    await office.tell("one")
    async with office.delivering():
        while office.receiver.open < 8:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        assert office.receiver.open == 8


async def test_those_that_fail_leave_room_for_the_others(office: PostOffice) -> None:
    for number in range(12):
        await office.webhook(f"/hangs/{number}", failing_since=now())
        office.receiver.script[f"/hangs/{number}"] = [HANG]
    await office.tell("one")
    await office.webhook("/sound")
    async with office.delivering():
        while office.receiver.open < 4:
            await asyncio.sleep(0.02)
        await office.tell("two")
        await office.until_calls("/sound", 1)
        await asyncio.sleep(0.2)
        assert office.receiver.open == 4


async def test_a_ping_is_tried_once(office: PostOffice, database: Database) -> None:
    webhook_id = await office.webhook("/a", events=["cost.alert"])
    office.receiver.script["/a"] = [500]
    async with database.write() as session:
        body = outbox.envelope(PING, office.team.id, {})
        await outbox.put(session, Channel.WEBHOOK, webhook_id, body, key="ping", team_id=office.team.id)
    async with office.delivering():
        row = await office.until_row(webhook_id, lambda row: row.failed_at)
    assert (row.tries, row.last_error) == (1, "It answered HTTP 500")


async def test_what_is_over_for_long_is_purged(office: PostOffice, database: Database) -> None:
    await office.webhook("/a")
    for key in ("delivered", "given up", "delivered lately", "given up lately", "waits"):
        await office.tell(key)
    long_ago, lately, coming = now() - timedelta(days=33), now() - timedelta(days=31), now() + timedelta(hours=1)
    ends = [
        {"delivered_at": long_ago},
        {"failed_at": long_ago},
        {"delivered_at": lately},
        {"failed_at": lately},
        {"not_before": coming, "tries": 1, "created_at": long_ago},
    ]
    async with database.write() as session:
        for row, end in zip(await session.scalars(select(Outbox).order_by(Outbox.id)), ends, strict=True):
            row.not_before = None
            for name, value in end.items():
                setattr(row, name, value)
    async with office.delivering():
        while len(await office.rows()) > 3:
            await asyncio.sleep(0.02)
    kept = [(row.delivered_at, row.failed_at, row.not_before) for row in await office.rows()]
    assert kept == [(lately, None, None), (None, lately, None), (None, None, coming)]


async def test_a_letter_that_was_written_by_a_clock_ahead_goes_at_once(office: PostOffice, database: Database) -> None:
    webhook_id = await office.webhook("/a")
    await office.tell("one")
    async with database.write() as session:
        (row,) = await session.scalars(select(Outbox))
        row.not_before = now() + timedelta(hours=1)
    async with office.delivering():
        assert (await office.until_row(webhook_id, lambda row: row.delivered_at)).tries == 1


async def test_a_job_is_told_of_from_its_start_to_its_end(house: House, receiver: Receiver, clock: Ahead) -> None:
    """The whole scheduler, killed in between: each station arrives, none is enqueued twice."""
    house.carrier = NetworkCarrier(Settings(webhook_networks="any"))
    job_id = await house.new_job(total_steps=20)
    job = await house.job(job_id)
    async with house.database.write() as session:
        url, secret = receiver.url("/a"), webhooks.derive(b"test", "/a")
        session.add(Webhook(team_id=job.team_id, created_by=job.created_by, url=url, secret=secret))
    first = house.scheduler()
    task = asyncio.create_task(first.run(asyncio.Event()))
    name = await house.until_running(job_id)
    house.train(name, 1, 3)
    await house.until_job(job_id, "RUNNING")
    await house.kill(task, first)
    clock.pass_by(seconds=61)  # what it may have claimed is free again
    async with house.scheduling():
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")

        async def quiet() -> bool:
            async with house.database.read() as session:
                return {row.delivered_at is not None for row in await session.scalars(select(Outbox))} == {True}

        await house.until("the deliveries", quiet)
    bodies = [Verifier(secret).verify(call.body, call.headers) for call in receiver.calls]
    told = {call.headers["webhook-id"]: body for call, body in zip(receiver.calls, bodies, strict=True)}
    assert [body["type"] for body in told.values()] == ["job.started", "job.completed"]
    done = next(body["data"] for body in told.values() if body["type"] == "job.completed")
    job = await house.job(job_id)
    assert (done["artifactId"], done["finalCost"]) == (job.artifact_id, usd(job.final_cost_microusd or 0))
