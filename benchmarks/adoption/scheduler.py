"""``python -m benchmarks.adoption.scheduler CLUSTER JOBS``: a scheduler process that says, in lines of JSON, when it
holds the lease, when each of so many attempts has answered it, and whether it started any.

CLUSTER: ``socket:PATH`` (see ``wire``), or ``ray:HOST:PORT:TOKEN_FILE`` with a child that only steps. Settings come
from the environment, as for the real one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.adoption.wire import Remote
from control_plane.db import Database
from control_plane.services.catalog import Catalog
from control_plane.settings import Settings
from control_plane.storage import Storage
from scheduler.cluster.executor import RayExecutor
from scheduler.executor import AttemptSpec, Batch, Executor
from scheduler.lease import Lease
from scheduler.loop import Scheduler
from scheduler.simulator.tracking import FakeTracking
from scheduler.tracking import Metric
from tests.contract.harness import CHILD

told = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
"""Ray writes to the standard output what it pleases."""


def say(event: str, **fields: Any) -> None:
    told.write(json.dumps({"event": event, **fields}) + "\n")


class Told:
    """An executor that says what it is asked, and when so many attempts have answered."""

    def __init__(self, executor: Executor, jobs: int) -> None:
        self._executor, self._jobs = executor, jobs
        self._answered: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    async def start(self, spec: AttemptSpec) -> None:
        await self._executor.start(spec)
        say("start", name=spec.name)

    async def poll(self, name: str, cursor: int, *, epoch: int, allowance_ms: int | None) -> Batch:
        batch = await self._executor.poll(name, cursor, epoch=epoch, allowance_ms=allowance_ms)
        if name not in self._answered and batch.state == "running":
            self._answered.add(name)
            if len(self._answered) == self._jobs:
                say("adopted")
        return batch


class Heedless(FakeTracking):
    """An MLflow that takes whatever it is told, of runs that another scheduler began too."""

    async def log(self, run_id: str, metrics: list[Metric], params: dict[str, str], tags: dict[str, str]) -> None: ...

    async def set_status(self, run_id: str, status: str, ended: datetime | None) -> None: ...


class ToldLease(Lease):
    async def acquire(self) -> int:
        epoch = await super().acquire()
        say("lease", epoch=epoch)
        return epoch


def executor_of(cluster: str, settings: Settings) -> Executor:
    kind, _, rest = cluster.partition(":")
    if kind == "socket":
        return Remote(rest)
    address, _, token = rest.rpartition(":")
    return RayExecutor(address, token_file=Path(token), work_root=settings.work_dir, child_command=CHILD)


async def serve(cluster: str, jobs: int) -> None:
    settings = Settings.from_env()
    database = Database(settings.database_url)
    scheduler = Scheduler(
        settings,
        Catalog.load(settings),
        database,
        Told(executor_of(cluster, settings), jobs),
        Heedless(),
        Storage(settings.storage_url),
        lease=ToldLease(database, settings.lease_timeout_s),
    )
    await scheduler.run(asyncio.Event())


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
    finally:
        os._exit(1)
