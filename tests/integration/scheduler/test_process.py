"""``python -m scheduler`` as a process, against real Ray."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from standardwebhooks.webhooks import Webhook as Verifier

from control_plane.db import Database
from control_plane.services import outbox, webhooks
from control_plane.settings import Settings
from control_plane.tables import ClusterState, Outbox, PriceVersion, SchedulerLease, Webhook
from control_plane.tables.notices import Event
from tests.ray_cluster import RayCluster, ray_cluster
from tests.receiver import Receiver
from tests.rows import make_team

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        yield cluster


class Process:
    def __init__(self, settings: Settings) -> None:
        self.log = settings.data_dir / f"scheduler-{len(list(settings.data_dir.glob('*.log')))}.log"
        command = [sys.executable, "-m", "scheduler"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, env={**os.environ, **settings.to_env()}, stderr=log)

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    async def exit_code(self) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self._process.wait), 20)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
async def processes() -> AsyncIterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        if process.running:
            process.kill()


async def row(database: Database, table: Any) -> Any:
    async with database.read() as session:
        return await session.get(table, 1)


async def until(what: str, probe: Any, *processes: Process) -> Any:
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not (found := await probe()):
        for process in processes:
            assert process.running, process.log.read_text()[-3000:]
        assert asyncio.get_running_loop().time() < deadline, f"waited for {what}"
        await asyncio.sleep(0.1)
    return found


async def test_it_waits_for_ray_acts_and_ends_in_order(
    sqlite_url: str, tmp_path: Path, cluster: RayCluster, processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(sqlite_url)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.token_file))
    nothing = {"ray_address": "127.0.0.1:1", "mlflow_url": "http://127.0.0.1:1"}
    away = Settings(data_dir=tmp_path, database_url=sqlite_url, **nothing)
    near = Settings(**{**vars(away), "ray_address": cluster.address})

    async def seen(reachable: bool) -> bool:
        state = await row(database, ClusterState)
        return state is not None and state.reachable is reachable

    first = Process(away)
    processes.append(first)
    await until("a look at nothing", lambda: seen(False), first)
    first.send(signal.SIGTERM)
    assert await first.exit_code() == 0
    assert (await row(database, SchedulerLease)).holder == ""

    second = Process(near)
    processes.append(second)

    async def counted() -> bool:
        state = await row(database, ClusterState)
        return bool(state.cluster_id) and (state.total.get("slot_cpu"), state.total.get("slot_io")) == (1, 2)

    await until("a look at Ray", lambda: seen(True), second)
    await until("Ray's resources", counted, second)
    async with database.read() as session:
        (price,) = await session.scalars(select(PriceVersion))
    assert price.gpu_microusd_per_hour["cpu"] == 360_000
    second.send(signal.SIGTERM)
    assert await second.exit_code() == 0, second.log.read_text()[-3000:]
    lease = await row(database, SchedulerLease)
    assert (lease.holder, lease.epoch) == ("", 2)
    await database.close()
    for line in (first.log.read_text() + second.log.read_text()).splitlines():
        assert json.loads(line)["level"] in ("INFO", "WARNING")


async def test_the_next_takes_over_at_once_when_one_is_killed(
    sqlite_url: str, tmp_path: Path, processes: list[Process]
) -> None:
    database = Database(sqlite_url)
    settings = Settings(
        data_dir=tmp_path, database_url=sqlite_url, ray_address="127.0.0.1:1", mlflow_url="http://127.0.0.1:1",
        lease_timeout_s=300.0,
    )  # fmt: skip

    async def held(epoch: int) -> bool:
        lease = await row(database, SchedulerLease)
        return lease is not None and lease.epoch == epoch and lease.holder != ""

    first = Process(settings)
    processes.append(first)
    await until("the lease", lambda: held(1), first)
    first.kill()
    second = Process(settings)
    processes.append(second)
    await until("the lease", lambda: held(2), second)
    await database.close()


async def test_it_delivers_webhooks_also_without_ray(
    sqlite_url: str, tmp_path: Path, processes: list[Process], receiver: Receiver
) -> None:
    database = Database(sqlite_url)
    secret = webhooks.derive(b"test", "x")
    async with database.write() as session:
        team = await make_team(session)
        url, owner = receiver.url("/a"), team.personal_of
        session.add(Webhook(team_id=team.id, created_by=owner, url=url, secret=secret))
        await session.flush()
        await outbox.tell_webhooks(session, team.id, Event.SYSTEM, {"title": "Hello"}, key="one")
    settings = Settings(
        data_dir=tmp_path, database_url=sqlite_url, ray_address="127.0.0.1:1", mlflow_url="http://127.0.0.1:1",
        webhook_networks="any",
    )  # fmt: skip
    process = Process(settings)
    processes.append(process)

    async def delivered() -> bool:
        async with database.read() as session:
            return (await session.scalars(select(Outbox))).one().delivered_at is not None

    await until("the delivery", delivered, process)
    (call,) = receiver.calls
    assert Verifier(secret).verify(call.body, call.headers)["data"] == {"teamId": team.id, "title": "Hello"}
    assert secret.removeprefix("whsec_") not in process.log.read_text()
    await database.close()
