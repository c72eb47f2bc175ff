"""What the lifecycle machine acts on: the API, a scheduler's parts, fakes of the cluster and of MLflow."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import delete, func, select, update

from control_plane.app import create_app
from control_plane.db import Database
from control_plane.services import paused
from control_plane.services.catalog import Catalog
from control_plane.storage import Storage
from control_plane.tables import (
    Attempt,
    Base,
    BudgetHold,
    CostRecord,
    JobEvent,
    Membership,
    SchedulerLease,
    Team,
    TrainingJob,
    uuid7,
)
from control_plane.tables.accounts import TeamRole
from control_plane.tables.money import HoldState
from scheduler.collect import Collector, Place
from scheduler.dispatch import Dispatcher
from scheduler.executor import Batch
from scheduler.lease import Lease
from scheduler.observe import paused_by_budget
from scheduler.retention import whole
from scheduler.verify import verify
from tests.factories import Account, make_account
from tests.fake_tracking import FakeTracking
from tests.fakes import FakeExecutor
from tests.integration.api.conftest import client_of, make_settings

IGNORED = {"updated_at", "mlflow_run_id", "artifact_prefix", "cluster_id"}
KEPT = {"users", "teams", "memberships", "auth_sessions", "price_versions", "scheduler_lease", "alembic_version"}
CLUSTER = "cluster-1"
START = 2.0**31
"""A round number of seconds, so that an example runs alike whenever it runs."""
PLENTY = {"slot_cpu": 100.0, "slot_io": 100.0}


class Heard(NamedTuple):
    """A batch as a collector applied it."""

    attempt_id: str
    name: str
    place: Place
    batch: Batch


class SchedulerParts:
    """What a scheduler acts with; its lease may be over."""

    def __init__(self, world: World) -> None:
        database, executor = world.database, world.executor
        self.lease = Lease(database, 60, holder=uuid7())
        self.dispatcher = Dispatcher(world.settings, world.catalog, database, self.lease, executor, world.tracking)
        self.collector = Collector(database, self.lease, executor, world.storage, allowance_s=1800)


class World:
    """One installation, whose teams come and go with Hypothesis' examples."""

    def __init__(self, database_url: str, folder: Path) -> None:
        self.settings = make_settings(folder, database_url)
        self.catalog = Catalog.load(self.settings)
        self.app = create_app(self.settings)
        self.database: Database = self.app.state.database
        self.storage = Storage(self.settings.storage_url)
        self.owner: Account
        self.tracking: FakeTracking
        self.executor: FakeExecutor
        self.scheduler: SchedulerParts

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with client_of(self.app) as http:
            self.owner = await make_account(http)
            yield

    async def new_scheduler(self) -> None:
        async with self.database.write() as session:
            await session.execute(update(SchedulerLease).values(holder=""))
        self.scheduler = SchedulerParts(self)
        assert await self.scheduler.lease.try_acquire()

    async def begin(self) -> Account:
        """A cluster where nothing runs; the owner, acting in a team without any job."""
        self.executor, self.tracking = FakeExecutor(PLENTY), FakeTracking()
        self.executor.clock.now = START
        await self.new_scheduler()
        team = Team(id=uuid7(), name="team")
        async with self.database.write() as session:
            session.add(team)
            await session.flush()
            session.add(Membership(team_id=team.id, user_id=self.owner.user_id, role=TeamRole.OWNER))
        account = Account(self.owner.http, self.owner.email, self.owner.user_id, "")
        account.headers = self.owner.headers | {"X-Team-Id": team.id}
        return account

    def step_of(self, name: str) -> int:
        """The step that an attempt has reached."""
        events = [up.event for up in self.executor.attempts[name].events]
        begun = next(event["step"] for event in events if event["type"] == "started")
        return int(begun) + sum(event["type"] == "metrics" for event in events)

    def seconds_left(self, name: str) -> int:
        """Until the attempt's supervisor would end it by force, whatever the scheduler does."""
        attempt = self.executor.attempts[name]
        if attempt.allowance_ms is None:
            return 10**6
        used_ms = sum(sum(kinds.values()) for kinds in attempt.measure().values())
        return max(0, attempt.allowance_ms + attempt.spec.overrun_ms - used_ms) // 1000

    async def paused_by_budget(self) -> list[str]:
        async with self.database.read() as session:
            return await paused_by_budget(session)

    async def go_on(self, job: str) -> bool:
        async with self.scheduler.lease.write() as session:
            row = await session.get_one(TrainingJob, job, with_for_update=True)
            return await paused.go_on(session, row)

    async def clear(self) -> None:
        """Away with what an example left."""
        async with self.database.write() as session:
            for table in reversed(Base.metadata.sorted_tables):
                if table.name not in KEPT:
                    await session.execute(delete(table))

    async def poll(self, attempt_id: str, name: str) -> Heard:
        scheduler = self.scheduler
        place = await scheduler.collector.place_of(attempt_id)
        batch = await self.executor.poll(
            name, place.cursor, epoch=scheduler.lease.epoch, allowance_ms=place.allowance_ms
        )
        return Heard(attempt_id, name, place, batch)

    async def select(self, table: Any, *where: Any) -> list[Any]:
        async with self.database.read() as session:
            return list(await session.scalars(select(table).where(*where).order_by(table.id)))

    async def numbers_of_events(self, jobs: Collection[str]) -> dict[str, tuple[int, int, int]]:
        """Job → first, last and number of its seqs."""
        seq = JobEvent.seq
        figures = select(JobEvent.job_id, func.min(seq), func.max(seq), func.count()).group_by(JobEvent.job_id)
        async with self.database.read() as session:
            rows = await session.execute(figures.where(JobEvent.job_id.in_(jobs)))
            return {job: (first, last, count) for job, first, last, count in rows}

    async def newest_checkpoint(self, job: str) -> str | None:
        async with self.database.read() as session:
            points = await whole(session, job)
        return points[0].id if points else None

    async def violations(self) -> list[Any]:
        async with self.database.read() as session:
            return list(await verify(session))

    async def rows(self, jobs: Collection[str]) -> list[dict[str, Any]]:
        """Everything that is kept of the jobs."""
        mine = [
            (TrainingJob, TrainingJob.id),
            (Attempt, Attempt.work_id),
            *((table, table.job_id) for table in (BudgetHold, CostRecord, JobEvent)),
        ]
        found = [row for table, job_id in mine for row in await self.select(table, job_id.in_(jobs))]
        names = [[column.key for column in row.__table__.columns if column.key not in IGNORED] for row in found]
        return [{name: getattr(row, name) for name in named} for row, named in zip(found, names, strict=True)]

    async def spent(self, jobs: Collection[str]) -> dict[str, int]:
        """Micro-dollars posted, by job."""
        spent: dict[str, int] = {}
        for record in await self.select(CostRecord, CostRecord.job_id.in_(jobs)):
            spent[record.job_id] = spent.get(record.job_id, 0) + record.amount_microusd
        return spent

    async def held(self, jobs: Collection[str]) -> dict[str, int]:
        """Micro-dollars held for those that have not ended."""
        holds = await self.select(BudgetHold, BudgetHold.job_id.in_(jobs), BudgetHold.state == HoldState.OPEN)
        return {hold.job_id: hold.amount_microusd for hold in holds}
