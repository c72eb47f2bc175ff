"""From a row that waits to an actor that runs. A crash between any two steps leaves something to go on from."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.db import Database
from control_plane.services.catalog import Catalog, GpuType
from control_plane.services.lifecycle import transition
from control_plane.settings import Settings
from control_plane.states import Outcome, Status, WorkKind, recovery_after
from control_plane.tables import Attempt, Dataset, ModelArtifact, TrainingJob, Verdict
from scheduler import ledger, retention
from scheduler.executor import AttemptSpec, Demand, Ending, Executor, ResumePoint, Stage
from scheduler.finish import claim, finish
from scheduler.lease import Lease
from scheduler.tracking import Tracking
from scheduler.work import AnyWork, attempt_name, attempt_of, get_work
from trainer.config import BaseModel, Hyperparameters, TrainConfig, VerdictConfig

log = logging.getLogger(__name__)
VERDICT_DEMAND = Demand(resources={"slot_io": 1}, metered=False)
DATASET = "dataset"
PARENT = "parent"


class Dispatcher:
    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        database: Database,
        lease: Lease,
        executor: Executor,
        tracking: Tracking,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._database = database
        self._lease = lease
        self._executor = executor
        self._tracking = tracking

    async def dispatch(self, kind: WorkKind, work_id: str, cluster_id: str) -> None:
        """MLflow run (jobs), attempt, actor, in this order. Raises TrackingDown, Unreachable, LeaseLost."""
        if kind is WorkKind.JOB:
            await self._ensure_run(work_id)
        attempt_id = await self._commit_attempt(kind, work_id)
        if attempt_id is not None:
            await self.start(attempt_id, cluster_id)

    async def start(self, attempt_id: str, cluster_id: str) -> None:
        """Ask the cluster for a committed attempt's supervisor, and note that it was asked."""
        async with self._database.read() as session:
            spec = await self._spec(session, await session.get_one(Attempt, attempt_id))
        await self._executor.start(spec)
        await self.note_started(attempt_id, cluster_id)
        log.info("attempt %s started", spec.name)

    async def withdraw(self, attempt_id: str) -> None:
        """End a committed attempt that was never started: as its user asked, else its work goes back into the queue."""
        async with self._lease.write() as session:
            claimed = await claim(session, attempt_id)
            if claimed is not None and claimed.attempt.cluster_id is None:
                await finish(session, claimed, Ending(Outcome.STOPPED))

    async def note_started(self, attempt_id: str, cluster_id: str) -> None:
        async with self._lease.write() as session:
            await session.execute(
                update(Attempt)
                .where(Attempt.id == attempt_id, Attempt.cluster_id.is_(None))
                .values(cluster_id=cluster_id)
            )

    async def _ensure_run(self, job_id: str) -> None:
        async with self._database.read() as session:
            job = await session.get_one(TrainingJob, job_id)
        if job.mlflow_run_id is not None:
            return
        run = await self._tracking.ensure_run(team_id=job.team_id, job_id=job.id, name=job.name)
        async with self._lease.write() as session:
            await session.execute(
                update(TrainingJob)
                .where(TrainingJob.id == job_id, TrainingJob.mlflow_run_id.is_(None))
                .values(mlflow_run_id=run.run_id, artifact_prefix=run.artifact_prefix)
            )

    async def _commit_attempt(self, kind: WorkKind, work_id: str) -> str | None:
        """The next attempt's id; None when the work waits no more."""
        async with self._lease.write() as session:
            work = await get_work(session, kind, work_id, lock=True)
            if work.status is not Status.QUEUED:
                return None
            previous = await _last_attempt(session, work)
            work.attempt += 1
            saved = await retention.resume_points(session, work) if isinstance(work, TrainingJob) else []
            attempt = Attempt(
                work_kind=kind,
                work_id=work.id,
                number=work.attempt,
                actor_name=attempt_name(work),
                lease_epoch=self._lease.epoch,
                resumed_from=saved[0].id if saved else None,
                recovery=previous is not None and _recovery_after(previous),
            )
            session.add(attempt)
            if isinstance(work, TrainingJob):
                await ledger.reserve(session, work, ahead_ms=self._ahead_ms(work))
            await transition(session, work, Status.INITIALIZING, attempt=work.attempt, not_before=None)
            return attempt.id

    async def _spec(self, session: AsyncSession, attempt: Attempt) -> AttemptSpec:
        work = await get_work(session, attempt.work_kind, attempt.work_id)
        dataset = await session.get_one(Dataset, work.dataset_id)
        common: dict[str, Any] = {
            "name": attempt.actor_name,
            "work_id": work.id,
            "number": attempt.number,
            "storage_url": self._settings.storage_url,
            "work_root": self._settings.work_dir,
            "epoch": self._lease.epoch,
        }
        stage = Stage(dataset.storage_key, DATASET)
        if isinstance(work, Verdict):
            config = self._verdict_config(work, dataset)
            return AttemptSpec(**common, config=config, demand=VERDICT_DEMAND, stage_in=(stage,), threads=1)
        gpu = self._catalog.gpu_types[work.gpu_type]
        return AttemptSpec(
            **common,
            config=self._train_config(work, attempt, dataset),
            demand=job_demand(gpu, work.gpu_count),
            stage_in=(stage, *await _parent(session, work)),
            resume_points=tuple(
                ResumePoint(point.id, point.storage_key, point.sha256, point.step)
                for point in await retention.resume_points(session, work)
            ),
            artifact_prefix=work.artifact_prefix,
            threads=self._settings.cpu_threads,
            allowance_ms=await ledger.allowance_ms(session, work, attempt, self._ahead_ms(work)),
        )

    def _ahead_ms(self, job: TrainingJob) -> int:
        return self._settings.allowance_s * 1000 * job.gpu_count

    def _verdict_config(self, verdict: Verdict, dataset: Dataset) -> dict[str, Any]:
        config = VerdictConfig(
            base_model=self._base_model(verdict.base_model, verdict.revision),
            dataset_path="",
            dataset_format=dataset.stated_format,
            work_dir="",
            cache_dir=self._settings.model_cache_dir,
            max_seq_length=verdict.max_seq_length,
        )
        return dict(msgspec.to_builtins(config))

    def _train_config(self, job: TrainingJob, attempt: Attempt, dataset: Dataset) -> dict[str, Any]:
        config = TrainConfig(
            job_id=job.id,
            attempt=attempt.number,
            name=job.name,
            base_model=self._base_model(job.base_model, job.base_model_revision),
            hyperparameters=msgspec.convert(job.hyperparameters, Hyperparameters),
            dataset_path="",
            dataset_format=dataset.format,
            work_dir="",
            output_dir="",
            cache_dir=self._settings.model_cache_dir,
            threads=self._settings.cpu_threads,
        )
        return dict(msgspec.to_builtins(config))

    def _base_model(self, model_id: str, revision: str) -> BaseModel:
        return BaseModel(id=model_id, revision=revision, source=self._catalog.base_models[model_id].source)


