"""One installation without API and MLflow: jobs that run, schedulers that are killed, and what both left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select

from control_plane.db import Database
from control_plane.settings import Settings
from control_plane.states import Status
from control_plane.tables import Attempt, Base, Dataset, TrainingJob
from scheduler.executor import AttemptSpec, Demand
from scheduler.simulator.executor import FakeExecutor
from tests.rows import make_dataset, make_job, make_running_job, make_team

PATIENCE_S = 300
LIVES = 3
STEP_EVERY_S = 10.0
FOREVER = [{"do": "train", "steps": 1_000_000, "every_s": 1.0}]


class Adoption(NamedTuple):
    """Seconds from the start of the process that adopts; from its lease; and what it started, which is nothing."""

    jobs: int
    lease_s: float
    adopted_s: float
    started: list[str]

    @property
    def after_lease_s(self) -> float:
        return self.adopted_s - self.lease_s


class Process:
    """A scheduler process and what it has said, each with the second of its life.

    One that ends by itself (because it does not reach its cluster) is started again, as ``brightrun up`` does it.
    """

    def __init__(self, start: Callable[[], Awaitable[asyncio.subprocess.Process]]) -> None:
        self._start, self._began = start, time.monotonic()
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False
        self.said: list[tuple[float, dict[str, Any]]] = []
        self._living = asyncio.create_task(self._live())

    async def _live(self) -> None:
        for _ in range(LIVES):
            self._process = await self._start()
            if self._killed:
                self._process.kill()
            assert self._process.stdout
            async for line in self._process.stdout:
                self.said.append((time.monotonic() - self._began, json.loads(line)))
            await self._process.wait()
            if self._killed:
                break

    async def until(self, event: str) -> float:
        """The second at which it said so."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for at, said in self.said:
                    if said["event"] == event:
                        return at
                if self._living.done():
                    raise RuntimeError(f"the scheduler has ended {LIVES} times; its log is with its data")
                await asyncio.sleep(0.05)

    async def kill(self) -> None:
        self._killed = True
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
        await self._living


class Room:
    """A folder with database and object store."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = Settings(data_dir=folder, **settings)
        self.database = Database(self.settings.database_url)

    async def create(self) -> None:
        async with self.database.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    @asynccontextmanager
    async def scheduler(self, cluster: str, jobs: int) -> AsyncIterator[Process]:
        """A scheduler process; killed in the end, if it was not before."""
        command = (sys.executable, "-m", "benchmarks.adoption.scheduler", cluster, str(jobs))
        log = (self.settings.data_dir / "scheduler.log").open("ab")
        env = os.environ | self.settings.to_env()
        start = partial(asyncio.create_subprocess_exec, *command, env=env, stdout=asyncio.subprocess.PIPE, stderr=log)
        process = Process(start)
        try:
            yield process
        finally:
            await process.kill()
            log.close()

    async def adoption(self, cluster: str, jobs: int) -> Adoption:
        """Kill the scheduler that runs the jobs, and let another adopt them. Raises when any has a new attempt."""
        async with self.scheduler(cluster, jobs) as first:
            await first.until("adopted")
        before = await self.attempts()
        async with self.scheduler(cluster, jobs) as second:
            adopted_s = await second.until("adopted")
            lease_s = await second.until("lease")
        started = [str(said["name"]) for _, said in second.said if said["event"] == "start"]
        after = await self.attempts()
        if [a[:2] for a in after] != [a[:2] for a in before] or any(outcome for *_, outcome in after):
            raise AssertionError(f"not as before: {set(after) ^ set(before)}")
        return Adoption(jobs, lease_s, adopted_s, started)

    async def attempts(self) -> list[tuple[str, int, str | None]]:
        """(work, number, outcome) of every attempt."""
        async with self.database.read() as session:
            rows = await session.execute(
                select(Attempt.work_id, Attempt.number, Attempt.outcome).order_by(Attempt.work_id, Attempt.number)
            )
            return [(work, number, outcome) for work, number, outcome in rows]

    async def queue(self, count: int) -> None:
        """Jobs that wait, whose children only step."""
        async with self.database.write() as session:
            team = await make_team(session)
            keys = []
            for _ in range(count):
                job = await make_job(session, team)
                keys.append((await session.get_one(Dataset, job.dataset_id)).storage_key)
        for key in keys:
            path = self.settings.data_dir / "objects" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(FOREVER))

    async def run_on(self, fake: FakeExecutor, count: int) -> None:
        """Jobs that run on the fake cluster already."""
        cluster = (await fake.look()).cluster_id
        names = []
        async with self.database.write() as session:
            team = await make_team(session)
            dataset = await make_dataset(session, team)
            for _ in range(count):
                job, attempt = await make_running_job(session, team=team, dataset=dataset, mlflow_run_id="none")
                attempt.cluster_id = cluster
                names.append((job.id, attempt.actor_name))
        for work_id, name in names:
            spec = AttemptSpec(name, work_id, 1, {}, Demand({"slot_cpu": 1}), (), artifact_prefix=f"mlflow/{work_id}")
            await fake.start(spec)

    async def close(self) -> None:
        await self.database.close()


async def step(fake: FakeExecutor) -> None:
    """Every attempt takes a step every ``STEP_EVERY_S``, one after the other, forever."""
    number = 0
    while True:
        number += 1
        for name in list(fake.attempts):
            await asyncio.sleep(STEP_EVERY_S / len(fake.attempts))
            figures = {"training_loss": 1 / number, "learning_rate": 1e-4}
            fake.emit(name, {"type": "metrics", "step": number, "epoch": 0, **figures})


async def statuses(database: Database) -> set[Status]:
    async with database.read() as session:
        return set(await session.scalars(select(TrainingJob.status).distinct()))
