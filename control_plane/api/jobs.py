"""/api/jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from litestar import Controller, get, patch, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.api.context import Caller, House, Once, Pages, Session
from control_plane.auth import READ, TRAIN
from control_plane.schemas.base import Ok, ok
from control_plane.schemas.jobs import (
    Attempts,
    ChangeJob,
    Checkpoints,
    CreateJob,
    EstimateData,
    JobData,
    JobOut,
    Jobs,
    Logs,
    Metrics,
    NewJob,
    RetriedJob,
)
from control_plane.services import jobs, lifecycle, paused, retries, telemetry
from control_plane.services.accounts import audit
from control_plane.services.scope import Principal, get_owned
from control_plane.states import Status, StopReason
from control_plane.tables import TrainingJob


class JobController(Controller):
    path = "/api/jobs"
    tags = ("jobs",)

    @post("/estimate", guards=[READ], status_code=200, summary="What POST /api/jobs with this body would take and cost")
    async def estimate(self, data: JSONBody[CreateJob], who: Caller, installation: House) -> Ok[EstimateData]:
        default = installation.settings.default_base_model
        async with installation.database.read() as session:
            ready = await jobs.prepare(session, who, data, installation.catalog, default)
        return ok(EstimateData(estimate=ready.estimate, warnings=ready.warnings))

    @post(guards=[TRAIN], summary="Train")
    async def create(
        self,
        data: JSONBody[CreateJob],
        installation: House,
        session: Session,
        who: Caller,
        idempotent: Once,
    ) -> Ok[NewJob]:
        default = installation.settings.default_base_model

        async def run() -> NewJob:
            installation.require_room()
            return await jobs.submit(session, who, data, installation.catalog, default)

        return ok(await idempotent(NewJob, run))

    @get(guards=[READ], summary="The team's jobs")
    async def list_jobs(
        self,
        session: Session,
        who: Caller,
        paging: Pages,
        status: FromQuery[Status | None] = None,
        dataset_id: Annotated[str | None, QueryParameter(name="datasetId")] = None,
    ) -> Ok[Jobs]:
        rows, pagination = await jobs.listed(session, who.team_id, paging, status, dataset_id)
        return ok(Jobs(jobs=await _seen(session, rows), pagination=pagination))

    @get("/{job_id:str}", guards=[READ], summary="A job with its metrics history")
    async def get_job(self, job_id: FromPath[str], session: Session, who: Caller) -> Ok[JobData]:
        job = await get_owned(session, TrainingJob, who.team_id, job_id)
        (seen,) = await _seen(session, [job])
        seen.metrics = await telemetry.metrics(session, job_id)
        return ok(JobData(job=seen))

    @patch("/{job_id:str}", guards=[TRAIN], summary="Change the name, or the priority while it is queued")
    async def change(
        self, job_id: FromPath[str], data: JSONBody[ChangeJob], session: Session, who: Caller
    ) -> Ok[JobData]:
        job = await jobs.change(session, who.team_id, job_id, data)
        (seen,) = await _seen(session, [job])
        return ok(JobData(job=seen))

    @get("/{job_id:str}/metrics", guards=[READ], summary="The curve, in at most maxPoints points")
    async def metrics(
        self,
        job_id: FromPath[str],
        session: Session,
        who: Caller,
        max_points: Annotated[int, QueryParameter(name="maxPoints", ge=2, le=10_000)] = 2000,
    ) -> Ok[Metrics]:
        await get_owned(session, TrainingJob, who.team_id, job_id)
        return ok(Metrics(metrics=await telemetry.metrics(session, job_id, max_points)))

    @get("/{job_id:str}/logs", guards=[READ], summary="Its log")
    async def logs(
        self,
        job_id: FromPath[str],
        session: Session,
        who: Caller,
        paging: Pages,
        level: FromQuery[Literal["INFO", "WARNING", "ERROR"] | None] = None,
    ) -> Ok[Logs]:
        await get_owned(session, TrainingJob, who.team_id, job_id)
        rows, pagination = await telemetry.logs(session, job_id, paging, level)
        return ok(Logs(logs=rows, pagination=pagination))

    @get("/{job_id:str}/checkpoints", guards=[READ], summary="Its checkpoints, by step")
    async def checkpoints(self, job_id: FromPath[str], session: Session, who: Caller) -> Ok[Checkpoints]:
        await get_owned(session, TrainingJob, who.team_id, job_id)
        return ok(Checkpoints(checkpoints=await telemetry.checkpoints(session, job_id)))

    @get("/{job_id:str}/attempts", guards=[READ], summary="Its executions, by number")
    async def attempts(self, job_id: FromPath[str], session: Session, who: Caller) -> Ok[Attempts]:
        await get_owned(session, TrainingJob, who.team_id, job_id)
        return ok(Attempts(attempts=await telemetry.attempts(session, job_id)))

    @post("/{job_id:str}/cancel", guards=[TRAIN], status_code=202, summary="End it, keeping the last checkpoint")
    async def cancel(self, job_id: FromPath[str], session: Session, who: Caller) -> Ok[JobData]:
        return await _stop(session, who, job_id, StopReason.CANCEL)

    @post("/{job_id:str}/pause", guards=[TRAIN], status_code=202, summary="Free its GPUs, keeping a checkpoint")
    async def pause(self, job_id: FromPath[str], session: Session, who: Caller) -> Ok[JobData]:
        return await _stop(session, who, job_id, StopReason.PAUSE)

    @post("/{job_id:str}/resume", guards=[TRAIN], status_code=202, summary="Queue a paused job again")
    async def resume(self, job_id: FromPath[str], session: Session, who: Caller) -> Ok[JobData]:
        job = await get_owned(session, TrainingJob, who.team_id, job_id, lock=True)
        await paused.resume(session, job)
        audit(session, "resume", "job", job_id, user_id=who.user_id, team_id=who.team_id)
        (seen,) = await _seen(session, [job])
        return ok(JobData(job=seen))

    @post("/{job_id:str}/retry", guards=[TRAIN], summary="A new job that goes on from a failed or cancelled one")
    async def retry(
        self, job_id: FromPath[str], installation: House, session: Session, who: Caller, idempotent: Once
    ) -> Ok[RetriedJob]:
        async def run() -> RetriedJob:
            installation.require_room()
            job, ready = await retries.retry(session, who, job_id, installation.catalog)
            (seen,) = await _seen(session, [job])
            return RetriedJob(
                job_id=job.id,
                queue_position=seen.queue_position or 0,
                estimate=ready.estimate,
                warnings=ready.warnings,
                job=seen,
            )

        return ok(await idempotent(RetriedJob, run))


async def _stop(session: AsyncSession, who: Principal, job_id: str, reason: StopReason) -> Ok[JobData]:
    """At once if nothing runs, else by the scheduler (``stopRequested`` says so meanwhile)."""
    job = await get_owned(session, TrainingJob, who.team_id, job_id, lock=True)
    before = job.status, job.stop_requested, job.paused_by
    await lifecycle.request_stop(session, job, reason)
    if before != (job.status, job.stop_requested, job.paused_by):
        audit(session, reason.lower(), "job", job_id, user_id=who.user_id, team_id=who.team_id)
        await session.flush()
    (seen,) = await _seen(session, [job])
    return ok(JobData(job=seen))


async def _seen(session: AsyncSession, rows: Sequence[TrainingJob]) -> list[JobOut]:
    positions = await jobs.queue_positions(session, rows)
    numbers = await jobs.price_numbers(session, rows)
    return [JobOut.seen(row, numbers[row.price_version_id], positions.get(row.id)) for row in rows]