def demand_of(work: AnyWork, catalog: Catalog) -> Demand | None:
    """What the work needs; None when its GPU type or base model is no longer in the catalog (see ``missing``)."""
    if missing(work, catalog):
        return None
    return VERDICT_DEMAND if isinstance(work, Verdict) else job_demand(catalog.gpu_types[work.gpu_type], work.gpu_count)


def missing(work: AnyWork, catalog: Catalog) -> str | None:
    """What the catalog no longer has of what the work was accepted with."""
    if work.base_model not in catalog.base_models:
        return f"The base model {work.base_model} is no longer offered"
    if isinstance(work, TrainingJob) and work.gpu_type not in catalog.gpu_types:
        return f"The GPU type {work.gpu_type} is no longer offered"
    return None


def job_demand(gpu: GpuType, count: int) -> Demand:
    """A gang of ``count`` ranks, one GPU (or slot) each."""
    return Demand(resources=gpu.demand.resources, num_gpus=gpu.demand.gpus, labels=gpu.demand.labels, ranks=count)


async def _parent(session: AsyncSession, job: TrainingJob) -> list[Stage]:
    """The adapter to train on from."""
    if job.parent_model_id is None:
        return []
    model = await session.get_one(ModelArtifact, job.parent_model_id)
    key = next(iter(model.artifacts.values()))["key"]
    return [Stage(key.rpartition("/adapter/")[0] + "/adapter", PARENT, prefix=True)]


async def _last_attempt(session: AsyncSession, work: AnyWork) -> Attempt | None:
    """The work's last attempt; before its first, that of the job that it retries."""
    if work.attempt == 0 and isinstance(work, TrainingJob) and work.retry_of is not None:
        return await attempt_of(session, await session.get_one(TrainingJob, work.retry_of))
    return await attempt_of(session, work)


def _recovery_after(previous: Attempt) -> bool:
    started = previous.cluster_id is not None
    return recovery_after(previous.outcome, previous.exit_reason, started=started, recovery=previous.recovery)
