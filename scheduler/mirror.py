"""MLflow's copy of what the event table says: metrics, params, tags, status. An outage delays it and nothing else."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select, update

from control_plane.db import Database
from control_plane.money import usd
from control_plane.states import TERMINAL, Status
from control_plane.tables import JobEvent, TrainingJob
from scheduler.lease import Lease, LeaseLost
from scheduler.pause import pause
from scheduler.tracking import JOB_TAG, Metric, Tracking, TrackingDown, TrackingRefused

log = logging.getLogger(__name__)
PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
EVENTS_AT_ONCE = 150
"""Each gives up to six metrics; the server takes 1000 entries at once."""
JOBS_AT_ONCE = 50
PARAM_LENGTH = 500

RUN_STATUS = {
    Status.QUEUED: "SCHEDULED",
    Status.PAUSED: "SCHEDULED",
    Status.INITIALIZING: "RUNNING",
    Status.RUNNING: "RUNNING",
    Status.COMPLETED: "FINISHED",
    Status.FAILED: "FAILED",
    Status.CANCELLED: "KILLED",
}
METRICS = {
    "trainingLoss": "training_loss",
    "validationLoss": "validation_loss",
    "learningRate": "learning_rate",
    "gradientNorm": "gradient_norm",
    "throughput": "throughput",
    "gpuUtilization": "gpu_utilization",
}


class Mirror:
    """Reads behind ``mirrored_seq``, writes to MLflow, then moves it: a repeat after a crash adds nothing."""

    def __init__(self, database: Database, lease: Lease, tracking: Tracking) -> None:
        self._database = database
        self._lease = lease
        self._tracking = tracking

    async def run(self) -> None:
        """Forever; raises LeaseLost."""
        pause_s = PAUSE_S
        while True:
            try:
                moved = await self.pass_once()
                pause_s = 0.0 if moved else PAUSE_S
            except LeaseLost:
                raise
            except TrackingDown as error:
                pause_s = min(max(pause_s, PAUSE_S) * 2, LONGEST_PAUSE_S)
                log.warning("MLflow does not answer; the mirror waits %.0f s (%s)", pause_s, error)
            except Exception:
                pause_s = LONGEST_PAUSE_S
                log.exception("the MLflow mirror failed")
            await pause(pause_s)

    async def pass_once(self) -> bool:
        """Bring every job that lags a step forward. True if there may be more to do."""
        async with self._database.read() as session:
            behind = (
                await session.scalars(
                    select(TrainingJob)
                    .where(
                        TrainingJob.mlflow_run_id.is_not(None),
                        or_(
                            TrainingJob.event_seq > TrainingJob.mirrored_seq,
                            TrainingJob.mirrored_status.is_distinct_from(TrainingJob.status),
                        ),
                    )
                    .order_by(TrainingJob.updated_at)
                    .limit(JOBS_AT_ONCE)
                )
            ).all()
        for job in behind:
            await self._bring_forward(job)
        return bool(behind)

    async def _bring_forward(self, job: TrainingJob) -> None:
        assert job.mlflow_run_id is not None
        async with self._database.read() as session:
            events = (
                await session.scalars(
                    select(JobEvent)
                    .where(JobEvent.job_id == job.id, JobEvent.seq > job.mirrored_seq)
                    .order_by(JobEvent.seq)
                    .limit(EVENTS_AT_ONCE)
                )
            ).all()
        reached = events[-1].seq if events else job.mirrored_seq
        complete = reached >= job.event_seq
        try:
            metrics = [metric for event in events for metric in _metrics(event)]
            params = {} if job.mirrored_seq else _params(job)
            if metrics or params or complete:
                await self._tracking.log(job.mlflow_run_id, metrics, params, _tags(job))
            if complete and job.mirrored_status != job.status:
                ended = job.completed_at if job.status in TERMINAL else None
                await self._tracking.set_status(job.mlflow_run_id, RUN_STATUS[job.status], ended)
                if ended:
                    await self._tracking.settle(job.mlflow_run_id, team_id=job.team_id, job_id=job.id)
        except TrackingRefused:
            log.exception("MLflow refused a part of the mirror", extra={"job": job.id, "run": job.mlflow_run_id})
        async with self._lease.write() as session:
            await session.execute(
                update(TrainingJob)
                .where(TrainingJob.id == job.id, TrainingJob.mirrored_seq == job.mirrored_seq)
                .values(
                    mirrored_seq=reached,
                    mirrored_status=job.status if complete else job.mirrored_status,
                    updated_at=TrainingJob.updated_at,
                )
            )


def _metrics(event: JobEvent) -> list[Metric]:
    """Of a step; and of a log entry that tells of one (the validation loss before the first)."""
    point: dict[str, Any] = (event.payload if event.type == "metrics" else event.payload.get("metadata")) or {}
    step = point.get("step")
    if event.type not in ("metrics", "log") or not isinstance(step, int):
        return []
    at = int(datetime.fromisoformat(event.payload["timestamp"]).timestamp() * 1000)
    return [
        Metric(key, float(point[name]), at, step)
        for name, key in METRICS.items()
        if isinstance(point.get(name), int | float)
    ]


def _params(job: TrainingJob) -> dict[str, str]:
    params = {
        **job.hyperparameters,
        "baseModel": job.base_model,
        "baseModelRevision": job.base_model_revision,
        "datasetId": job.dataset_id,
        "presetId": job.preset_id,
        "gpuType": job.gpu_type,
        "gpuCount": job.gpu_count,
    }
    return {key: str(value)[:PARAM_LENGTH] for key, value in params.items()}


def _tags(job: TrainingJob) -> dict[str, str]:
    tags = {JOB_TAG: job.id, "brightrun.status": job.status.value, "brightrun.created_by": job.created_by}
    if job.final_cost_microusd is not None:
        tags["brightrun.final_cost_usd"] = usd(job.final_cost_microusd)
    return tags
