"""A scheduler on fakes of the cluster and of MLflow, with real databases and a real object store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from control_plane.db import Database
from control_plane.services.catalog import Catalog
from control_plane.settings import Settings
from control_plane.states import Outcome
from control_plane.storage import Storage
from control_plane.tables import Attempt, TrainingJob, Verdict
from scheduler.carrier import Carrier
from scheduler.lease import Lease
from scheduler.loop import Scheduler
from tests.fake_tracking import FakeTracking
from tests.fakes import FakeExecutor
from tests.integration.scheduler.post_office import Ahead, PostOffice
from tests.receiver import Receiver, receiving
from tests.rows import make_dataset, make_job, make_team, make_verdict

PATIENCE_S = 8.0


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.collect.POLL_S", 0.02)
    monkeypatch.setattr("scheduler.mirror.PAUSE_S", 0.02)
    monkeypatch.setattr("scheduler.deliver.PAUSE_S", 0.02)
    monkeypatch.setattr("scheduler.loop.TRACKING_PAUSE_S", 0.1)
    monkeypatch.setattr("scheduler.loop.BUDGET_S", 0.02)
    monkeypatch.setattr("scheduler.finish.RETRY_PAUSES_S", (0.02, 0.04, 0.06))


class House:
    """One installation: what outlives a scheduler, and schedulers on it."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.settings = Settings(data_dir=folder, tick_s=0.02, lease_timeout_s=1.0, node_timeout_s=0.0)
        self.catalog = Catalog.load(self.settings)
        self.executor = FakeExecutor()
        self.tracking = FakeTracking()
        self.storage = Storage(self.settings.storage_url)
        self.carrier: Carrier | None = None

    def scheduler(self, holder: str | None = None, database: Database | None = None) -> Scheduler:
        database = database or self.database
        lease = Lease(database, self.settings.lease_timeout_s, holder)
        parts = (self.settings, self.catalog, database, self.executor, self.tracking, self.storage)
        return Scheduler(*parts, lease=lease, carrier=self.carrier)

    @asynccontextmanager
    async def scheduling(self, scheduler: Scheduler | None = None) -> AsyncIterator[Scheduler]:
        """A scheduler that is at work, and ends in an orderly way."""
        stop = asyncio.Event()
        scheduler = scheduler or self.scheduler()
        task = asyncio.create_task(scheduler.run(stop))
        try:
            yield scheduler
        finally:
            stop.set()
            await task

    async def kill(self, task: asyncio.Task[None], scheduler: Scheduler) -> None:
        """As SIGKILL would: nothing is written any more, the lease is not given back."""

        async def nothing() -> None: ...

        scheduler.lease.release = nothing  # type: ignore[method-assign]
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def new_job(self, **fields: Any) -> str:
        async with self.database.write() as session:
            return (await make_job(session, **fields)).id

    async def new_verdict(self) -> str:
        async with self.database.write() as session:
            dataset = await make_dataset(session, await make_team(session), status="VALIDATING")
            return (await make_verdict(session, dataset)).id

    async def job(self, job_id: str) -> TrainingJob:
        async with self.database.read() as session:
            return await session.get_one(TrainingJob, job_id)

    async def verdict(self, verdict_id: str) -> Verdict:
        async with self.database.read() as session:
            return await session.get_one(Verdict, verdict_id)

    async def attempts(self, work_id: str) -> list[Attempt]:
        async with self.database.read() as session:
            rows = select(Attempt).where(Attempt.work_id == work_id).order_by(Attempt.number)
            return list(await session.scalars(rows))

    async def until(self, what: str, probe: Callable[[], Awaitable[Any]]) -> Any:
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not (found := await probe()):
            assert asyncio.get_running_loop().time() < deadline, f"waited for {what}"
            await asyncio.sleep(0.02)
        return found

    async def until_job(self, job_id: str, status: str) -> TrainingJob:
        async def there() -> TrainingJob | None:
            job = await self.job(job_id)
            return job if job.status == status else None

        return await self.until(f"{status}, it is {(await self.job(job_id)).status}", there)

    async def until_running(self, work_id: str, number: int = 1) -> str:
        """The name of the attempt once its ranks are up."""
        name = f"{work_id}/{number}"

        async def up() -> bool:
            return name in self.executor.attempts and bool(self.executor.attempts[name].meters)

        await self.until(f"{name} to run", up)
        return name

    async def until_heard(self, name: str) -> None:
        """Every event of the attempt so far is in the database."""
        work_id = name.partition("/")[0]

        async def heard() -> bool:
            attempt = (await self.attempts(work_id))[-1]
            return attempt.event_cursor >= len(self.executor.attempts[name].events)

        await self.until(f"{name}'s events", heard)

    def train(self, name: str, first: int, last: int, *, seconds: float = 1.0) -> None:
        """Steps ``first`` to ``last``, a second of GPU time each."""
        fake = self.executor
        fake.emit(name, {"type": "phase", "name": "training"})
        for step in range(first, last + 1):
            fake.clock.advance(seconds)
            figures = {"training_loss": 4.0 / step, "learning_rate": 1e-4, "throughput": 100.0}
            fake.emit(name, {"type": "metrics", "step": step, "epoch": 0, **figures})

    async def put_checkpoint(self, name: str, step: int, **fields: Any) -> str:
        key = self.executor.store(name, step, **fields)
        await self.storage.put(f"{key}/manifest.json", b"{}")
        return key

    def complete(self, name: str, *, steps: int = 20) -> None:
        """The child's last words: an adapter, its figures, a good end."""
        prefix = self.executor.attempts[name].spec.artifact_prefix
        file = {"key": f"{prefix}/adapter/adapter_model.safetensors", "size": 10, "sha256": "1" * 64}
        result = {"finalTrainingLoss": 0.2, "finalValidationLoss": 2.0, "perplexity": 7.4, "tokensPerS": 99.0}
        self.executor.emit(
            name,
            {"type": "adapter", "files": {"adapter_model.safetensors": file}, "best_step": steps},
            {"type": "finished", "outcome": "completed", "step": steps, "result": result},
        )
        self.executor.end(name, Outcome.COMPLETED)


@pytest.fixture
def house(database: Database, tmp_path: Path) -> House:
    return House(database, tmp_path / "data")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    clock = Ahead()
    monkeypatch.setattr("control_plane.tables.base.clock", clock)
    return clock


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def office(database: Database, receiver: Receiver) -> PostOffice:
    async with database.write() as session:
        return PostOffice(database, receiver, await make_team(session))
