"""`brightrun serve` as a process: event streams, uploads in bounded memory, an orderly end."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import httpx
import psutil
import pytest

from control_plane.db import Database
from control_plane.migrations import upgrade
from control_plane.services.lifecycle import NewEvent, append_events, transition
from control_plane.states import Status
from control_plane.tables import Dataset, TrainingJob
from tests.factories import Account, error_of, job_body, make_account, ready_dataset
from tests.integration.api.server import Server

Event = tuple[int, str, dict[str, Any]]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    server = Server(folder)
    await upgrade(server.settings)
    await server.ready()
    yield server
    server.stop()
    server.log.close()


@pytest.fixture
async def db(server: Server) -> AsyncIterator[Database]:
    database = Database(server.settings.database_url)
    yield database
    await database.close()


@pytest.fixture
async def ada(server: Server) -> AsyncIterator[Account]:
    async with httpx.AsyncClient(base_url=server.settings.public_url, timeout=20) as http:
        yield await make_account(http)


@pytest.fixture
async def job_id(ada: Account, db: Database) -> str:
    made = await ada.data("POST", "/api/jobs", job_body(await ready_dataset(ada, db)))
    return str(made["jobId"])


async def follow(account: Account, job_id: str, query: str = "", **headers: str) -> AsyncIterator[Event]:
    """Events until the server closes the stream; ids, names and data checked for form."""
    sent = account.headers | {name.replace("_", "-"): value for name, value in headers.items()}
    async with account.http.stream("GET", f"/api/jobs/{job_id}/stream{query}", headers=sent) as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        found: dict[str, str] = {}
        async for line in response.aiter_lines():
            if line.startswith(":"):
                continue
            if line:
                name, _, value = line.partition(": ")
                found[name] = value
            elif found:
                yield int(found["id"]), found["event"], json.loads(found["data"])
                found = {}


async def collect(account: Account, job_id: str, query: str = "", **headers: str) -> list[Event]:
    return [event async for event in follow(account, job_id, query, **headers)]


async def say(db: Database, job_id: str, count: int) -> None:
    async with db.write() as session:
        await append_events(session, job_id, [NewEvent("progress", {"progress": n}) for n in range(count)])


async def move(db: Database, job_id: str, *targets: Status, **fields: Any) -> None:
    async with db.write() as session:
        job = await session.get_one(TrainingJob, job_id)
        for target in targets:
            assert await transition(session, job, target, **fields)


async def test_a_stream_replays_follows_and_closes_after_the_end(ada: Account, db: Database, job_id: str) -> None:
    await say(db, job_id, 3)
    async with aclosing(follow(ada, job_id)) as events:
        seen = [await anext(events) for _ in range(4)]
        assert [(seq, name) for seq, name, _ in seen] == [
            (1, "stage"),
            (2, "progress"),
            (3, "progress"),
            (4, "progress"),
        ]
        began = time.monotonic()
        await say(db, job_id, 1)
        assert (await anext(events))[0] == 5
        assert time.monotonic() - began < 3
        await move(db, job_id, Status.CANCELLED)
        rest = [event async for event in events]
    assert [(seq, name) for seq, name, _ in rest] == [(6, "stage"), (7, "complete")]
    assert rest[-1][2] == {"status": "CANCELLED"}


async def test_last_event_id_replays_from_there(ada: Account, db: Database, job_id: str) -> None:
    await say(db, job_id, 1500)
    await move(db, job_id, Status.FAILED, error_code="OUT_OF_MEMORY", error_message="too large")

    everything = await collect(ada, job_id)
    assert [seq for seq, _, _ in everything] == list(range(1, 1504))
    assert everything[-1][1:] == ("error", {"code": "OUT_OF_MEMORY", "message": "too large"})
    assert await collect(ada, job_id, Last_Event_ID="1000") == everything[1000:]
    assert await collect(ada, job_id, "?lastEventId=1501") == everything[1501:]
    over = await ada.call("GET", f"/api/jobs/{job_id}/stream", Last_Event_ID="1503")
    assert (over.status_code, over.content) == (204, b"")
    for bad in ("-1", "x", "1.5", "9" * 30):
        refused = await ada.call("GET", f"/api/jobs/{job_id}/stream", Last_Event_ID=bad)
        error_of(refused, 400, "VALIDATION_ERROR")


async def test_many_watchers_of_many_jobs_each_hear_all_of_theirs(ada: Account, db: Database, job_id: str) -> None:
    other = (await ada.data("POST", "/api/jobs", job_body(await ready_dataset(ada, db))))["jobId"]
    tasks = [asyncio.create_task(collect(ada, job)) for job in (job_id, other) for _ in range(10)]
    await say(db, job_id, 700)
    await say(db, other, 5)
    await move(db, other, Status.CANCELLED)
    await move(db, job_id, Status.CANCELLED)
    heard = await asyncio.wait_for(asyncio.gather(*tasks), 30)
    assert [len(events) for events in heard] == [703] * 10 + [8] * 10
    assert all([seq for seq, _, _ in events] == list(range(1, len(events) + 1)) for events in heard)


async def test_a_client_that_reconnects_after_the_api_was_killed_misses_nothing(
    ada: Account, db: Database, job_id: str, server: Server
) -> None:
    await say(db, job_id, 5)
    seen: list[Event] = []

    async def read() -> None:
        async for event in follow(ada, job_id):
            seen.append(event)
            if len(seen) == 4:
                await server.restart(signal.SIGKILL)

    with pytest.raises(httpx.TransportError):
        await read()
    await move(db, job_id, Status.CANCELLED)
    seen += await collect(ada, job_id, Last_Event_ID=str(seen[-1][0]))
    assert [seq for seq, _, _ in seen] == list(range(1, 9))


async def test_a_large_upload_stays_out_of_memory(ada: Account, db: Database, server: Server) -> None:
    size = 200 * 1024 * 1024
    process = psutil.Process(server.process.pid)
    made = await ada.data("POST", "/api/datasets", {"name": "large", "fileName": "l.jsonl", "fileSize": size})
    before = peak = process.memory_info().rss

    async def body() -> AsyncIterator[bytes]:
        nonlocal peak
        for _ in range(size // 1_048_576):
            peak = max(peak, process.memory_info().rss)
            yield b"x" * 1_048_576

    response = await ada.http.put(made["uploadUrl"], content=body())
    assert response.status_code == 200, response.text
    assert peak - before < 120 * 1024 * 1024
    async with db.read() as session:
        key = (await session.get_one(Dataset, made["datasetId"])).storage_key
    assert (server.settings.data_dir / "objects" / key).stat().st_size == size


async def test_an_upload_that_is_cut_short_leaves_nothing(ada: Account, server: Server) -> None:
    made = await ada.data("POST", "/api/datasets", {"name": "cut", "fileName": "c.jsonl", "fileSize": 10_000_000})
    target = made["uploadUrl"].removeprefix(server.settings.public_url)
    _, writer = await asyncio.open_connection("127.0.0.1", server.settings.port)
    writer.write(f"PUT {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n".encode() + b"x" * 6_000_000)
    await writer.drain()
    await asyncio.sleep(0.3)
    writer.close()
    await writer.wait_closed()
    await asyncio.sleep(0.3)

    error_of(await ada.call("POST", f"/api/datasets/{made['datasetId']}/confirm", {}), 409, "CONFLICT")
    objects = server.settings.data_dir / "objects"
    assert await asyncio.to_thread(lambda: list(objects.rglob(f"{made['datasetId']}/*"))) == []
    assert "Traceback" not in await asyncio.to_thread(server.said)


async def test_sigterm_ends_it_soon_even_with_an_open_stream(ada: Account, job_id: str, server: Server) -> None:
    async with aclosing(follow(ada, job_id)) as events:
        await anext(events)
        began = time.monotonic()
        await asyncio.to_thread(server.stop)
        assert time.monotonic() - began < 10
    server.process = server.start()
    await server.ready()
