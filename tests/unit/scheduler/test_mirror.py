"""The mirror reads behind ``mirrored_seq`` and moves it only from where it read."""

from __future__ import annotations

from typing import Any

from control_plane.db import Database
from control_plane.services.lifecycle import append_event
from control_plane.tables import TrainingJob
from scheduler.lease import Lease
from scheduler.mirror import Mirror
from scheduler.tracking import Metric
from tests.fake_tracking import FakeTracking
from tests.rows import make_job


class Overtaken(FakeTracking):
    """While it writes, another mirror brings the job further."""

    database: Database

    async def log(self, run_id: str, metrics: list[Metric], params: dict[str, str], tags: dict[str, str]) -> None:
        await super().log(run_id, metrics, params, tags)
        async with self.database.write() as session:
            job = await session.get_one(TrainingJob, tags["brightrun.job_id"])
            await append_event(session, job.id, "progress", {})
            job.mirrored_seq = 2


async def mirrored(database: Database, tracking: FakeTracking) -> int:
    """Where one pass over a job with one event leaves it."""
    lease = Lease(database, 60)
    await lease.try_acquire()
    async with database.write() as session:
        job = await make_job(session)
        run = await tracking.ensure_run(team_id=job.team_id, job_id=job.id, name=job.name)
        fields: dict[str, Any] = {"mlflow_run_id": run.run_id, "artifact_prefix": run.artifact_prefix}
        for name, value in fields.items():
            setattr(job, name, value)
        await append_event(session, job.id, "progress", {})
    assert await Mirror(database, lease, tracking).pass_once()
    async with database.read() as session:
        return (await session.get_one(TrainingJob, job.id)).mirrored_seq


async def test_a_pass_moves_it_to_what_it_wrote(database: Database) -> None:
    assert await mirrored(database, FakeTracking()) == 1


async def test_a_mirror_that_was_overtaken_moves_nothing_back(database: Database) -> None:
    tracking = Overtaken()
    tracking.database = database
    assert await mirrored(database, tracking) == 2
